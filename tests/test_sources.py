"""Where adapters are found: what Trainer leaves behind, manifests with mistakes, a Hub asked over HTTP."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_hub import TinyHub, item, serving
from tiny_peft_library import LORA, edit_config, line, make_peft, save_base, save_lora, write_manifest
from tiny_world import run
from transformers import Trainer, TrainingArguments

import ltdi_peft
from ltdi_peft.sources import Hub, Line, find_candidates
from ltdi_peft.store import TrajectoryStore

SLUG = "owner/polite-adapters-0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def library(base, tmp_path_factory):
    """Two adapters: a, b. Read only."""
    folder = tmp_path_factory.mktemp("library")
    for seed, name in enumerate("ab"):
        save_lora(base, folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """What a Trainer's output_dir holds after twelve steps and `save_model`. Read only."""
    folder = tmp_path_factory.mktemp("trainer")
    args = TrainingArguments(
        str(folder), max_steps=12, save_steps=4, logging_steps=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", per_device_train_batch_size=2, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": [5 + i, 6, 7, 8], "labels": [5 + i, 6, 7, 8]} for i in range(24)]
    trainer = Trainer(make_peft(base, trained=False, **LORA), args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    return folder


def found(source, task="", prompts=("Say it politely.",), hub=Hub()):  # noqa: B008 (frozen)
    return find_candidates(str(source), Line(task=task, prompts=prompts), hub)


def stored(folder):
    return TrajectoryStore(folder, create=False).trajectories(finished_only=False)


# ---- Trainer


def test_checkpoints_are_one_trajectory_in_step_order(trained, tmp_path):
    """12 comes after 8, though "checkpoint-12" sorts before; the adapter beside them is the last of them."""
    rows = ltdi_peft.import_adapters(trained, tmp_path / "s", task="polite", prompts="Say it politely.")
    assert [(row["step"], row["run"], row["status"]) for row in rows] == [
        (step, "polite-s0", "imported") for step in (4, 8, 12)
    ]
    (one,) = stored(tmp_path / "s")
    assert [(s.step, s.progress) for s in one.snapshots] == [(4, 4 / 12), (8, 8 / 12), (12, 1.0)]
    for snapshot in one.snapshots:
        expected = load_file(trained / f"checkpoint-{snapshot.step}" / "adapter_model.safetensors")
        for site, (a, b) in one.adapter(snapshot).items():
            assert torch.equal(a, expected[f"base_model.model.{site}.lora_A.weight"])
            assert torch.equal(b, expected[f"base_model.model.{site}.lora_B.weight"])


def test_loss_and_learning_rate_are_what_trainer_logged(trained, tmp_path):
    ltdi_peft.import_adapters(trained, tmp_path / "s", task="polite", prompts="Say it politely.")
    history = json.loads((trained / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: (entry["loss"], entry["learning_rate"]) for entry in history}
    (one,) = stored(tmp_path / "s")
    assert {s.step: (s.loss, s.learning_rate) for s in one.snapshots} == {s: logged[s] for s in (4, 8, 12)}
    assert len(set(logged.values())) == 6


def test_without_trainer_state_nothing_is_known_of_the_loss(trained, tmp_path):
    tree = shutil.copytree(trained, tmp_path / "t", ignore=shutil.ignore_patterns("trainer_state.json"))
    ltdi_peft.import_adapters(tree, tmp_path / "s", task="polite", prompts="Say it politely.")
    assert {(s.loss, s.learning_rate) for s in stored(tmp_path / "s")[0].snapshots} == {(None, None)}


def test_a_broken_trainer_state_is_named(trained, tmp_path):
    place = shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-8")
    (place / "trainer_state.json").write_text("{")
    (row,) = ltdi_peft.import_adapters(place, tmp_path / "s", task="polite", prompts="Say it politely.")
    assert (row["status"], row["step"]) == ("does not fit", 8)
    assert "trainer_state.json cannot be read as JSON" in row["reason"]


def test_another_adapter_beside_the_checkpoints_is_reported(trained, tmp_path):
    tree = shutil.copytree(trained, tmp_path / "t")
    shutil.copy(tree / "checkpoint-4" / "adapter_model.safetensors", tree)
    rows = ltdi_peft.import_adapters(tree, tmp_path / "s", task="polite", prompts="Say it politely.")
    assert [row["status"] for row in rows] == ["imported"] * 3 + ["does not fit"]
    assert "differs from checkpoint-12, and its step is unknown" in rows[3]["reason"]


def test_trees_below_a_folder_are_runs_of_the_task(trained, tmp_path):
    for name in ("seed-0", "seed-1"):
        shutil.copytree(trained, tmp_path / "all" / name)
    made = found(tmp_path / "all", "polite")
    assert [(c.path, c.run, c.step) for c in made] == [
        (f"{tmp_path}/all/{name}/checkpoint-{step}", f"{tmp_path}/all/{name}", step)
        for name in ("seed-0", "seed-1")
        for step in (4, 8, 12)
    ]


# ---- folders


def test_a_folder_names_its_task(library):
    (one,) = found(library / "a")
    assert (one.task.name, one.step, one.trouble) == ("a", 1, "")


def test_prompts_are_not_given_to_several_tasks(library):
    with pytest.raises(ValueError, match=r"holds 2 runs, and prompts belong to one task: .* manifest"):
        found(library)
    assert [one.task.name for one in found(library, "polite")] == ["polite", "polite"]


def test_without_prompts_the_files_are_still_read(library, tmp_path):
    """A dry run over a folder says first which adapters are of no use anyway."""
    own = shutil.copytree(library, tmp_path / "library")
    edit_config(own / "b", use_dora=True)
    rows = ltdi_peft.import_adapters(own, tmp_path / "s", dry_run=True)
    assert [row["reason"].partition(":")[0] for row in rows] == [
        "no task prompt says what it is for; give one, or list it in a JSONL manifest.",
        "adapter_config.json",
    ]


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter"):
        found(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"is no \.jsonl manifest; of a single adapter, name its folder"):
        found(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository id"):
        found(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"'no/where' is no folder.*off by HF_HUB_OFFLINE"):
        found("no/where")
    with pytest.raises(OSError, match="can only be read from the Hub"):
        found(SLUG)


# ---- manifests


def test_lines_of_one_task_and_run_are_a_trajectory(library, tmp_path):
    made = [
        line(library / "b", step=20), line(library / "a", step=10),
        line(library / "a", step=7, run="second"), line(library / "a", task="other"),
    ]  # fmt: skip
    ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *made[:2], made[3]), tmp_path / "s")
    assert {one.run_id: [s.step for s in one.snapshots] for one in stored(tmp_path / "s")} == {
        "polite-s0": [10, 20],
        "other-s0": [1],
    }
    rows = ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *made), tmp_path / "t")
    assert [row["run"] for row in rows] == ["polite-s0", "polite-s0", "polite-s1", "other-s0"]


