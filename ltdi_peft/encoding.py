"""The runs of a recipe for training: from its store, or from a file of encoded trajectories.

In: a recipe.  Out: what training asks of its runs; and, by `encode_store`, the file that replaces the store.
Idea: whoever has the file trains the same generator at its width without the store, many times larger.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ltdi_peft.collect import recipe_suite
from ltdi_peft.config import Recipe
from ltdi_peft.encoded import Encoded, recipe_encoded, save_encoded
from ltdi_peft.prepare import (
    Prepared,
    encoded_runs,
    encoded_targets,
    require_one_frame,
    runs_with,
    training_trajectories,
)
from ltdi_peft.spec import AdapterSpec, require_same_spec
from ltdi_peft.store import Trajectory, TrajectoryStore

Targets = dict[str, Float[Tensor, "k site width"]]
"""Validation task → its run's encoded local targets."""


def held_out_runs(recipe: Recipe, names: Sequence[str]) -> list[Trajectory]:
    """Finished held-out runs of these tasks, one a task; none where nothing was held out."""
    if not (recipe.held_out_folder / "store.json").is_file():
        return []
    found = TrajectoryStore(recipe.held_out_folder).trajectories()
    return list({run.task.name: run for run in found if run.task.name in set(names)}.values())


def require_runs(recipe: Recipe, names: Sequence[str]) -> None:
    """ValueError unless the store, or the file of encoded trajectories, has runs of these training tasks."""
    if recipe.train.encoded:
        recipe_encoded(recipe, names)
    else:
        training_trajectories(recipe, names)


def require_frame(
    recipe: Recipe, spec: AdapterSpec, names: Sequence[str], held_out: Sequence[Trajectory]
) -> None:
    """SpecMismatchError or ValueError unless all runs are of this adapter and in one frame."""
    if recipe.train.encoded:
        require_same_spec(spec, recipe_encoded(recipe, names).codec.spec, recipe.train.encoded)
        return
    first = training_trajectories(recipe, names)[0]
    require_same_spec(spec, first.spec, str(first.path))
    require_one_frame([first, *held_out], recipe)


def validation_targets(
    recipe: Recipe, prepared: Prepared, held_out: Sequence[Trajectory], names: Sequence[str]
) -> Targets:
    """Of the validation tasks `names` in `train.encoded`, else of the held-out runs."""
    if recipe.train.encoded:
        runs = recipe_encoded(recipe, prepared.data.names).held_out.of(names)
        return dict(zip(runs.tasks, runs.tokens, strict=True))
    tokens = encoded_targets(prepared.codec, held_out, recipe.diffusion.k)
    return dict(zip((run.task.name for run in held_out), tokens, strict=True))


def encode_store(
    recipe: Recipe, out: Path, *, width: int = 60, dtype: str = "float16", progress: bool = True
) -> Encoded:
    """Write the recipe's runs, encoded, to the new file `out`: all that `train.encoded` needs.

    Training tasks' runs, on which the codec of this width is fitted, and one run of every validation task.
    dtype: of bases and tokens. Raises ValueError where `out` exists, and as training would for the runs.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten, remove it or choose another --out.")
    recipe = replace(recipe, codec=replace(recipe.codec, width=width, dtype=dtype))
    suite = recipe_suite(recipe)
    train, validation = ([task.name for task in suite.split(name)] for name in ("train", "validation"))
    runs, held_out = training_trajectories(recipe, train), held_out_runs(recipe, validation)
    require_one_frame([runs[0], *held_out], recipe)
    encoded = encoded_runs(recipe, runs, progress=progress)
    tokens = encoded_targets(encoded.codec, held_out, recipe.diffusion.k)
    tasks = encoded.tasks | {run.task.name: run.task for run in held_out}
    encoded = replace(encoded, held_out=runs_with(tokens, held_out), tasks=tasks)
    save_encoded(encoded, out, dtype)
    return encoded
