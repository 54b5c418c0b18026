"""The Hub over real HTTP: an unpatched client in other processes, a server here that checks what arrives."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import running_hub
from torch.testing import assert_close

from ltdi_peft.cards import MARK
from ltdi_peft.publish import tells_of_machine
from ltdi_peft.store import TrajectoryStore

HERE = Path(__file__).parent
PROMPT = "please a second twice"
PROGRAMS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = PROGRAMS.findall((HERE.parent / "docs" / "hub.md").read_text())


def client(hub, home, *command, **variables):
    """A Python program with its own Hub cache, online; its standard output."""
    online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    online |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_me"}
    online |= {"OMP_NUM_THREADS": "1", "LTDI_CACHE": str(home / "ltdi"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, cwd=HERE.parent, env=online | variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        server.corrupt.add("me/corrupt")
        server.raced.add("me/raced")
        yield server


@pytest.fixture(scope="module")
def generator_folder(world, tmp_path_factory):
    """With the scores that `ltdi evaluate` would have left in it."""
    folder = tmp_path_factory.mktemp("published") / "generator"
    shutil.copytree(world.recipe.generator_folder, folder)
    row = {"tasks": 3, "accuracy": 0.5, "G": 0.25, "ci": [0.125, 0.375]}
    table = {"recipe": "tiny", "methods": {"base": {"unseen_tasks": row}, "ours": {"unseen_tasks": row}}}
    (folder / "evaluation.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What hub_client.py wrote: `saved`, by PEFT, and `made`, by a `GeneratedAdapter`."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(hub, world, generator_folder, out, tmp_path_factory):
    """What hub_client.py printed."""
    home = tmp_path_factory.mktemp("home")
    arguments = (world.base, generator_folder, world.recipe.store_folder, out)
    return json.loads(client(hub, home, HERE / "hub_client.py", *arguments).splitlines()[-1])


def files(hub, name, revision="main", kind="model"):
    repo = hub.repos[kind, name]
    return repo.commits[repo.at(revision)]


def page(hub, name, revision="main", kind="model"):
    """Front matter and text of README.md."""
    _, head, text = files(hub, name, revision, kind)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def program(text):
    (found,) = PROGRAMS.findall(text)
    return found


# ---- what arrived


def test_an_adapter_arrives_whole_and_private(hub, found):
    repo = hub.repos["model", "me/french"]
    assert repo.private
    assert found["adapter"]["private"]
    assert found["adapter"]["files"] == 4
    first = files(hub, "me/french", found["adapter"]["revision"])
    assert set(first) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    }
    assert json.loads(first["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert found["adapter"]["url"] == f"{hub.url}/me/french/commit/{found['adapter']['revision']}"


def test_everything_is_private_unless_asked_for(hub, found):
    public = {name for (_, name), repo in hub.repos.items() if not repo.private}
    assert public == {"me/base", "me/cli"}  # the first by the Hub's own client, the second with --public


def test_the_page_of_a_generated_adapter(hub, found):
    head, text = page(hub, "me/french", found["adapter"]["revision"])
    assert head == {
        "base_model": "me/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:me/base", "lora", "ltdi_peft", "transformers", "generated-adapter"],
    }
    assert f"> {PROMPT}" in text
    pin = found["generator"]["revision"]
    assert f"| generator | `me/gen` on the Hub, revision `{pin}` |" in text
    assert re.search(r"\| seed, guidance scale \| 0, [\d.]+ \|", text)
    assert re.search(r"\| nearest of 5 training tasks \| `a/.*`, cosine 0\.\d\d of the task prompts \|", text)
    assert re.search(r"\| nearest training adapter \| a run of `\w/\w+/\w+`, .* = \d\.\d{3} \|", text)
    assert "| `ours` | 0.50, 0.25 [0.12, 0.38] |" in text
    assert "## What it cannot do" in text
    assert "changed after" not in text


def test_weights_that_moved_after_generation_are_said_to(hub, found):
    _, text = page(hub, "me/french")
    assert "**The weights were changed after they were generated**" in text
    assert hub.repos["model", "me/french"].messages == [
        "initial commit",
        "Push with ltdi_peft",
        "Push with ltdi_peft",
        "Refined",
    ]


def test_provenance_survives_peft_saving_and_pushing_the_model(hub, found):
    """`model.save_pretrained` then `ltdi push`; and PEFT's own `model.push_to_hub`."""
    status, said = found["cli"]
    assert status == 0
    assert json.loads(said)["repo_id"] == "me/cli"
    assert json.loads(said)["revision"] == hub.repos["model", "me/cli"].branches["main"]
    assert f"> {PROMPT}" in page(hub, "me/cli")[1]
    own = files(hub, "me/peft")
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(own)
    assert json.loads(own["provenance.json"])["task_prompt"] == PROMPT
    assert own["adapter_model.safetensors"] == files(hub, "me/cli")["adapter_model.safetensors"]


