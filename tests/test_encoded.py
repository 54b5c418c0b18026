"""Encoded trajectories: the file alone trains what the store would."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_bench import SPLITS, link_runs

from ltdi_peft.cli import main
from ltdi_peft.collect import open_bench
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.encoded import load_encoded, recipe_encoded, save_encoded
from ltdi_peft.encoding import encode_store, second_round
from ltdi_peft.prepare import training_trajectories
from ltdi_peft.spec import SpecMismatchError, site_norms
from ltdi_peft.train import train_generator

WIDTH = 5  # other than the recipe's


@pytest.fixture(scope="module")
def bench(world):
    return open_bench(world.recipe)


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """The world's store, encoded in each dtype; its cache goes elsewhere."""
    folder = tmp_path_factory.mktemp("encoded")
    made = {dtype: folder / f"{dtype}.safetensors" for dtype in ("float32", "float16")}
    for dtype, file in made.items():
        encode_store(over_the_store(world, folder / "run"), file, width=WIDTH, dtype=dtype, progress=False)
    return made


def over_the_store(world, folder, **sections):
    """The world's recipe with an `output` of its own, whose runs are links to the world's."""
    return world.changed(link_runs(world.recipe, folder), **sections)


def trained(recipe, bench):
    generator = train_generator(recipe, bench=replace(bench, recipe=recipe), progress=False)
    return generator, json.loads((recipe.folder / "training.json").read_text())


def from_file(world, folder, file):
    return world.changed(folder, train={**vars(world.recipe.train), "task_loss": {}, "encoded": str(file)})


# ---- the same training


