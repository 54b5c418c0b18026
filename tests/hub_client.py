"""What a user does with the Hub, in a process of its own; prints one JSON object of what came of it.

Arguments: the folder of the base model, the generator, the store, and a folder to write to.
"""

import contextlib
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import HfApi

import ltdi_peft
from ltdi_peft.cli import main
from ltdi_peft.refine import refine

base, generator, runs, out = map(Path, sys.argv[1:])
PROMPT, IDS = "please a second twice", torch.tensor([[10, 13, 17, 20, 21, 5, 6]])
found = {}


def refused(name, function, *arguments, **options):
    """What a call that must fail says."""
    try:
        function(*arguments, **options)
    except (OSError, ValueError) as error:
        found[name] = f"{type(error).__name__}: {error}"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.tolist()


def cli(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main(list(map(str, arguments)))
    return status, said.getvalue()


HfApi().create_repo("me/base", private=False)
HfApi().upload_folder(repo_id="me/base", folder_path=base)

# A generator, from its folder, under a bare name; generate from its repository, pinned
pushed = ltdi_peft.push(generator, "gen", base_model="me/base", license="apache-2.0")
found["generator"] = asdict(pushed)
options = {"generator": "me/gen", "revision": pushed.revision, "device": "cpu", "dtype": "float32"}
model = ltdi_peft.generate_adapter(PROMPT, **options)
found["logits"] = logits(model)
again = ltdi_peft.Generator.from_pretrained("me/gen")
found["url"] = again.push_to_hub("me/gen2", branch="v1")
same = ltdi_peft.Generator.from_pretrained("me/gen2", revision="v1")
found["same generator"] = same.config == again.config and all(
    torch.equal(x, y) for x, y in zip(same.state_dict().values(), again.state_dict().values(), strict=True)
)

# An adapter: its model, what generate() returns, its folder
first = ltdi_peft.push(model, "me/french", store=runs)
found["adapter"] = asdict(first)
refused("again", ltdi_peft.push, model, "me/french")
refused("generator again", again.push_to_hub, "me/french")
(made,) = again.generate([PROMPT], seed=5, base=ltdi_peft.base.load_base("me/base", dtype="float32"))
made.save_pretrained(out / "made")
branch = ltdi_peft.push(made, "me/french", revision="v2")
refine(model, [("w0 w1 w2", "w1 w1")], steps=1)
second = ltdi_peft.push(model, "me/french", overwrite=True, message="Refined")
found["commits"] = [first.revision, branch.revision, second.revision]
model.save_pretrained(out / "saved")
found["cli"] = cli("push", out / "saved", "me/cli", "--public", "--json")
(out / "saved" / "README.md").write_text("---\ntags: [lora]\n---\nMy own page.\n")
found["cli text"] = cli("push", out / "saved", "me/own")
model.push_to_hub("me/peft", private=True)

# A store
found["store"] = asdict(ltdi_peft.push(runs, "me/runs", base_model="me/base"))

# What cannot be done
refused("local base", ltdi_peft.push, generator, "me/local")
refused("local base of a store", ltdi_peft.push, runs, "me/local")
refused(
    "local base of a loaded generator", ltdi_peft.Generator.from_pretrained(generator).push_to_hub, "me/g"
)
refused("public", ltdi_peft.push, made, "me/base", overwrite=True)
refused("wrong token", ltdi_peft.push, made, "me/new", token="hf_wrong")
refused("wrong token to read", ltdi_peft.Generator.from_pretrained, "me/gen", revision="v9", token="hf_wrong")
refused("bare name", ltdi_peft.push, made, "new", token="hf_wrong")
refused("read token", ltdi_peft.push, made, "me/new", token="hf_me_read")
refused("other owner", ltdi_peft.push, made, "other/new")
refused("bad name", ltdi_peft.push, made, "a/b/c")
refused("not there", ltdi_peft.Generator.from_pretrained, "me/nothing")
refused("store not there", ltdi_peft.TrajectoryStore.from_hub, "me/nothing")
refused("not a store", ltdi_peft.TrajectoryStore.from_hub, "me/gen")
refused("no revision", ltdi_peft.TrajectoryStore.from_hub, "me/runs", revision="v7")
refused("others' private", ltdi_peft.TrajectoryStore.from_hub, "me/runs", revision="main", token="hf_other")
refused("raced", ltdi_peft.push, made, "me/raced")
refused("corrupted", ltdi_peft.push, made, "me/corrupt")
sys.stdout.write(json.dumps(found))
