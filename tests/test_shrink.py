"""Fewer bytes, the same adapters; what may become the package's own generator, and what may not."""

import importlib
import importlib.resources
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_bench import SPLITS, collected, untrained_generator
from torch.testing import assert_close

from ltdi_peft.base import load_base
from ltdi_peft.cards import scores_of
from ltdi_peft.cli import main
from ltdi_peft.distance import delta_w_distance
from ltdi_peft.generate import find_generator, generate_adapter
from ltdi_peft.generator import Generator, load_generator
from ltdi_peft.generator_config import default_folder
from ltdi_peft.ship import limits, require_proof, scores_text, shrink_folder
from ltdi_peft.shrink import fitting_width, moved, narrowed, shrink, stored_bytes, strongest

ship_room = importlib.import_module("ltdi_peft.ship")
generate_room = importlib.import_module("ltdi_peft.generate")
ROOT = Path(__file__).parents[1]
ROUNDING = 1e-2  # relative, of 8 bits a number, through a few sums


@pytest.fixture
def generator(world):
    return load_generator(world.recipe.generator_folder)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Its denoiser adds nothing, so nothing depends on noise: five tasks, at most five directions a site."""
    return untrained_generator(collected(tmp_path_factory.mktemp("linear")))


def tokens_of(generator, seed=0):
    return generator.tokens(generator.conditions, seed=seed)


def adapters(generator, conditions, **options):
    return [generator.codec.decode(tokens) for tokens in generator.tokens(conditions, **options)]


def distances(spec, left, right):
    return [delta_w_distance(spec, *pair, relative=True) for pair in zip(left, right, strict=True)]


# ---- the same adapters


def test_a_turn_at_full_width_changes_nothing_but_rounding(linear):
    whole = narrowed(linear, strongest(linear, linear.conditions), linear.codec.width)
    for guidance in (None, 0.0, 2.0):
        pair = (adapters(one, linear.conditions, guidance_scale=guidance) for one in (whole, linear))
        assert max(distances(linear.spec, *pair)) < ROUNDING
    assert max(distances(linear.spec, *(adapters(one, linear.conditions) for one in (whole, linear)))) > 0


def test_directions_are_orthonormal_and_strongest_first(generator):
    for found, used in zip(
        strongest(generator, generator.conditions), generator.codec.mask.sum(1), strict=True
    ):
        assert_close(
            found.rows @ found.rows.mT, torch.eye(int(used), dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert (found.energy.diff() <= 0).all()


def test_what_is_generated_needs_as_many_directions_as_there_are_tasks(linear):
    directions = strongest(linear, linear.conditions)
    enough, few = (narrowed(linear, directions, width) for width in (5, 2))
    assert moved(enough, linear, linear.conditions) < ROUNDING
    assert moved(few, linear, linear.conditions) > 0.02  # the control


def test_the_error_is_what_the_directions_left_out_hold(linear):
    directions, width = strongest(linear, linear.conditions), 3
    small, tokens = narrowed(linear, directions, width), tokens_of(linear)
    for site, found in enumerate(directions):
        rows = found.rows[:width].float()
        inside = tokens[:, site] @ rows.mT
        assert_close(tokens_of(small)[:, site], inside, rtol=ROUNDING, atol=ROUNDING)
        said = tokens[:, site] - linear.mean[site]
        left_out = (said - said @ rows.mT @ rows).square().sum()
        assert left_out <= found.energy[width:].sum() * 1.001  # which counts the mean adapter too


def test_the_whole_network_is_turned(generator):
    """Attention, gains, map and all: F of turned tokens is the turned F, as long as nothing is left out."""
    for index, weight in enumerate(generator.denoiser.parameters()):
        weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    directions = strongest(generator, generator.conditions)
    small = narrowed(generator, directions, generator.codec.width)
    rows = torch.stack([found.rows.float() for found in directions])
    x = torch.randn(5, *generator.mean.shape, generator=torch.Generator().manual_seed(1))
    turned = torch.einsum("bsw,snw->bsn", x, rows)
    for t in (0, 3, 5):
        times = torch.full((5,), t)
        want = torch.einsum("bsw,snw->bsn", generator.denoiser(x, times, generator.conditions), rows)
        got = small.denoiser(turned, times, generator.conditions)
        assert_close(got, want, rtol=0, atol=0.01 * want.abs().max().item())
        assert (want - generator.denoiser(x, times, generator.conditions)).abs().max() > 0.1  # it does turn


def test_narrow_sites_keep_the_identity(linear):
    """A site with no more coordinates than the width has no basis, before and after."""
    dims = [frame.dim for frame in linear.codec.frames]
    widened = replace(linear.codec, width=max(dims), bases=(None,) * len(dims))
    assert widened.mask.sum(1).tolist() == dims
    sites = len(dims)
    exact = Generator(
        replace(linear.config, denoiser={**linear.config.denoiser, "width": max(dims)}),
        widened,
        centre=torch.randn(len(linear.centre), sites * max(dims), generator=torch.Generator().manual_seed(0)),
        mean=torch.zeros(sites, max(dims)),
        spread=linear.spread,
        conditions=linear.conditions,
    )
    small = narrowed(exact, strongest(exact, exact.conditions), min(dims))
    assert [basis is None for basis in small.codec.bases] == [dim <= min(dims) for dim in dims]
    assert any(basis is None for basis in small.codec.bases)
    assert any(basis is not None for basis in small.codec.bases)


# ---- bytes, and the folder


def test_the_largest_width_that_fits(generator):
    directions = strongest(generator, generator.conditions)
    sizes = [stored_bytes(narrowed(generator, directions, width)) for width in (3, 6)]
    for width, fits in zip((3, 6), sizes, strict=True):
        assert fitting_width(generator, directions, fits) == width
        assert fitting_width(generator, directions, fits - 1) == width - 1
    assert fitting_width(generator, directions, 10**9) == generator.codec.width
    with pytest.raises(ValueError, match=r"at width 1 the generator has \d+ bytes already, 1000 are allowed"):
        fitting_width(generator, directions, 1000)


def test_a_shrunk_folder_loads_like_any_other(generator, tmp_path):
    most = stored_bytes(generator) // 2
    small = shrink(generator, max_bytes=most)
    about = small.config.shrunk
    assert (about["from_width"], about["prompts"]) == (8, 2)  # every fourth of five tasks
    assert about["width"] == small.codec.width < 8
    assert 0 < about["error"] < 1
    small.save_pretrained(tmp_path / "small")
    assert sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")) <= most
    again = Generator.from_pretrained(tmp_path / "small")
    assert again.config == small.config
    assert torch.equal(tokens_of(again), tokens_of(small))
    again.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "small").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    text = " ".join((tmp_path / "small" / "README.md").read_text().split())
    assert f"Shrunk from 8 to {small.codec.width} numbers a site" in text
    with pytest.raises(ValueError, match="was shrunk before"):
        shrink(again)


def test_the_error_is_that_of_held_out_prompts(linear):
    held_out = torch.nn.functional.normalize(linear.conditions[:2] + linear.conditions[2:4], dim=-1)
    most = stored_bytes(narrowed(linear, strongest(linear, linear.conditions), 3))
    small = shrink(linear, held_out=held_out, max_bytes=most)
    assert small.codec.width == 3
    start = linear.codec.decode(torch.zeros_like(linear.mean))
    pairs = zip(*(adapters(one, held_out) for one in (small, linear)), strict=True)
    want = [
        delta_w_distance(linear.spec, got, own) / delta_w_distance(linear.spec, own, start)
        for got, own in pairs
    ]
    assert small.config.shrunk["error"] == pytest.approx(sum(want) / 2, abs=1e-6)


def test_a_generator_from_before_loads(world, tmp_path, generator):
    """config.json of a generator that knew of no shrinking."""
    generator.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    assert table.pop("shrunk") is None
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert load_generator(tmp_path).config == generator.config


# ---- the package's own


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of the package's own generator, somewhere else and not there yet."""
    folder = tmp_path / "ltdi_peft" / "default_generator"
    folder.parent.mkdir()
    for room in (ship_room, generate_room):
        monkeypatch.setattr(room, "default_folder", lambda: folder)
    monkeypatch.delenv("LTDI_GENERATOR", raising=False)
    return folder