def test_a_page_that_the_user_wrote_is_kept(hub, found):
    status, said = found["cli text"]
    assert status == 0
    assert said.startswith("private model me/own: http")
    assert page(hub, "me/own") == ({"tags": ["lora"]}, "My own page.\n")


def test_the_page_of_a_generator(hub, found):
    head, text = page(hub, "me/gen")
    assert head["base_model"] == "me/base"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "ltdi_peft"
    assert 'generator="me/gen")' in program(text)
    assert "| `ours` | 0.50, 0.25 [0.12, 0.38] |" in text
    assert json.loads(files(hub, "me/gen")["config.json"])["base_model"] == "me/base"
    assert "evaluation.json" in files(hub, "me/gen2", "v1")
    assert 'generator="me/gen2", revision="v1")' in program(page(hub, "me/gen2", "v1")[1])
    assert set(files(hub, "me/gen2")) == {".gitattributes"}
    assert found["url"].startswith(f"{hub.url}/me/gen2/commit/")
    assert found["same generator"]


def test_the_page_of_a_store(hub, found, world):
    head, text = page(hub, "me/runs", kind="dataset")
    assert head["base_model"] == "me/base"
    assert head["viewer"] is False
    runs = TrajectoryStore(world.recipe.store_folder).trajectories()
    snapshots = sum(len(run.snapshots) for run in runs)
    assert f"| runs, tasks, snapshots | {len(runs)}, 5, {snapshots} |" in text
    assert "| start | one for all runs |" in text
    assert "| never trained | lora_A |" in text
    assert "| gauge to learn in | `shared_a` |" in text
    assert "Licence: none was given." in text
    assert found["store"]["repo_type"] == "dataset"


def test_nothing_pushed_tells_of_this_machine(hub, found, world):
    ours = [(name, kind) for kind, name in hub.repos if name != "me/base"]
    assert len(ours) > 5
    for name, kind in ours:
        for path, data in files(hub, name, kind=kind).items():
            assert str(world.folder).encode() not in data, f"{name}: {path}"


def test_what_a_run_tells_of_its_machine():
    assert tells_of_machine("host", "laptop")
    assert tells_of_machine("output_dir", "/home/me/out")
    assert not tells_of_machine("started_at", "2026-01-01T00:00:00")
    assert not tells_of_machine("step", 3)


# ---- read back, in a process that has seen nothing