def test_paths_are_relative_to_the_manifest(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(library, tmp_path / "deep" / "adapters")
    write_manifest(tmp_path / "deep" / "m.jsonl", line("adapters/a"))
    (one,) = found("deep/m.jsonl", prompts=())
    assert (one.path, one.folder.resolve()) == ("adapters/a", tmp_path / "deep" / "adapters" / "a")


def test_a_line_may_be_a_tree(trained, tmp_path):
    made = found(write_manifest(tmp_path / "m.jsonl", line(trained, run="first")), prompts=())
    assert [(one.run, one.step) for one in made] == [("first", 4), ("first", 8), ("first", 12)]
    made = found(write_manifest(tmp_path / "m.jsonl", line(trained, step=3)), prompts=())
    assert all("the 3 checkpoints in it have steps of their own, but step 3" in one.trouble for one in made)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("{", "m.jsonl:2: not valid JSON"),
        ("[]", "m.jsonl:2: expected a JSON object"),
        ('{"pth": "a"}', "m.jsonl:2 has unknown keys ['pth']; known keys are ['domain', 'path', 'prompts'"),
        ('{"path": "a", "task": "t", "prompts": "p"}', "m.jsonl:2: prompts: expected a list, got 'p'"),
        (
            '{"path": "a", "task": "t", "prompts": ["p"], "step": "1"}',
            "m.jsonl:2: step: expected int or null",
        ),
        (
            '{"path": "a", "task": "t", "prompts": ["p"], "step": -1}',
            "step is -1; optimiser steps count from 1",
        ),
        ('{"path": "a", "task": "t", "prompts": []}', "no task prompt says what it is for"),
        ('{"path": "a", "prompts": ["p"]}', "a task needs a non-blank name"),
        ('{"task": "t", "prompts": ["p"]}', "'' is neither a folder nor a Hub repository id"),
    ],
)
def test_a_bad_line_spoils_only_itself(library, tmp_path, text, trouble):
    own = shutil.copytree(library, tmp_path / "library")
    (own / "m.jsonl").write_text(f"{json.dumps(line('a'))}\n{text}\n\n{json.dumps(line('b', task='b'))}")
    rows = ltdi_peft.import_adapters(own / "m.jsonl", tmp_path / "s")
    assert [row["status"] for row in rows] == ["imported", "does not fit", "imported"]
    assert rows[1]["reason"].startswith(trouble)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({}, "2 adapters of one run have step 1: give each its `step`, or its own `run`"),
        ({"step": 2, "prompts": ["Other."]}, "the snapshots of one run must have one task"),
    ],
)
def test_lines_that_are_no_run(library, tmp_path, second, reason):
    lines = line(library / "a"), line(library / "b", **second)
    rows = ltdi_peft.import_adapters(write_manifest(tmp_path / "m.jsonl", *lines), tmp_path / "s")
    assert [row["status"] for row in rows] == ["does not fit"] * 2
    assert all(row["reason"].startswith(reason) for row in rows)


