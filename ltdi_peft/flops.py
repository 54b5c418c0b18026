"""Floating-point operations of each stage, of one generated adapter and of one fine-tune.

In: a generator, its bench.  Out: counts, two operations a multiply-add.
Idea: PyTorch's own counter watches one row, one step and one generation; the recipe says how many there are.
It counts matrix products and convolutions, which is all that matters here.
"""

import copy
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import HELD_OUT, Bench
from ltdi_peft.condition import PromptEncoder, added
from ltdi_peft.config import FitConfig, Recipe
from ltdi_peft.denoiser import Denoiser
from ltdi_peft.fit import Pool, backward, make_pool
from ltdi_peft.generator import Generator
from ltdi_peft.tuning import fresh_factors


def counted(work: Callable[[], object]) -> int:
    """Operations that `work` carries out, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count_flops(generator: Generator, bench: Bench) -> dict[str, float]:
    """Per row: frozen lower layers (once), adapted layers forward and back (every step); stages; generation.

    The rows are those of the first training task. `fine_tune_step` is one step of one task's own run, its
    rows' lower layers included.
    """
    recipe, task = bench.recipe, bench.suite.split("train")[0]
    pools: list[Pool] = []
    lower = counted(lambda: pools.append(make_pool(bench.adapted, task, recipe.collect.rows)))
    lower = lower / len(pools[0].rows)
    upper = upper_layers(bench, pools[0])
    prompt = task.held_out_prompts[0]
    single = recipe.collect.single
    return {
        "lower_layers_a_row": lower,
        "adapted_layers_a_row_and_step": upper,
        "collect": pools_rows(bench) * lower + fitted_rows(bench) * upper,
        "train": len(recipe.train.task_loss.trainings()) * training(generator.denoiser, recipe)
        + tuning(recipe, prompt)
        + task_loss_rows(recipe) * upper
        + recipe.train.origin_steps * recipe.collect.multi_task.batch_size * upper,
        "generate": float(counted(lambda: generator.generate([prompt], base=bench.base))),
        "fine_tune_step": single.batch_size * (lower + passes(single) * upper),
    }


def upper_layers(bench: Bench, pool: Pool) -> float:
    """Forward and back through the adapted layers, a row."""
    stacked = stack_adapters([bench.fresh], bench.adapted.device)
    for factors in stacked.values():
        for factor in factors:
            factor.requires_grad_(True)
    rows, inputs = pool.rows[:8], pool.inputs[:8]
    return counted(lambda: backward(bench.adapted, rows, inputs, stacked)) / len(rows)


def passes(config: FitConfig) -> int:
    """Gradients a step: sharpness-aware minimisation takes two."""
    return 2 if config.sam_rho > 0 else 1


def pools_rows(bench: Bench) -> int:
    """Rows whose lower activations are made once: prompted ones, and every second without its prompt."""
    kept = [min(len(task.train), bench.recipe.collect.rows) for task in bench.suite.tasks.values()]
    return sum(rows + (rows + 1) // 2 for rows in kept)


def fitted_rows(bench: Bench) -> int:
    """Rows times steps of the shared start and of all runs, held-out ones included."""
    collect, suite = bench.recipe.collect, bench.suite
    multi, single = collect.multi_task, collect.single
    start = passes(multi) * multi.steps * multi.batch_size if collect.start == "multi_task" else 0
    runs = len(suite.split("train")) * collect.seeds + sum(len(suite.split(split)) for split in HELD_OUT)
    return start + runs * passes(single) * single.steps * single.batch_size


def task_loss_rows(recipe: Recipe) -> int:
    """Rows times steps of the second stage."""
    return sum(about.steps * about.tasks * about.examples for about in recipe.train.task_loss.trainings())


def tuning(recipe: Recipe, prompt: str) -> float:
    """Of the sentence encoder: forward, and back through what is tuned, for every prompt of every step."""
    config = recipe.condition.tuning
    if not config.steps:
        return 0.0
    encoder = PromptEncoder(recipe.condition.encoder)
    factors = fresh_factors(encoder, config, recipe.seed)
    for factor in (factor for pair in factors.values() for factor in pair):
        factor.requires_grad_(True)
    encoder.model.requires_grad_(False)
    said = [prompt] * config.tasks
    step = counted(lambda: encoder.said(said, added(encoder.model, factors)).sum().backward())
    return float(config.steps * step)


def training(denoiser: Denoiser, recipe: Recipe) -> float:
    """Of the weight-space stage: forward and back through the network, every step."""
    network, config = copy.deepcopy(denoiser).requires_grad_(True), denoiser.config
    batch = recipe.train.batch_size
    x = torch.zeros(batch, config.sites, config.width)
    condition = torch.zeros(batch, config.condition_width)
    t = torch.zeros(batch, dtype=torch.long)
    step = counted(lambda: network(x, t, condition).sum().backward())
    inner = recipe.meta.inner_steps if recipe.meta.method == "reptile" else 1
    return float(step * inner * recipe.train.steps)
