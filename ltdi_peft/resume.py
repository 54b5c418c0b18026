"""Resume points of a training session, and what must not change between its two halves.

In: a `Session`.  Out: `<folder>/step-00000500/` (Accelerate's own state files, the averaged weights and
progress.json, written last), and a session that stands where it stood.
Idea: a step depends on (seed, step, unit) and the weights alone, so weights, optimiser and the step's number
are all there is to keep: on a CPU an interrupted and resumed run equals an uninterrupted one bit for bit.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltdi_peft.config import Recipe, to_dict
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.prepare import Prepared
from ltdi_peft.provenance import weights_digest
from ltdi_peft.session import Session
from ltdi_peft.strict import differing

PROGRESS_FILE, AVERAGE_FILE = "progress.json", "average.safetensors"
KEPT = 2  # newest resume points that stay
# Fields that change nothing in the trained weights, so that they may change between the two halves of a run.
FREE_SECTIONS = ("name", "output", "collect", "evaluate")
# (`encoded` and `origin`: the digests below tell other tokens and another adapter apart.)
FREE_TRAIN = ("log_every", "log_with", "validate_every", "checkpoint_every", "encoded", "origin")


def made_from(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What the weights depend on, as JSON: fields of the recipe, a digest of tokens and conditions."""
    table = {key: value for key, value in to_dict(recipe).items() if key not in FREE_SECTIONS}
    table["train"] = {key: value for key, value in table["train"].items() if key not in FREE_TRAIN}
    digest = hashlib.sha256()
    for tensor in (prepared.data.tokens, prepared.data.conditions):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    made = {"recipe": json.loads(json.dumps(table)), "collected runs": digest.hexdigest()[:16]}
    # (One that is trained on has a plan of its own, which names where it began.)
    if recipe.train.origin and not recipe.train.origin_steps and prepared.codec.origin:
        made["origin"] = weights_digest(prepared.codec.origin)
    return made


def save_point(session: Session, folder: Path) -> None:
    """A resume point, complete once its `progress.json` is there. Every process must call it."""
    accelerator, target = session.accelerator, folder / f"step-{session.done:08d}"
    accelerator.save_state(str(target))
    if session.sharded or accelerator.is_main_process:
        average = {str(index): local(mean).cpu() for index, mean in enumerate(session.average)}
        save_file(average, target / average_file(session))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        about = {"step": session.done, "losses": session.losses}
        about["made_from"] = made_from(session.recipe, session.prepared)
        replace_file(target / PROGRESS_FILE, json_bytes(about))
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest_point(folder: Path, made: dict[str, Any]) -> Path | None:
    """The newest complete resume point; ValueError names in what it differs from `made`."""
    complete = sorted(folder.glob(f"step-*/{PROGRESS_FILE}"))
    if not complete:
        return None
    point = complete[-1].parent
    if changed := differing(read_json(complete[-1])["made_from"], made):
        raise ValueError(
            f"{point} was made with other {changed}. Remove {folder} to train again, or give the run another "
            f"`output`."
        )
    return point


def resume(session: Session, folder: Path) -> None:
    """Go on from the newest complete resume point, if any. ValueError names what has changed since."""
    point = newest_point(folder, made_from(session.recipe, session.prepared))
    if point is None:
        return
    about = read_json(point / PROGRESS_FILE)
    session.accelerator.load_state(str(point))
    average = load_file(point / average_file(session))
    for index, mean in enumerate(session.average):
        local(mean).copy_(average[str(index)])
    session.done = about["step"]
    session.losses = [(int(step), float(loss)) for step, loss in about["losses"]]


def average_file(session: Session) -> str:
    """Replicated averages are the same in every process; shards are each process's own."""
    return f"{session.accelerator.process_index}-{AVERAGE_FILE}" if session.sharded else AVERAGE_FILE


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight: all of it, unless FSDP shards it."""
    from torch.distributed.tensor import DTensor  # slow to import, and needed only at a resume point

    return weight.to_local() if isinstance(weight, DTensor) else weight
