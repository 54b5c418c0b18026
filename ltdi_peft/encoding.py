"""The runs of a recipe for training: from its store, or from a file of encoded trajectories.

In: a recipe.  Out: what training asks of its runs; and, by `encode_store`, the file that replaces the store.
Idea: whoever has the file trains the same generator at its width without the store, many times larger.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ltdi_peft.collect import recipe_suite
from ltdi_peft.config import Recipe
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.encoded import Encoded, Runs, recipe_encoded, save_encoded
from ltdi_peft.prepare import (
    Prepared,
    encoded_runs,
    encoded_targets,
    least_and_largest,
    require_one_frame,
    runs_with,
    training_trajectories,
)
from ltdi_peft.spec import Adapter, AdapterSpec, moved, require_same_spec, site_norms
from ltdi_peft.store import Trajectory, TrajectoryStore

Targets = dict[str, Float[Tensor, "k site width"]]
"""Validation task → its run's encoded local targets."""


def held_out_runs(recipe: Recipe, names: Sequence[str]) -> list[Trajectory]:
    """Finished held-out runs of these tasks, one a task; none where nothing was held out."""
    if not (recipe.held_out_folder / "store.json").is_file():
        return []
    found = TrajectoryStore(recipe.held_out_folder).trajectories()
    return list({run.task.name: run for run in found if run.task.name in set(names)}.values())


def tasks_with_runs(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Those of the training tasks `names` that the store, or the file of encoded trajectories, has runs of.

    Sorted; nothing is encoded for it. ValueError for fewer than two.
    """
    if recipe.train.encoded:
        return sorted(set(recipe_encoded(recipe, names).runs.tasks))
    return sorted({run.task.name for run in training_trajectories(recipe, names)})


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
    recipe: Recipe,
    out: Path,
    *,
    width: int = 60,
    dtype: str = "float16",
    onto: Path | None = None,
    progress: bool = True,
) -> Encoded:
    """Write the recipe's runs, encoded, to the new file `out`: all that `train.encoded` needs.

    Training tasks' runs, on which the codec of this width is fitted, and one run of every validation task.
    dtype: of bases and tokens. onto: encoded runs of a first round, which this recipe's are a second one of
    (`second_round`). Raises ValueError where `out` exists, and as training would for the runs.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten, remove it or choose another --out.")
    recipe = replace(recipe, codec=replace(recipe.codec, width=width, dtype=dtype))
    suite = recipe_suite(recipe)
    train, validation = ([task.name for task in suite.split(name)] for name in ("train", "validation"))
    runs, held_out = training_trajectories(recipe, train), held_out_runs(recipe, validation)
    require_one_frame([runs[0], *held_out], recipe)
    if onto:
        first = recipe_encoded(replace(recipe, train=replace(recipe.train, encoded=str(onto))), train)
        encoded = second_round(recipe, first, runs, held_out, progress=progress)
    else:
        encoded = encoded_runs(recipe, runs, progress=progress)
        held = runs_with(encoded_targets(encoded.codec, held_out, recipe.diffusion.k), held_out)
        encoded = replace(encoded, held_out=held)
    encoded = replace(encoded, tasks=encoded.tasks | {run.task.name: run.task for run in held_out})
    save_encoded(encoded, out, dtype)
    return encoded


def tokens_by_task(encoded: Encoded) -> dict[str, dict[int, Float[Tensor, "k site width"]]]:
    """Task → seed → its run, of training and of validation tasks."""
    found: dict[str, dict[int, Tensor]] = {}
    for part in (encoded.runs, encoded.held_out):
        for task, seed, tokens in zip(part.tasks, part.seeds, part.tokens, strict=True):
            found.setdefault(task, {})[seed] = tokens
    return found


def second_round(
    recipe: Recipe,
    first: Encoded,
    runs: Sequence[Trajectory],
    held_out: Sequence[Trajectory],
    *,
    progress: bool = True,
) -> Encoded:
    """Runs whose differences are the sum of two rounds: the task's first run, and these, from another start.

    What runs from a long start learn beside the prompt, those from a short one did not, and the other way
    round (docs/log.md). Each local target is the first round's, moved by what the second round's changed in B
    since their start, which they share; in a codec of its own. Raises ValueError in a gauge other than
    `shared_a` and for a task without a run in the first round, SpecMismatchError for runs of another adapter.
    """
    old = first.codec
    require_same_spec(old.spec, runs[0].spec, str(runs[0].path))
    if old.gauge != "shared_a":
        raise ValueError(
            f"a second round adds differences in B, but collect.gauge is {old.gauge!r}. Use gauge 'shared_a'."
        )
    known = tokens_by_task(first)
    if missing := sorted({run.task.name for run in [*runs, *held_out]} - set(known)):
        raise ValueError(
            f"{len(missing)} tasks of the second round have no run in the first, first {missing[0]!r}. "
            f"Encode the first round with the same suite."
        )

    k, start = recipe.diffusion.k, runs[0].start()

    def summed(run: Trajectory, place: int) -> Adapter:
        own = known[run.task.name]
        earlier = own.get(run.seed, next(iter(own.values())))
        return moved(run.adapter(run.local_targets(k)[place]), start, old.decode(earlier[place]))

    def every(chosen: Sequence[Trajectory]) -> Iterator[Adapter]:
        return (summed(run, place) for run in chosen for place in range(k))

    about = {"gauge": old.gauge, "width": recipe.codec.width, "basis_dtype": recipe.codec.dtype}
    codec = AdapterCodec.fit(lambda: every(runs), old.spec, old.start, progress=progress, **about)

    def encoded(chosen: Sequence[Trajectory]) -> Runs:
        tokens = codec.encode_many(every(chosen))
        return runs_with(tokens.view(len(chosen), k, *tokens.shape[1:]), chosen)

    tasks = {run.task.name: run.task for run in runs}
    norms = least_and_largest([site_norms(old.spec, summed(run, k - 1)) for run in runs])
    return Encoded(codec, encoded(runs), encoded(held_out), tasks, norms)
