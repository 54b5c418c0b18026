"""The rival generators: each loss, plain and under REPTILE, centred on the mean adapter; and task loss.

In: a recipe whose trajectories are collected.  Out: a `Generator` a name, in `<output>/variants/<name>`.
Idea: what is compared is the diffusion, so runs, codec, network, validation trials and the number of gradient
steps are those of ours; a name says all that differs. Task loss is measured as a second stage after ours and
as the only one, from an untrained network around the mean adapter.
"""

import math
from dataclasses import replace
from typing import Any

from ltdi_peft.collect import Bench
from ltdi_peft.config import LOSSES, Recipe
from ltdi_peft.files import read_json
from ltdi_peft.generator import Generator
from ltdi_peft.train import REPORT_FILE, make_accelerator, train_in

REPTILE = "+reptile"
SECOND_STAGE, SCRATCH = "ours+task_loss", "task_loss"
TASK_LOSS = (SECOND_STAGE, SCRATCH)
VARIANTS = (*(f"{loss}{meta}" for loss in LOSSES for meta in ("", REPTILE)), *TASK_LOSS)


def gradient_steps(recipe: Recipe) -> int:
    """Gradients that a unit computes in weight space: one a step, under REPTILE `meta.inner_steps` a step.

    Each is of one batch of train.batch_size / train.units rows, so equal counts are equal work and data. The
    outer step of REPTILE takes the mean difference of the weights for a gradient and computes none.
    """
    return recipe.train.steps * (recipe.meta.inner_steps if recipe.meta.method == "reptile" else 1)


def variant_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a variant: its loss around the mean adapter, plain or REPTILE, with equal gradient steps.

    Those with task loss take evaluate.task_loss_steps of it. Of the others `train.steps` is set so that
    `gradient_steps` is that of the given recipe; where meta.inner_steps does not divide it, REPTILE has up to
    inner_steps − 1 more. ValueError for an unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; known variants are {list(VARIANTS)}.")
    if name in TASK_LOSS:
        return task_loss_recipe(recipe, scratch=name == SCRATCH)
    reptile = name.endswith(REPTILE)
    meta = replace(recipe.meta, method="reptile" if reptile else "plain")
    steps = math.ceil(gradient_steps(recipe) / (meta.inner_steps if reptile else 1))
    return replace(
        recipe,
        diffusion=replace(recipe.diffusion, loss=name.removesuffix(REPTILE), centre="mean"),
        meta=meta,
        train=replace(recipe.train, steps=steps, log_with=None),
    )


def task_loss_recipe(recipe: Recipe, *, scratch: bool) -> Recipe:
    """Ours with task loss as a second stage; or from scratch: no weight-space loss, no ridge centre."""
    about = replace(recipe.train.task_loss, steps=recipe.evaluate.task_loss_steps)
    if not scratch:
        return replace(recipe, train=replace(recipe.train, task_loss=about, log_with=None))
    return replace(
        recipe,
        diffusion=replace(recipe.diffusion, centre="mean"),
        meta=replace(recipe.meta, method="plain"),
        train=replace(recipe.train, steps=0, task_loss=replace(about, weight_space=0.0), log_with=None),
    )


def train_variant(recipe: Recipe, bench: Bench, name: str, *, progress: bool = True) -> Generator:
    """The generator of a variant, its guidance chosen on validation tasks as that of ours; made once."""
    variant = variant_recipe(recipe, name)
    folder = recipe.folder / "variants" / name
    return train_in(variant, folder, make_accelerator(variant), bench, gate=0.0, progress=progress)


def variant_trials(recipe: Recipe, name: str) -> dict[str, Any]:
    """How long a variant was trained: steps, `gradient_steps` of a unit, seconds of each stage's steps."""
    variant = variant_recipe(recipe, name)
    inner = variant.meta.inner_steps if variant.meta.method == "reptile" else 1
    steps = {"steps": variant.train.steps, "inner_steps": inner, "gradient_steps": gradient_steps(variant)}
    file = recipe.folder / "variants" / name / REPORT_FILE
    report = read_json(file) if file.is_file() else {}  # made elsewhere
    steps |= {"task_loss_steps": variant.train.task_loss.steps, "seconds": report.get("stage_seconds")}
    shares = report.get("task_loss_share")  # only of what has two stages
    return steps | ({"task_loss_share": shares} if shares else {})
