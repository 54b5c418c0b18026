"""Encoded trajectories: all that training in weight space needs of a store, in one file.

In: what `ltdi encode` read of a store.  Out: `Encoded`, and one safetensors file that holds it.
Idea: a store is hundreds of MB of adapters; training reads their tokens, the codec that decodes them, and
the tasks' prompts. The file is the codec's own (encode.py) with the tokens beside it and the rest in its
header, so `AdapterCodec.load` reads it too.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from ltdi_peft.config import Recipe
from ltdi_peft.encode import BASIS_DTYPES, HEADER, AdapterCodec
from ltdi_peft.files import read_header, replace_file
from ltdi_peft.task import Task

FORMAT_VERSION = 1
PART = "encoded"  # of the codec's header


@dataclass(frozen=True)
class Runs:
    """Encoded runs: the k local targets of each, the last = final weights, and whose they are."""

    tokens: Float[Tensor, "run k site width"]
    tasks: tuple[str, ...]  # of each run
    seeds: tuple[int, ...]

    def of(self, names: Sequence[str]) -> "Runs":
        """The runs of these tasks, in the order that they had."""
        kept = [index for index, task in enumerate(self.tasks) if task in set(names)]
        tasks, seeds = tuple(self.tasks[i] for i in kept), tuple(self.seeds[i] for i in kept)
        return Runs(self.tokens[kept], tasks, seeds)


@dataclass(frozen=True)
class Encoded:
    """Encoded runs of training tasks, and of validation tasks, which nothing is fitted on."""

    codec: AdapterCodec
    runs: Runs
    held_out: Runs
    tasks: dict[str, Task]  # name, prompts and domain of every task that has a run; no examples
    norm_range: dict[str, tuple[float, float]]  # ‖ΔW‖ per site over the training runs' final adapters


def save_encoded(encoded: Encoded, file: Path, dtype: str) -> None:
    """One safetensors file, tokens as `dtype`; equal contents give equal bytes."""
    with tempfile.TemporaryDirectory() as folder:
        encoded.codec.save(Path(folder) / "codec")
        table, header = load_file(Path(folder) / "codec"), read_header(Path(folder) / "codec", HEADER)
    about: dict[str, Any] = {"format_version": FORMAT_VERSION, "norm_range": encoded.norm_range}
    about["tasks"] = [without_examples(task) for _, task in sorted(encoded.tasks.items())]
    for name, runs in (("runs", encoded.runs), ("held_out", encoded.held_out)):
        about[name] = {"tasks": runs.tasks, "seeds": runs.seeds}
        table[f"tokens.{name}"] = runs.tokens.to(BASIS_DTYPES[dtype]).contiguous()
    metadata = {HEADER: json.dumps({**header, PART: about}, sort_keys=True)}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(table, metadata=metadata))


def without_examples(task: Task) -> dict[str, Any]:
    """A task as JSON, its name, prompts, domain and family alone."""
    return {key: value for key, value in task.to_dict().items() if key not in ("train", "evaluation")}


def load_encoded(file: Path) -> Encoded:
    """The inverse of `save_encoded`; tokens as float32. ValueError for a file that is none, or damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of encoded trajectories; `ltdi encode` writes one.")
    codec = AdapterCodec.load(file)
    about = read_header(file, HEADER).get(PART, {})
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: encoded trajectories have format version {about.get('format_version')!r}, this "
            f"ltdi_peft reads {FORMAT_VERSION}. Write the file again with `ltdi encode`."
        )
    table = load_file(file)
    runs, held_out = (
        Runs(table[f"tokens.{name}"].float(), tuple(about[name]["tasks"]), tuple(about[name]["seeds"]))
        for name in ("runs", "held_out")
    )
    tasks = {one["name"]: Task.from_dict(one, str(file)) for one in about["tasks"]}
    ranges = {site: (float(low), float(high)) for site, (low, high) in about["norm_range"].items()}
    return Encoded(codec, runs, held_out, tasks, ranges)


def recipe_encoded(recipe: Recipe, names: Sequence[str]) -> Encoded:
    """What `train.encoded` names, its training runs cut to the tasks `names`: of others nothing is learnt.

    Raises ValueError for a file of another gauge or another k than the recipe's, and when fewer than two of
    the tasks have a run in it.
    """
    file = Path(str(recipe.train.encoded))
    encoded = load_encoded(file)
    found = {"collect.gauge": encoded.codec.gauge, "diffusion.k": encoded.runs.tokens.shape[1]}
    wanted = {"collect.gauge": recipe.collect.gauge, "diffusion.k": recipe.diffusion.k}
    if odd := [key for key in found if found[key] != wanted[key]]:
        raise ValueError(
            f"{file} was encoded with {odd[0]}: {found[odd[0]]}, the recipe has {wanted[odd[0]]}. Encode the "
            f"store again with this recipe, or change the recipe."
        )
    runs = encoded.runs.of(names)
    if len(set(runs.tasks)) < 2:
        raise ValueError(
            f"{file} holds runs of {len(set(runs.tasks))} training tasks of this recipe, at least 2 are "
            f"needed: it was encoded from another suite."
        )
    return replace(encoded, runs=runs)