def test_the_file_trains_what_the_store_trains(world, bench, files, tmp_path):
    codec = {"width": WIDTH, "dtype": "float32", "gate": 0.0}
    want, by_store = trained(over_the_store(world, tmp_path / "store", codec=codec), bench)
    got, by_file = trained(from_file(world, tmp_path / "file", files["float32"]), bench)
    assert not (tmp_path / "file" / "trajectories").exists()
    kept = [path.name for path in (tmp_path / "file" / "cache").iterdir()]
    assert [name.partition("-")[0] for name in kept] == ["conditions"]  # no codec, no tokens of its own
    for name in ("model", "codec"):
        left, right = (load_file(tmp_path / at / f"generator/{name}.safetensors") for at in ("file", "store"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    for key in ("losses", "ridge", "spread", "guidance", "validation/relative_error"):
        assert by_file[key] == by_store[key], key
    assert got.config.norm_range == want.config.norm_range
    assert got.config.training_tasks == want.config.training_tasks
    assert got.config.recipe["train"]["encoded"] == "float32.safetensors"  # no folder of the user


def test_sixteen_bits_train_nearly_the_same(world, bench, files, tmp_path):
    exact, _ = trained(from_file(world, tmp_path / "32", files["float32"]), bench)
    rounded, _ = trained(from_file(world, tmp_path / "16", files["float16"]), bench)
    error = (exact.mean - rounded.mean).norm() / exact.mean.norm()
    assert 0 < error < 1e-2
    assert files["float16"].stat().st_size < files["float32"].stat().st_size


def test_no_gate_is_asked_of_a_file(world, bench, files, tmp_path):
    recipe = from_file(world, tmp_path, files["float32"])
    _, report = trained(replace(recipe, codec=replace(recipe.codec, gate=1.0)), bench)
    assert "gate" not in report


# ---- the file


def test_what_the_file_holds(world, files):
    encoded = load_encoded(files["float32"])
    runs = training_trajectories(world.recipe, SPLITS["train"])
    assert encoded.runs.tasks == tuple(run.task.name for run in runs)
    assert encoded.runs.seeds == tuple(run.seed for run in runs)
    assert encoded.runs.tokens.shape == (len(runs), 3, len(runs[0].spec.sites), WIDTH)
    for index, run in enumerate(runs):
        target = run.local_targets(3)[1]
        assert torch.allclose(
            encoded.runs.tokens[index, 1], encoded.codec.encode(run.adapter(target)), atol=1e-5
        )
    assert encoded.held_out.tasks == SPLITS["validation"]  # and no unseen task
    assert set(encoded.tasks) == {*SPLITS["train"], *SPLITS["validation"]}
    task = encoded.tasks["a/first/plain"]
    assert task.prompts == runs[0].task.prompts
    assert (task.domain, task.train, task.evaluation) == ("a", (), ())


def test_equal_runs_give_equal_bytes_and_a_codec_reads_them(files, tmp_path):
    encoded = load_encoded(files["float16"])
    save_encoded(encoded, tmp_path / "again", "float16")
    assert (tmp_path / "again").read_bytes() == files["float16"].read_bytes()
    assert AdapterCodec.load(files["float16"]).width == WIDTH


def test_a_second_round_is_added_to_the_first(world, tmp_path):
    recipe, runs = (
        over_the_store(world, tmp_path / "run"),
        training_trajectories(world.recipe, SPLITS["train"]),
    )
    every = 3 * len(runs)  # as many directions as there are adapters: nothing is lost
    options = {"width": every, "dtype": "float32", "progress": False}
    encode_store(recipe, tmp_path / "first", **options)
    both = encode_store(recipe, tmp_path / "both", onto=tmp_path / "first", **options)
    read = load_encoded(tmp_path / "both")
    assert (read.runs.tasks, read.runs.seeds, read.held_out.tasks) == (
        both.runs.tasks,
        both.runs.seeds,
        SPLITS["validation"],
    )
    for index, run in enumerate(runs):
        for place, snapshot in enumerate(run.local_targets(3)):
            decoded, own = read.codec.decode(read.runs.tokens[index, place]), run.adapter(snapshot)
            for site, (a, b) in run.start().items():
                assert torch.equal(decoded[site][0], a)
                torch.testing.assert_close(decoded[site][1] - b, 2 * (own[site][1] - b), rtol=1e-3, atol=1e-5)
    for run in runs:
        for site, norm in site_norms(run.spec, run.adapter(run.snapshots[-1])).items():
            assert both.norm_range[site][1] > norm  # that of the sum


# ---- refusals


def test_a_second_round_needs_a_first_of_its_tasks_and_gauge(world, files):
    first, runs = load_encoded(files["float32"]), training_trajectories(world.recipe, SPLITS["train"])
    some = replace(first, runs=first.runs.of(SPLITS["train"][1:]))
    with pytest.raises(ValueError, match=f"no run in the first, first '{SPLITS['train'][0]}'"):
        second_round(world.recipe, some, runs, [])
    foreign = replace(runs[0], spec=replace(runs[0].spec, base_model="another"))
    with pytest.raises(SpecMismatchError, match="for base model 'another'"):
        second_round(world.recipe, first, [foreign], [])
    other = replace(first, codec=replace(first.codec, gauge="shared_start"))
    with pytest.raises(ValueError, match=r"collect\.gauge is 'shared_start'\. Use gauge 'shared_a'"):
        second_round(world.recipe, other, runs, [])


def test_only_the_recipes_training_tasks_are_learnt(world, files, tmp_path):
    recipe = from_file(world, tmp_path, files["float32"])
    some = recipe_encoded(recipe, SPLITS["train"][:2])
    assert set(some.runs.tasks) == set(SPLITS["train"][:2])
    assert len(some.runs.tokens) == len(some.runs.seeds) == 4
    with pytest.raises(ValueError, match="holds runs of 0 training tasks of this recipe"):
        recipe_encoded(recipe, SPLITS["unseen_tasks"])


@pytest.mark.parametrize(
    ("section", "fields", "match"),
    [
        (
            "collect",
            {"gauge": "shared_start"},
            "encoded with collect.gauge: shared_a, the recipe has shared_start",
        ),
        ("diffusion", {"k": 2}, "encoded with diffusion.k: 3, the recipe has 2"),
    ],
)
def test_a_file_of_other_choices_is_refused(world, files, tmp_path, section, fields, match):
    recipe = from_file(world, tmp_path, files["float32"])
    other = replace(recipe, **{section: replace(vars(recipe)[section], **fields)})
    with pytest.raises(ValueError, match=match):
        recipe_encoded(other, SPLITS["train"])


def test_a_file_of_another_adapter_is_refused(world, files, tmp_path):
    recipe = from_file(world, tmp_path, files["float32"])
    other = replace(recipe, adapter=replace(recipe.adapter, rank=3))
    with pytest.raises(SpecMismatchError, match="rank 2, expected 3"):
        trained(other, open_bench(other))


def test_what_is_no_such_file_is_refused(world, files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of encoded trajectories; `ltdi encode` writes"):
        load_encoded(tmp_path / "none")
    codec = world.recipe.generator_folder / "codec.safetensors"
    with pytest.raises(ValueError, match=r"format version None, this ltdi_peft reads 1"):
        load_encoded(codec)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(files["float32"].read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_encoded(damaged)
    with pytest.raises(ValueError, match="exists already"):
        encode_store(world.recipe, damaged)


def test_the_command(world, tmp_path, capsys):
    recipe = over_the_store(world, tmp_path / "run")
    file, out = world.recipe_file(tmp_path / "yaml"), tmp_path / "runs.safetensors"
    command = ["encode", str(file), f"--output={recipe.output}", "--out", str(out), "--width", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"10 runs in {out}" in said
    assert f"--train.encoded={out}" in said
    assert load_encoded(out).codec.width == 4
    again = [*command[:-2], "--onto", str(out)]
    again[again.index(str(out))] = str(tmp_path / "both.safetensors")
    assert main(again) == 0
    assert Path(recipe.folder / "cache").is_dir()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
