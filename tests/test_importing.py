"""Import: what fits comes in bit for bit, what does not is named with the way out, nothing comes in twice."""

import importlib
import json
import re
import shutil

import pytest
import torch
from peft import EvaConfig, LoHaConfig, PeftModel, initialize_lora_eva_weights, save_as_lora
from safetensors.torch import load_file
from tiny_peft_library import (
    LORA,
    edit_config,
    edit_weights,
    line,
    make_peft,
    move,
    save_base,
    save_lora,
    write_manifest,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import ltdi_peft
from ltdi_peft.adapter import live_factors
from ltdi_peft.cli import main
from ltdi_peft.config import CollectConfig, Recipe
from ltdi_peft.prepare import require_one_frame
from ltdi_peft.publish import tells_of_machine
from ltdi_peft.spec import delta_norm
from ltdi_peft.store import RunWriter, TrajectoryStore

room = importlib.import_module("ltdi_peft.importing")
PROMPTS = ("Say it politely.", "Be kind.")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def library(base, tmp_path_factory):
    """Three adapters from different starts: a, b, c. Read only."""
    folder = tmp_path_factory.mktemp("library")
    for seed, name in enumerate("abc"):
        save_lora(base, folder / name, seed)
    return folder


@pytest.fixture
def copied(library, tmp_path):
    """A library of one's own."""
    return shutil.copytree(library, tmp_path / "library")


def imported(source, store, **options):
    return ltdi_peft.import_adapters(source, store, **{"task": "polite", "prompts": PROMPTS, **options})


def listed(folder, *names):
    """A manifest of a task for each adapter."""
    return write_manifest(folder / "adapters.jsonl", *(line(name, task=name) for name in names))


def stored(folder):
    return TrajectoryStore(folder, create=False).trajectories(finished_only=False)


def statuses(rows):
    return [row["status"] for row in rows]


def file_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what comes in


def test_an_adapter_comes_in_bit_for_bit(library, tmp_path):
    (row,) = imported(library / "a", tmp_path / "s", domain="style")
    assert row == {
        "path": str(library / "a"), "task": "polite", "step": 1, "run": "polite-s0", "status": "imported",
        "reason": "",
    }  # fmt: skip
    (run,) = stored(tmp_path / "s")
    assert (run.task.name, run.task.prompts, run.task.domain) == ("polite", PROMPTS, "style")
    assert run.finished
    assert (
        run.spec.base_model
        == json.loads((library / "a/adapter_config.json").read_text())["base_model_name_or_path"]
    )
    (snapshot,) = run.snapshots
    assert (snapshot.step, snapshot.progress, snapshot.loss) == (1, 1.0, None)
    expected, adapter = load_file(library / "a" / "adapter_model.safetensors"), run.adapter(snapshot)
    assert 2 * len(adapter) == len(expected) == 8
    for site, (a, b) in adapter.items():
        assert torch.equal(a, expected[f"base_model.model.{site}.lora_A.weight"])
        assert torch.equal(b, expected[f"base_model.model.{site}.lora_B.weight"])


def test_where_it_came_from_is_kept_here_and_not_published(library, tmp_path, monkeypatch):
    """A path on this machine is of no use to others; a path relative to the manifest tells nothing."""
    imported(library / "a", tmp_path / "s")
    (run,) = stored(tmp_path / "s")
    assert run.about["imported_from"] == str(library / "a")
    published = {key for key, value in run.about.items() if not tells_of_machine(key, value)}
    assert published == {"imported", "imported_at"}
    monkeypatch.chdir(library)
    imported("b", tmp_path / "s")
    assert not tells_of_machine("imported_from", stored(tmp_path / "s")[1].about["imported_from"])


def test_the_start_is_the_known_a_with_b_zero(library, tmp_path):
    imported(library / "a", tmp_path / "s")
    (run,) = stored(tmp_path / "s")
    start, adapter = run.start(), run.adapter(run.snapshots[0])
    for site, (a, b) in start.items():
        assert torch.equal(a, adapter[site][0])
        assert delta_norm(a, b, 1.0) == 0 < delta_norm(*adapter[site], 1.0)


def test_adapters_of_different_starts_do_not_seem_to_share_one(library, tmp_path):
    """Those with one frozen A do, and so they may be trained on in gauge shared_a."""
    imported(library, tmp_path / "s")
    runs = stored(tmp_path / "s")
    assert len({run.start_path for run in runs}) == 3
    require_one_frame(runs, Recipe(collect=CollectConfig(gauge="canonical")))
    with pytest.raises(ValueError, match="all runs need one start"):
        require_one_frame(runs, Recipe(collect=CollectConfig(gauge="shared_start")))
    frozen = shutil.copytree(library / "a", tmp_path / "frozen")
    edit_weights(frozen, lambda key, w: (key, w * 2 if "lora_B" in key else w))
    imported(frozen, tmp_path / "s", task="frozen")
    (run,) = [run for run in stored(tmp_path / "s") if run.task.name == "frozen"]
    assert run.start_path == runs[0].start_path


def test_a_given_start_is_the_start(base, tmp_path):
    """Step 0 is θ_0 and no snapshot."""
    model = make_peft(base, trained=False, **LORA)
    for step in (0, 5, 10):
        model.save_pretrained(tmp_path / f"at-{step}")
        move(model)
    lines = [line(f"at-{step}", step=step) for step in (10, 0, 5)]
    rows = ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *lines), tmp_path / "s")
    assert [(row["step"], row["status"], row["run"]) for row in rows] == [
        (10, "imported", "polite-s0"), (0, "imported", "polite-s0"), (5, "imported", "polite-s0"),
    ]  # fmt: skip
    (run,) = stored(tmp_path / "s")
    assert [(s.step, s.progress) for s in run.snapshots] == [(5, 0.5), (10, 1.0)]
    theta = load_file(tmp_path / "at-0" / "adapter_model.safetensors")
    for site, (a, b) in run.start().items():
        assert torch.equal(a, theta[f"base_model.model.{site}.lora_A.weight"])
        assert not b.any()