def proof_of(generator, **prompt):
    """A result of this generator with intervals above 0, but for what is given."""
    row = {"right": 0.7, "wrong": 0.5, "ci": [0.1, 0.3], "mean": 0.6, "ci_mean": [0.05, 0.15]}
    row |= {"reads_its_prompt": True, "tasks_with_same_format_wrong": 3}
    row["no_prompt"] = dict(row)
    score = {"tasks": 24, "accuracy": 0.5, "G": 0.7, "ci": [0.6, 0.8]}
    score |= {f"{key}_no_prompt": score[key] for key in ("accuracy", "G", "ci")}
    own = generator.config
    far = {"unseen_domains": {**row, "right": 0.04, "reads_its_prompt": False}}
    return {
        "recipe": own.recipe["name"],
        "base_model": own.base_model,
        "suite": {"train": len(own.training_tasks)},
        "trials": {"ours": {"scale": own.guidance_scale, "mean_share": own.mean_share}},
        "methods": {m: {"unseen_tasks": score} for m in ("base", "mean", "nearest", "ours", "oracle")},
        "paired": {"ours - multi_task_lora": {"unseen_tasks": {"G": 0.02, "ci_G": [-0.03, 0.07]}}},
        "controls": {"prompt": {"unseen_tasks": {**row, **prompt}, **far}},
        "power": {},
    }


def test_without_one_the_error_says_so(package):
    with pytest.raises(ValueError, match=r"no generator: pass .*ltdi_peft has none of its own"):
        find_generator(None)


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_the_packages_own_serves_who_names_none(world, generator, package, monkeypatch, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(proof_of(generator)))
    shrink_folder(world.recipe.generator_folder, package, results=tmp_path)
    assert find_generator(None).config.shrunk
    model = generate_adapter(
        "say a first plain", base_model=load_base(str(world.base), dtype="float32").model
    )
    assert model.peft_config["default"].r == 2
    monkeypatch.setenv("LTDI_GENERATOR", str(world.recipe.generator_folder))
    assert find_generator(None).config.shrunk is None


