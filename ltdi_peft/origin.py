"""The origin: the adapter that generated differences are added to, where that is not the shared start.

In: a recipe with `train.origin_steps`, prepared runs.  Out: an adapter in `<output>/origin/`; the prepared
runs with their differences counted from it.
Idea: runs from a short start tell tasks apart, runs from a long one hardly do; but a long one answers unseen
tasks better (docs/log.md). So differences in B are learned from the short start and added to one that was
trained on (task arithmetic, arXiv:2212.04089). A has moved meanwhile, by so little that the sum is as good as
that of both ΔW at twice the rank (docs/log.md).
"""

from dataclasses import replace

import torch

from ltdi_peft.collect import Bench
from ltdi_peft.config import FitConfig
from ltdi_peft.multi_task import Trained, common_plan, made_once
from ltdi_peft.prepare import Prepared, least_and_largest
from ltdi_peft.spec import Adapter, site_norms

FOLDER = "origin"


def train_origin(bench: Bench, start: Adapter | None, *, progress: bool = True) -> Trained:
    """The start, trained for `train.origin_steps` more on all training tasks, A and B; made once.

    Every prompt in context; the best of its curve on validation tasks. Raises ValueError in a gauge other
    than `shared_a`, and when the folder holds one that was made by another plan.
    """
    recipe = bench.recipe
    if start is None or recipe.collect.gauge != "shared_a":
        raise ValueError(
            f"train.origin_steps is {recipe.train.origin_steps}, but collect.gauge is "
            f"{recipe.collect.gauge!r}: differences can be added elsewhere only where all runs share A. Use "
            f"gauge 'shared_a', or 0 steps."
        )
    fit: FitConfig = replace(
        recipe.collect.multi_task, steps=recipe.train.origin_steps, prompt_in_context=1.0
    )
    plan = {**common_plan(bench, start, fit), "examples": fit.steps * fit.batch_size}
    tasks = bench.suite.split("train")
    return made_once(bench, FOLDER, plan, start, tasks, progress=progress)


def moved(adapter: Adapter, start: Adapter, origin: Adapter) -> Adapter:
    """What was `adapter` to `start` to `origin`: the difference of B added there, with the origin's A."""
    return {site: (a, b + adapter[site][1] - start[site][1]) for site, (a, b) in origin.items()}


def at_origin(prepared: Prepared, origin: Adapter) -> Prepared:
    """The same tokens, counted from `origin`: what decodes to it, and ‖ΔW‖ of the training adapters there."""
    codec = replace(prepared.codec, origin=origin)
    with torch.no_grad():
        norms = [site_norms(codec.spec, codec.decode(tokens[-1])) for tokens in prepared.data.tokens]
    return replace(prepared, codec=codec, norm_range=least_and_largest(norms))
