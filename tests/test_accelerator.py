"""The whole way on an accelerator, against the same on the CPU; skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_bench import tiny_bench, tiny_recipe

from ltdi_peft.base import wrap_base
from ltdi_peft.collect import collect
from ltdi_peft.config import TaskLossConfig
from ltdi_peft.evaluate import evaluate
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.train import train_generator

HERE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(HERE is None, reason="this machine has no accelerator")
PROMPTS = ["please say a second twice", "please c first plain"]


def whole_way(folder, device):
    """Final adapters of the runs, generated ones for both purposes, and what `evaluate` found."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tiny_recipe(folder)
    about = TaskLossConfig(steps=3, tasks=2, examples=2, prompt_in_context=1.0, alone_steps=3)
    train = replace(recipe.train, steps=4, origin_steps=3, task_loss=about)
    recipe = replace(recipe, train=train, evaluate=replace(recipe.evaluate, bootstrap=50))
    accelerator = Accelerator(cpu=device == "cpu")
    bench = tiny_bench(recipe)
    base = wrap_base(bench.base.model.to(device), bench.base.tokenizer)
    bench = replace(bench, base=base, pools={})
    collect(recipe, bench=bench, progress=False)
    runs = TrajectoryStore(recipe.store_folder).trajectories()
    generator = train_generator(recipe, accelerator=accelerator, bench=bench, progress=False)
    assert generator.config.alone
    made = [
        one.adapter
        for beside in (True, False)
        for one in generator.purposed(beside).generate(PROMPTS, base=bench.base)
    ]
    found = evaluate(recipe, bench=bench, generator=generator, results=folder / "results", progress=False)
    return [run.adapter(run.snapshots[-1]) for run in runs], made, found


def test_an_accelerator_makes_what_the_cpu_makes(tmp_path):
    runs, made, found = whole_way(tmp_path / "there", HERE)
    runs_here, made_here, found_here = whole_way(tmp_path / "here", "cpu")
    for one, other in zip([*runs, *made], [*runs_here, *made_here], strict=True):
        for site, factors in one.items():
            for factor, expected in zip(factors, other[site], strict=True):
                torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-4)
    assert list(found["methods"]) == list(found_here["methods"])