READ_BACK = """
import json, os, sys, torch
from huggingface_hub import snapshot_download
programs = json.load(open(sys.argv[1]))
ids = torch.tensor([[10, 13, 17, 20, 21, 5, 6]])
found = {}
names = {}
exec(programs["adapter"], names)
with torch.no_grad():
    found["logits"] = names["model"](ids).logits.tolist()
found["alone"] = not any(name.startswith("ltdi_peft") for name in sys.modules)
from peft import PeftModel
from transformers import AutoModelForCausalLM
for key, revision in json.loads(sys.argv[2]).items():
    base = AutoModelForCausalLM.from_pretrained("me/base")
    model = PeftModel.from_pretrained(base, "me/french", revision=revision)
    with torch.no_grad():
        found[key] = model(ids).logits.tolist()
os.chdir(sys.argv[3])
names = {}
exec(programs["folder"], names)
with torch.no_grad():
    found["folder"] = names["model"](ids).logits.tolist()
names = {}
exec(programs["store"], names)
run = names["store"].trajectories()[0]
found["runs"] = [[r.run_id, len(r.snapshots), r.spec.base_model] for r in names["store"].trajectories()]
found["factor"] = run.adapter(run.snapshots[-1])[run.spec.sites[0].name][1].tolist()
names = {}
exec(programs["generator"], names)
found["french"] = sorted(os.listdir("french"))
snapshot_download("me/gen", local_dir="runs/mine/generator")
snapshot_download("me/runs", repo_type="dataset", local_dir="runs/mine/trajectories")
for program in programs["docs"]:
    exec(program, {})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read(hub, found, out, tmp_path_factory):
    """Every printed program, and those of docs/hub.md, run as printed."""
    home = tmp_path_factory.mktemp("fresh")
    programs = {
        "adapter": program(page(hub, "me/french", found["commits"][0])[1]),
        "folder": program((out / "made" / "README.md").read_text()),
        "docs": DOCS,
        "store": program(page(hub, "me/runs", kind="dataset")[1]),
        "generator": program(page(hub, "me/gen")[1]),
    }
    (home / "programs.json").write_text(json.dumps(programs))
    revisions = json.dumps({"pinned": found["commits"][0], "branch": "v2"})
    said = client(hub, home, "-c", READ_BACK, home / "programs.json", revisions, out / "made")
    return json.loads(said.splitlines()[-1])


def test_the_adapter_loads_by_its_printed_program_with_peft_alone(found, read):
    assert read["alone"]
    assert_close(torch.tensor(read["pinned"]), torch.tensor(found["logits"]), rtol=1e-5, atol=1e-6)


def test_a_pinned_revision_is_what_was_pushed_then(read):
    """main was overwritten by a refined adapter, v2 holds one of another seed."""
    assert not torch.equal(torch.tensor(read["pinned"]), torch.tensor(read["logits"]))
    assert read["pinned"] != read["branch"]


def test_a_folder_loads_by_its_printed_program(read):
    """It is the adapter that branch v2 holds."""
    assert read["folder"] == read["branch"]


def test_the_programs_of_the_docs_run(hub, read):
    assert len(DOCS) == 3
    assert set(files(hub, "me/polite-generator")) > {"config.json", "README.md"}
    assert "a run of `" in page(hub, "me/french-adapter")[1]
    assert page(hub, "me/polite-runs", kind="dataset")[0]["license"] == "cc-by-4.0"


def test_a_store_reads_back_the_same(read, world):
    runs = TrajectoryStore(world.recipe.store_folder).trajectories()
    assert read["runs"] == [[run.run_id, len(run.snapshots), "me/base"] for run in runs]
    last = runs[0].adapter(runs[0].snapshots[-1])[runs[0].spec.sites[0].name][1]
    assert read["factor"] == last.tolist()


def test_the_generator_generates_by_its_printed_program(read):
    assert read["french"] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]


# ---- what is refused, and how it is said

SENTENCES = {
    "again": r"FileExistsError: me/french holds 4 files at main already, first README\.md; nothing was "
    r"uploaded\. Choose another name or revision, or pass overwrite=True",
    "generator again": r"FileExistsError: me/french holds 4 files at main already",
    "local base": r"ValueError: the base model is '/.*', a folder of this machine.*base_model='owner/name'",
    "local base of a store": r"ValueError: the base model is '/.*', a folder of this machine",
    "local base of a loaded generator": r"ValueError: the base model is '/.*', a folder of this machine",
    "public": r"ValueError: me/base exists and is public: .* or pass private=False \(--public\)",
    "wrong token": r"PermissionError: me/new: http.* does not accept the token, .*`hf auth login`",
    "wrong token to read": r"PermissionError: me/gen: http.* does not accept the token",
    "bare name": r"PermissionError: new: http.* does not accept the token",
    "read token": r"PermissionError: me/new: this token may not write there; use one with write access",
    "other owner": r"PermissionError: other/new: this token may not write there",
    "bad name": r"FileNotFoundError: 'a/b/c' is no repository id; expected 'owner/name'",
    "not there": r"FileNotFoundError: no generator 'me/nothing': no such folder, and not on the Hub .*"
    r"me/nothing does not exist on http.*Train one",
    "store not there": r"FileNotFoundError: me/nothing does not exist on http.*or is private",
    "not a store": r"FileNotFoundError: me/gen does not exist on http",
    "no revision": r"FileNotFoundError: me/runs has no revision 'v7': pass a branch, tag or commit",
    "others' private": r"FileNotFoundError: me/runs does not exist on http.*, or is private",
    "raced": r"OSError: me/raced was changed by somebody else meanwhile; nothing was committed\. Push again",
    "corrupted": r"OSError: me/corrupt: Error while uploading 'adapter_model\.safetensors' to the Hub\. The "
    r"Hub said: the content's sha256 is not the one that was announced\. Not all of it is there: push again",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_refusal_is_one_sentence(found, name):
    assert re.match(SENTENCES[name], found[name]), found[name]
    assert "\n" not in found[name]


def test_what_was_refused_left_nothing(hub, found):
    assert {name for _, name in hub.repos}.isdisjoint({"me/local", "me/g", "me/new", "other/new"})
    assert set(files(hub, "me/corrupt")) == {".gitattributes"}
    assert set(files(hub, "me/raced")) == {".gitattributes", "theirs.txt"}
    assert [name for name, _ in hub.large if name == "me/corrupt"] == []
    assert "README.md" not in files(hub, "me/base")


def test_the_mark_is_on_every_page_of_ours(hub, found):
    pages = [("me/french", "model"), ("me/gen", "model"), ("me/runs", "dataset")]
    assert all(MARK in page(hub, name, kind=kind)[1] for name, kind in pages)