def test_runs_of_one_start_share_it(base, library, tmp_path):
    """So gauge shared_start takes them; and that they share it does not make them the same run."""
    theta = save_lora(base, tmp_path / "theta", seed=9)
    lines = [line(theta, step=0, run=name) for name in "ab"]
    lines += [line(library / name, step=5, run=name) for name in "ab"]
    rows = ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *lines), tmp_path / "s")
    assert statuses(rows) == ["imported"] * 4
    runs = stored(tmp_path / "s")
    assert [run.run_id for run in runs] == ["polite-s0", "polite-s1"]
    require_one_frame(runs, Recipe(collect=CollectConfig(gauge="shared_start")))


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone_fit(base, tmp_path, init):
    more = {"eva_config": EvaConfig(rho=1.0)} if init == "eva" else {}  # rho 1: no site gets another rank
    model = make_peft(base, trained=False, init_lora_weights=init, **more, **LORA)
    if init == "eva":
        before = live_factors(model)["model.layers.0.self_attn.q_proj"][0].clone()
        ids = torch.randint(3, 60, (12, 2, 8), generator=torch.Generator().manual_seed(0))
        initialize_lora_eva_weights(model, [{"input_ids": rows} for rows in ids], show_progress_bar=False)
        assert not torch.equal(live_factors(model)["model.layers.0.self_attn.q_proj"][0], before)
    clean = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, clean[name.replace(".base_layer", "")])
    move(model)
    model.save_pretrained(tmp_path / init)
    assert statuses(imported(tmp_path / init, tmp_path / "s")) == ["imported"]