def test_a_start_alone_is_no_run(library, tmp_path):
    source = write_manifest(tmp_path / "m.jsonl", line(library / "a", step=0))
    (row,) = ltdi_peft.import_adapters(source, tmp_path / "s")
    assert row["reason"].startswith("step 0 is the start of a run")


def test_manifests_refuse(library, tmp_path):
    source = write_manifest(tmp_path / "m.jsonl", line(library / "a"))
    with pytest.raises(ValueError, match="its lines name task and prompts, so give neither"):
        found(source)
    with pytest.raises(ValueError, match=r'm\.jsonl is empty; a line is \{"path"'):
        found(write_manifest(tmp_path / "m.jsonl"), prompts=())


# ---- the Hub, over HTTP

HUB_PROGRAM = """
import json, sys, ltdi_peft
for source, prompts in json.loads(sys.argv[1]):
    try:
        said = ltdi_peft.import_adapters(source, sys.argv[2], prompts=prompts)
    except (OSError, ValueError) as error:
        said = str(error)
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def asked(library, tmp_path_factory):
    """A hub, and what a process that may ask it (and no other) got for each source, into one store."""
    folder = tmp_path_factory.mktemp("hub")
    own = shutil.copytree(library, folder / "repositories")
    (own / "a" / "optimizer.pt").write_bytes(b"a pickle")
    shutil.copytree(own / "b", own / "dora")
    edit_config(own / "dora", use_dora=True)
    lines = [line("owner/b", "b", ["Say b."]), line("owner/a@main", "again"), line(library / "a", "third")]
    manifest = write_manifest(folder / "m.jsonl", *lines)
    sources = [
        [SLUG, []], ["owner/b", ["Say b."]], [str(manifest), []],
        ["owner/none", []], ["owner/other-0123456789abcdef01234567", []], ["owner/no-" + "0" * 24, []],
    ]  # fmt: skip
    with serving(TinyHub({f"owner/{name}": own / name for name in ("a", "b", "dora")})) as hub:
        noted = [item("owner/a", "Say a."), item("owner/dora", "x"), item("owner/none", "x")]
        hub.collections["owner/no-" + "0" * 24] = []
        hub.collections[SLUG] = [*noted, item("owner/b"), item("owner/rows", kind="dataset")]
        about = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
        said = run("-c", HUB_PROGRAM, json.dumps(sources), folder / "s", **about)
    assert said.returncode == 0, said.stderr
    answers = [json.loads(text) for text in said.stdout.splitlines()]
    return hub, folder / "s", *answers


def test_a_collection(asked):
    """One task an item, and the item's note is its prompt; what does not fit is reported."""
    hub, _, rows, *_ = asked
    assert [row["status"] for row in rows] == ["imported"] + ["does not fit"] * 4
    assert rows[0]["path"] == f"owner/a@{hub.commit('owner/a')[:12]}"
    assert [row["task"] for row in rows[:2]] == ["a", "dora"]
    assert "use_dora=True" in rows[1]["reason"]
    assert "Repository Not Found" in rows[2]["reason"]
    assert "no task prompt" in rows[3]["reason"]
    assert rows[4]["reason"] == "owner/rows is a dataset, not an adapter."


def test_a_repository_and_a_manifest_of_repositories(asked):
    _, store, _, one, manifest, *_ = asked
    assert [row["status"] for row in one] == ["imported"]
    assert [row["status"] for row in manifest] == ["already there", "imported", "imported"]
    tasks = {run.task.name: run.task.prompts for run in stored(store)}
    polite = ("Say it politely.",)
    assert tasks == {"a": ("Say a.",), "b": ("Say b.",), "again": polite, "third": polite}


def test_only_weights_and_their_configuration_are_fetched(asked):
    fetched = {path.rpartition("/")[2] for path in asked[0].asked if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    assert "optimizer.pt" in asked[0].files("owner/a")


def test_what_the_hub_does_not_have(asked):
    *_, repository, collection, empty = asked
    assert empty == "collection 'owner/no-000000000000000000000000' is empty."
    assert "'owner/none' is no folder, and no repository on the Hub or in its cache: 404" in repository
    assert collection.startswith("no collection 'owner/other-0123456789abcdef01234567' on the Hub: ")
    assert "404" in collection
