"""The origin: the adapter that generated differences are added to, where that is not the shared start.

In: a recipe with `train.origin_steps` or `train.origin`, prepared runs.  Out: an adapter, trained into
`<output>/origin/` or read where it is; the prepared runs with their differences counted from it.
Idea: runs from a short start tell tasks apart, runs from a long one hardly do; but a long one answers unseen
tasks better (docs/log.md). So differences in B are learned from the short start and added to one that was
trained on (task arithmetic, arXiv:2212.04089). A has moved meanwhile, and the sum is still as good as that of
both ΔW at twice the rank (docs/log.md).
"""

from dataclasses import replace
from pathlib import Path

import torch

from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.collect import Bench
from ltdi_peft.config import Recipe
from ltdi_peft.multi_task import Trained, common_plan, made_once
from ltdi_peft.prepare import Prepared, least_and_largest
from ltdi_peft.spec import Adapter, site_norms

FOLDER = "origin"


def has_origin(recipe: Recipe) -> bool:
    """Whether differences are added to something else than the shared start."""
    return bool(recipe.train.origin_steps or recipe.train.origin)


def recipe_origin(bench: Bench, start: Adapter | None, *, progress: bool = True) -> Trained:
    """The adapter of `train.origin`, as it is or trained on by `train_origin`; or the start, trained on."""
    train = bench.recipe.train
    if train.origin is None:
        return train_origin(bench, start, progress=progress)
    given = given_origin(bench, Path(train.origin), start)
    return train_origin(bench, given, progress=progress) if train.origin_steps else (given, {"given": True})


def given_origin(bench: Bench, folder: Path, start: Adapter | None) -> Adapter:
    """The adapter in `folder`; whether it was trained from `start` nothing in it says.

    Raises ValueError in a gauge other than `shared_a`, SpecMismatchError for another adapter configuration,
    BrokenAdapterError for a folder that cannot be read.
    """
    require_shared_a(bench.recipe, start, f"train.origin is {str(folder)!r}")
    return load_adapter_folder(folder, expected=bench.spec)[1]


def require_shared_a(recipe: Recipe, start: Adapter | None, asked: str) -> Adapter:
    """The shared start; ValueError, which begins with what was `asked` for, where runs do not share A."""
    if start is None or recipe.collect.gauge != "shared_a":
        raise ValueError(
            f"{asked}, but collect.gauge is {recipe.collect.gauge!r}: differences can be added elsewhere "
            f"only where all runs share A. Use gauge 'shared_a', or no origin."
        )
    return start


def train_origin(bench: Bench, start: Adapter | None, *, progress: bool = True) -> Trained:
    """This adapter, trained for `train.origin_steps` more on all training tasks, A and B; made once.

    Every prompt in context; the best of its curve on validation tasks. Raises ValueError in a gauge other
    than `shared_a`, and when the folder holds one that was made by another plan.
    """
    recipe = bench.recipe
    start = require_shared_a(recipe, start, f"train.origin_steps is {recipe.train.origin_steps}")
    multi, train = recipe.collect.multi_task, recipe.train
    rate = train.origin_learning_rate or multi.learning_rate
    fit = replace(multi, steps=train.origin_steps, learning_rate=rate, prompt_in_context=1.0)
    plan = {**common_plan(bench, start, fit), "examples": fit.steps * fit.batch_size}
    tasks = bench.suite.split("train")
    return made_once(bench, FOLDER, plan, start, tasks, progress=progress)


def at_origin(prepared: Prepared, origin: Adapter) -> Prepared:
    """The same tokens, counted from `origin`: what decodes to it, and ‖ΔW‖ of the training adapters there."""
    codec = replace(prepared.codec, origin=origin)
    with torch.no_grad():
        norms = [site_norms(codec.spec, codec.decode(tokens[-1])) for tokens in prepared.data.tokens]
    return replace(prepared, codec=codec, norm_range=least_and_largest(norms))