def test_runs_of_one_task_get_seeds_of_their_own(library, tmp_path):
    rows = imported(library, tmp_path / "s")
    assert [row["run"] for row in rows] == ["polite-s0", "polite-s1", "polite-s2"]
    assert [run.seed for run in stored(tmp_path / "s")] == [0, 1, 2]


# ---- what does not fit


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def weights(change):
    return lambda folder: edit_weights(folder, change)


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without_config(folder):
    (folder / "adapter_config.json").unlink()


CONVERTED = "of twice the rank, .*path_initial_model_for_weight_conversion"
REFUSED = {
    "pissa": (config(init_lora_weights="pissa_niter_4"), CONVERTED),
    "olora": (config(init_lora_weights="olora"), CONVERTED),
    "corda": (config(init_lora_weights="corda"), CONVERTED),
    "lora_ga": (config(init_lora_weights="lora_ga"), CONVERTED),
    "loftq": (config(init_lora_weights="loftq"), "clean copy of it; train with one of"),  # PEFT converts none
    "dora": (config(use_dora=True), "use_dora=True .*no LoRA holds; train with use_dora=False"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "drop modules_to_save"),
    "target_parameters": (config(target_parameters=["experts"]), "target_parameters.*; use target_modules"),
    "bias": (config(bias="lora_only"), "use bias='none'"),
    "loha": (config(peft_type="LOHA"), r"peft_type is LOHA.*peft\.save_as_lora\(folder, model, rank="),
    "another type of value": (
        config(target_modules=5),
        "its JSON has a value of another type than PEFT writes",
    ),
    "no base model": (config(base_model_name_or_path=None), r"base_model_name_or_path is empty.*base_model="),
    "other base model": (config(base_model_name_or_path="other/base"), "compared with a: .* 'other/base'"),
    "other alpha": (config(lora_alpha=8), "compared with a: site .* has alpha 8.0, expected 4.0"),
    "renamed": (
        weights(lambda key, w: (key.replace("lora_A", "down"), w)),
        "key '.*down.weight' is not <site>",
    ),
    "nan": (weights(lambda key, w: (key, w * torch.nan)), "NaN or infinite"),
    "zero": (weights(lambda key, w: (key, w * ("lora_A" in key))), "ΔW is zero at every site"),
    "pickle": (pickled, "may run code; PeftModel.from_pretrained, then save_pretrained, writes safetensors"),
    "no config": (without_config, "adapter_config.json does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_and_the_rest_comes_in(copied, tmp_path, name):
    change, message = REFUSED[name]
    change(copied / "b")
    source = listed(copied, "a", "b", "c")
    dry = ltdi_peft.import_adapters(source, tmp_path / "s", dry_run=True)
    assert statuses(dry) == ["fits", "does not fit", "fits"]
    assert re.search(message, dry[1]["reason"]), dry[1]["reason"]
    assert not (tmp_path / "s").exists()
    rows = ltdi_peft.import_adapters(source, tmp_path / "s")
    assert statuses(rows) == ["imported", "does not fit", "imported"]
    assert rows[1]["reason"] == dry[1]["reason"]
    assert {run.task.name for run in stored(tmp_path / "s")} == {"a", "c"}


# peft warns that the adapter it converts cannot share its model with others.
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_the_way_out_of_pissa_leads_into_the_store(base, tmp_path, probe_ids):
    """What the message says, done: PEFT's conversion computes the same on a clean base model, and fits."""
    model = make_peft(base, trained=False, init_lora_weights="pissa", **LORA)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = "pissa"
    move(model)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "way", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    clean = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        got = PeftModel.from_pretrained(clean, tmp_path / "way").eval()(probe_ids).logits
        assert_close(got, model(probe_ids).logits, rtol=0, atol=1e-5)  # float32
    assert statuses(imported(tmp_path / "raw", tmp_path / "s")) == ["does not fit"]
    assert statuses(imported(tmp_path / "way", tmp_path / "s")) == ["imported"]
    assert {site.rank for site in stored(tmp_path / "s")[0].spec.sites} == {2 * LORA["r"]}


def test_the_way_out_of_loha_leads_into_the_store(base, tmp_path):
    model = make_peft(base, config=LoHaConfig, r=2, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "raw")
    save_as_lora(tmp_path / "way", model, rank=4)
    assert statuses(imported(tmp_path / "raw", tmp_path / "s")) == ["does not fit"]
    assert statuses(imported(tmp_path / "way", tmp_path / "s")) == ["imported"]


def test_dora_has_no_way_out(base, tmp_path, probe_ids):
    """Why the message names none: PEFT converts it to an adapter that computes something else."""
    model = make_peft(base, use_dora=True, **LORA)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        save_as_lora(tmp_path / "wrong", model, rank=16)
    clean = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        want, plain = model(probe_ids).logits, clean(probe_ids).logits
        got = PeftModel.from_pretrained(clean, tmp_path / "wrong").eval()(probe_ids).logits
    assert (got - want).norm() > 0.1 * (want - plain).norm()


def test_the_store_decides_what_fits(library, base, tmp_path):
    imported(library / "a", tmp_path / "s")
    other = save_lora(base, tmp_path / "other", r=4)
    (row,) = imported(other, tmp_path / "s")
    assert re.search("compared with run polite-s0 of the store: .* has rank 4, expected 2", row["reason"])
    assert statuses(imported(other, tmp_path / "empty")) == ["imported"]


def test_a_base_model_under_another_name(copied, tmp_path):
    edit_config(copied / "b", base_model_name_or_path="/somebody/elses/copy")
    rows = imported(copied, tmp_path / "s", base_model="owner/base")
    assert statuses(rows) == ["imported"] * 3
    assert {run.spec.base_model for run in stored(tmp_path / "s")} == {"owner/base"}


# ---- again


def test_importing_again_adds_nothing(library, copied, tmp_path):
    first = imported(library, tmp_path / "s")
    before = file_bytes(tmp_path / "s")
    for source in (library, copied):  # known by what they hold, not by where they lie
        again = imported(source, tmp_path / "s")
        assert statuses(again) == ["already there"] * 3
        assert [row["run"] for row in again] == [row["run"] for row in first]
    assert file_bytes(tmp_path / "s") == before


def test_a_dry_run_leaves_a_store_as_it_was(library, tmp_path):
    imported(library / "a", tmp_path / "s")
    before = file_bytes(tmp_path / "s")
    assert statuses(imported(library, tmp_path / "s", dry_run=True)) == ["already there", "fits", "fits"]
    assert file_bytes(tmp_path / "s") == before


def test_the_same_adapter_twice_in_one_source(copied, tmp_path):
    shutil.copytree(copied / "a", copied / "d")
    rows = imported(copied, tmp_path / "s")
    assert statuses(rows) == ["imported", "imported", "imported", "already there"]
    assert rows[3]["reason"] == f"the same as {copied}/a"
    assert len(stored(tmp_path / "s")) == 3


def test_other_prompts_of_what_is_there_are_not_lost_in_silence(library, tmp_path):
    imported(library / "a", tmp_path / "s")
    (row,) = imported(library / "a", tmp_path / "s", prompts="Say it otherwise.")
    assert row["status"] == "does not fit"
    assert "run polite-s0 is the same with other prompts" in row["reason"]


def test_a_run_that_has_grown_is_not_added_beside_itself(library, tmp_path):
    grown = [line(library / name, step=step) for step, name in enumerate("abc", start=1)]
    ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *grown[:2]), tmp_path / "s")
    rows = ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *grown), tmp_path / "s")
    assert statuses(rows) == ["does not fit"] * 3
    assert "run polite-s0 has steps 1, 2 of it already" in rows[0]["reason"]


