"""A training session in float64 on collected tiny runs, for one process or several.

As a program, under `accelerate launch`: tiny_session.py FOLDER OUT writes each method's losses and weights.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_bench import tiny_bench, tiny_recipe

from ltdi_peft.base import wrap_base
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import DiffusionConfig, MetaConfig, TaskLossConfig, TrainConfig
from ltdi_peft.prepare import prepare
from ltdi_peft.session import Session

METHODS = ("plain", "reptile")
STEPS = 3  # of each stage


def recipe64(folder, method):
    """Four units a step, three steps of weight space and three of task loss, dropout on."""
    recipe = tiny_recipe(folder)
    return replace(
        recipe,
        diffusion=DiffusionConfig(k=3, steps=6),
        denoiser=replace(recipe.denoiser, dropout=0.1),
        # a rate at which three REPTILE steps of plain SGD move more than the last digits
        meta=MetaConfig(method=method, inner_learning_rate=0.1),
        train=TrainConfig(
            steps=STEPS,
            batch_size=16,
            units=4,
            log_with=None,
            task_loss=TaskLossConfig(steps=STEPS, tasks=4, examples=2),
        ),
    )


def bench64(folder):
    """The bench of `tiny_bench` with its base model in float64."""
    bench = tiny_bench(tiny_recipe(folder))
    base = wrap_base(bench.base.model.double(), bench.base.tokenizer)
    return replace(bench, base=base, pools={})


def session64(folder, method="plain", accelerator=None, recipe=None):
    """A session whose network and base model compute in float64."""
    accelerator, bench = accelerator or Accelerator(cpu=True), bench64(folder)
    recipe = recipe or recipe64(folder, method)
    with accelerator.main_process_first():
        prepared = prepare(recipe, PromptEncoder("base", base=bench.base), bench.suite)
    return Session(recipe, prepared, accelerator, bench, dtype=torch.float64)


def trained64(folder, method, accelerator=None):
    """Mean losses over all processes, and the weights and averages after both stages."""
    session = session64(folder, method, accelerator)
    losses = [session.accelerator.reduce(step.loss, reduction="mean").item() for step in session.steps()]
    weights = {f"{i}": p.detach().clone() for i, p in enumerate(session.network.parameters())}
    weights |= {f"average-{i}": p for i, p in enumerate(session.average)}
    return losses, weights


def main(folder, out):
    accelerator = Accelerator(cpu=True)
    for method in METHODS:
        losses, weights = trained64(folder, method, accelerator)
        if accelerator.is_main_process:
            save_file(weights, out / f"{method}.safetensors")
            about = {"world_size": accelerator.num_processes, "losses": losses}
            (out / f"{method}.json").write_text(json.dumps(about))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