def test_the_card_of_the_packages_own_has_the_scores(world, generator, package, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(proof_of(generator)))
    shrink_folder(world.recipe.generator_folder, package, results=tmp_path)
    text = (package / "README.md").read_text()
    assert "| `ours` | 0.50 | 0.70 [0.60, 0.80] | 0.50 | 0.70 [0.60, 0.80] |" in text
    assert "`nearest`" not in text
    assert "above the mean adapter by G 0.10 [0.05, 0.15]" in text
    assert "- Be better than `multi_task_lora`, as far as shown: G +0.02 [-0.03, 0.07]." in text
    assert "- Read its prompt on unseen domains, as far as shown: G 0.04, with a wrong prompt 0.50." in text
    assert "fine-tunes of 5 tasks" in " ".join(text.split())
    assert load_generator(package).scores == scores_of(proof_of(generator))  # so that its adapters carry them


def test_what_is_shown_is_no_limit(generator):
    result = proof_of(generator)
    assert len(limits(result)) == 3
    result["paired"]["ours - multi_task_lora"]["unseen_tasks"]["ci_G"] = [0.01, 0.03]
    del result["controls"]["prompt"]["unseen_domains"]
    assert len(limits(result)) == 1
    assert "multi_task_lora" not in scores_text(result)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ({"ci_mean": [-0.01, 0.2]}, r"beats the mean adapter .* lies in \[-0.01, 0.20\]"),
        ({"ci": [0.0, 0.2]}, r"beats its own with a wrong prompt"),
        ({"ci": None}, r"lies in no interval"),
    ],
)
def test_no_proof_no_place_in_the_package(world, generator, package, tmp_path, prompt, match):
    require_proof(generator, proof_of(generator))  # the control
    (tmp_path / "tiny.json").write_text(json.dumps(proof_of(generator, **prompt)))
    with pytest.raises(ValueError, match=match):
        shrink_folder(world.recipe.generator_folder, package, results=tmp_path)
    assert not package.exists()
    shrink_folder(world.recipe.generator_folder, tmp_path / "elsewhere", results=tmp_path)  # no proof needed


def test_the_proof_is_of_this_generator(world, generator, package, tmp_path):
    other = proof_of(generator) | {"suite": {"train": 488}}
    with pytest.raises(ValueError, match=r"not this generator's: training tasks is 488 there and 5 here"):
        require_proof(generator, other)
    other = proof_of(generator) | {"trials": {"ours": {"scale": 9.0, "mean_share": 1.0}}}
    with pytest.raises(ValueError, match="guidance is"):
        require_proof(generator, other)
    with pytest.raises(ValueError, match=r"tiny\.json cannot be read"):
        shrink_folder(world.recipe.generator_folder, package, results=tmp_path)


def test_the_package_has_a_place_for_it(tmp_path):
    """What lies in `default_generator/` goes into a wheel, and is found where the package is."""
    place = importlib.resources.files("ltdi_peft") / "default_generator"
    assert default_folder() == Path(str(place))
    project = tmp_path / "project"
    (project / "ltdi_peft" / "default_generator").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "ltdi_peft/__init__.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    for name in ("config.json", "model.safetensors"):
        (project / "ltdi_peft" / "default_generator" / name).write_text("{}")
    command = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    words = [sys.executable, "-c", command, str(tmp_path)]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if "default_generator" in name}
    assert inside == {f"ltdi_peft/default_generator/{name}" for name in ("config.json", "model.safetensors")}


# ---- the command


def test_one_that_is_small_is_written_as_it_is(world, tmp_path):
    shrink_folder(world.recipe.generator_folder, tmp_path / "small")
    about = shrink_folder(tmp_path / "small", tmp_path / "again")
    one, two = (load_generator(tmp_path / name) for name in ("small", "again"))
    assert one.config == two.config
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    assert about["bytes"] == about["bytes_before"]
    with pytest.raises(ValueError, match="was shrunk before"):
        shrink_folder(tmp_path / "small", tmp_path / "smaller", max_bytes=about["bytes"] - 1)


def test_the_command(world, tmp_path, capsys):
    source, out = str(world.recipe.generator_folder), str(tmp_path / "small")
    recipe = str(world.recipe_file(tmp_path))
    assert (
        main(["shrink", source, "--out", out, "--max-megabytes", "0.02", "--recipe", recipe, "--json"]) == 0
    )
    about = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert about["bytes"] <= 20_000 < about["bytes_before"]
    assert about["prompts"] == len(SPLITS["validation"]) + len(SPLITS["unseen_tasks"])
    assert load_generator(tmp_path / "small").config.shrunk["width"] == about["width"]
    assert main(["shrink", source, "--out", out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["shrink", source, "--out", f"{out}2"]) == 0
    assert "MB, width 8 → 8; generated adapters moved by" in capsys.readouterr().out