# ---- whole or not at all


def test_what_cannot_be_written_leaves_no_run(library, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "finish", full)
        with pytest.raises(OSError, match="no space left"):
            imported(library / "a", tmp_path / "s")
    assert stored(tmp_path / "s") == []
    assert list((tmp_path / "s" / "runs").iterdir()) == []
    assert statuses(imported(library / "a", tmp_path / "s")) == ["imported"]


def test_a_killed_import_is_taken_up_again(library, tmp_path, monkeypatch):
    lines = [line(library / name, step=step) for step, name in enumerate("abc", start=1)]
    source = write_manifest(tmp_path / "m.jsonl", *lines)
    ltdi_peft.import_adapters(source, tmp_path / "whole")

    def killed(writer, step, *args, write=RunWriter.write):
        if step == 3:
            raise KeyboardInterrupt
        write(writer, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", killed)
        patch.setattr(room.shutil, "rmtree", lambda path: None)  # kill -9 tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            ltdi_peft.import_adapters(source, tmp_path / "s")
    (run,) = stored(tmp_path / "s")
    assert (run.status, len(run.snapshots)) == ("recording", 2)
    rows = ltdi_peft.import_adapters(source, tmp_path / "s")
    assert [(row["status"], row["run"]) for row in rows] == [("imported", "polite-s0")] * 3
    (run,), (whole,) = stored(tmp_path / "s"), stored(tmp_path / "whole")
    assert run.finished
    assert [s.path.read_bytes() for s in run.snapshots] == [s.path.read_bytes() for s in whole.snapshots]


def test_one_broken_snapshot_keeps_its_whole_run_out(copied, tmp_path):
    pickled(copied / "b")
    lines = [line(name, step=step) for step, name in enumerate("abc", start=1)]
    source = write_manifest(copied / "m.jsonl", *lines, line("a", task="alone"))
    rows = ltdi_peft.import_adapters(source, tmp_path / "s")
    assert statuses(rows) == ["does not fit", "does not fit", "does not fit", "imported"]
    assert "save_pretrained" in rows[1]["reason"]
    assert all("b of the same run does not fit; repair it" in rows[i]["reason"] for i in (0, 2))


# ---- the command


def failed(capsys, *arguments):
    """The table, and the one line on stderr of a call that ends with status 2."""
    assert main(["import", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    return said.out, said.err.strip()


def test_ltdi_import(copied, tmp_path, capsys):
    pickled(copied / "b")
    store = ["--store", str(tmp_path / "s")]
    source = str(listed(copied, "a", "b", "c"))
    assert main(["import", source, *store, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "task", "step", "run", "status", "reason"]
    assert lines[2].startswith(
        "b     b     1          does not fit  adapter_model.safetensors does not exist"
    )
    assert lines[4:] == ["3 rows", "2 fits, 1 does not fit"]
    assert main(["import", source, *store, "--json"]) == 0
    rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert statuses(rows) == ["imported", "does not fit", "imported"]
    assert main(["inspect", store[1], "--json"]) == 0
    runs = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [(run["run"], run["status"], run["snapshots"]) for run in runs] == [
        ("a-s0", "finished", 1), ("c-s0", "finished", 1),
    ]  # fmt: skip


def test_ltdi_import_of_one_folder(library, tmp_path, capsys):
    options = ["--task", "polite", "--domain", "style", "--base-model", "owner/base"]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["import", str(library / "a"), "--store", str(tmp_path / "s"), *options, *prompts]) == 0
    (run,) = stored(tmp_path / "s")
    assert (run.task.prompts, run.task.domain, run.spec.base_model) == (PROMPTS, "style", "owner/base")


def test_ltdi_import_says_when_nothing_fits(library, tmp_path, capsys):
    out, error = failed(capsys, library, "--store", tmp_path / "s")
    assert out.count("no task prompt says what it is for") == 3
    assert error == f"ltdi import: nothing in {library} fits; the table says why."
    assert "neither a folder nor a Hub repository id" in failed(capsys, "x", "--store", tmp_path / "s")[1]
    assert not (tmp_path / "s").exists()
