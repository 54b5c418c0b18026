"""The rival generators: each loss, plain and under REPTILE, centred on the mean adapter.

In: a recipe whose trajectories are collected.  Out: a `Generator` a name, in `<output>/variants/<name>`.
Idea: what is compared is the diffusion, so runs, codec, network, validation trials and the number of gradient
steps are those of ours; a name says all that differs.
"""

import math
from dataclasses import replace

from ltdi_peft.collect import Bench
from ltdi_peft.config import LOSSES, Recipe
from ltdi_peft.generator import Generator
from ltdi_peft.train import make_accelerator, train_in

REPTILE = "+reptile"
VARIANTS = tuple(f"{loss}{meta}" for loss in LOSSES for meta in ("", REPTILE))


def gradient_steps(recipe: Recipe) -> int:
    """Gradients that a unit computes in weight space: one a step, under REPTILE `meta.inner_steps` a step.

    Each is of one batch of train.batch_size / train.units rows, so equal counts are equal work and data. The
    outer step of REPTILE takes the mean difference of the weights for a gradient and computes none.
    """
    return recipe.train.steps * (recipe.meta.inner_steps if recipe.meta.method == "reptile" else 1)


def variant_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a variant: its loss around the mean adapter, plain or REPTILE, with equal gradient steps.

    `train.steps` is set so that `gradient_steps` is that of the given recipe; where meta.inner_steps does not
    divide it, REPTILE has up to inner_steps − 1 more. ValueError for an unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; known variants are {list(VARIANTS)}.")
    reptile = name.endswith(REPTILE)
    meta = replace(recipe.meta, method="reptile" if reptile else "plain")
    steps = math.ceil(gradient_steps(recipe) / (meta.inner_steps if reptile else 1))
    return replace(
        recipe,
        diffusion=replace(recipe.diffusion, loss=name.removesuffix(REPTILE), centre="mean"),
        meta=meta,
        train=replace(recipe.train, steps=steps, log_with=None),
    )


def train_variant(recipe: Recipe, bench: Bench, name: str, *, progress: bool = True) -> Generator:
    """The generator of a variant, its guidance chosen on validation tasks as that of ours; made once."""
    variant = variant_recipe(recipe, name)
    folder = recipe.folder / "variants" / name
    return train_in(variant, folder, make_accelerator(variant), bench, gate=0.0, progress=progress)


def variant_trials(recipe: Recipe, name: str) -> dict[str, int]:
    """How long a variant is trained: optimiser steps, and `gradient_steps` of a unit."""
    variant = variant_recipe(recipe, name)
    inner = variant.meta.inner_steps if variant.meta.method == "reptile" else 1
    return {"steps": variant.train.steps, "inner_steps": inner, "gradient_steps": gradient_steps(variant)}
