"""What is recovered on the validation tasks while one number is varied: here, the sampling steps.

In: what the few-shot ladder has, and the validation tasks' own runs.
Out: {"split": "validation", "tasks": …, "examples": …, "rows": [{"steps": 5, "G": …, "ci": …, …}, …]}.
Idea: a sweep invites choices, so it never sees an unseen task. All adapters of a task share a forward pass,
and a killed evaluation goes on (`kept_lines`).
Source: EVALUATION, "Steps": G against sampling steps, with each one's best sampler.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ltdi_peft.baselines import adapter_digest, final_adapter
from ltdi_peft.diffusion import SAMPLERS
from ltdi_peft.few_shot import CONTEXTS, FewShot, accuracies, in_each, lines_of
from ltdi_peft.generator import Generator
from ltdi_peft.kept import Line, hashed
from ltdi_peft.protocol import generator_digest
from ltdi_peft.spec import Adapter
from ltdi_peft.statistics import recovered_gain
from ltdi_peft.store import Trajectory
from ltdi_peft.summary import interval, number
from ltdi_peft.task import Task
from ltdi_peft.train import validation_runs

Make = Callable[[Task], dict[str, Adapter]]
"""A task → its adapters, under keys."""


def steps_sweep(
    few: FewShot, generators: Mapping[str, Generator], steps: Sequence[int], *, progress: bool = True
) -> dict[str, Any]:
    """G of every generator, under each sampler, in so many sampling steps; for a result's "sampling_steps".

    A generator takes the numbers between its k and its T. As many seeds as evaluate.seeds, each with its own
    held-out paraphrase. Raises ValueError where there is nothing to sample or to score.
    """
    wanted = [
        (name, sampler, count)
        for (name, one), sampler, count in product(generators.items(), SAMPLERS, steps)
        if one.chain.k <= count <= one.chain.T
    ]
    if not wanted:
        ranges = {name: (one.chain.k, one.chain.T) for name, one in generators.items()}
        raise ValueError(f"evaluate.sampling_steps {list(steps)} lie outside k … T of all of {ranges}.")
    seeds = few.bench.recipe.evaluate.seeds

    def make(task: Task) -> dict[str, Adapter]:
        return {
            f"{name}/{sampler}/{count}/{seed}": sampled(few, generators[name], task, sampler, count, seed)
            for name, sampler, count in wanted
            for seed in range(seeds)
        }

    about = {"sampling": wanted, "seeds": seeds}
    about |= {"generators": {name: generator_digest(one) for name, one in generators.items()}}
    found = validation_lines(few, about, make, desc="sampling steps", progress=progress)
    rows = [
        {"method": name, "loss": generators[name].config.loss, "sampler": sampler, "steps": count}
        | {"k": generators[name].chain.k, "T": generators[name].chain.T}
        | gain_row(few, found, [f"{name}/{sampler}/{count}/{seed}" for seed in range(seeds)])
        for name, sampler, count in wanted
    ]
    return header(few, found) | {"seeds": seeds, "rows": rows}


def sampled(few: FewShot, generator: Generator, task: Task, sampler: str, steps: int, seed: int) -> Adapter:
    """One adapter by another sampler, in so many steps."""
    own = generator.config
    prompt = task.held_out_prompts[seed % len(task.held_out_prompts)]
    generator.config = replace(own, sampler=sampler)
    try:
        (made,) = generator.generate([prompt], seed=seed, steps=steps, base=few.bench.base)
    finally:
        generator.config = own
    return made.adapter


# ---- shared by the sweeps


def validation_lines(
    few: FewShot, about: dict[str, Any], make: Make, *, desc: str, progress: bool
) -> dict[str, Line]:
    """Validation task → the accuracies of its adapters, of base and of oracle, in both contexts."""
    oracles = validation_oracles(few)
    tasks = [few.bench.suite[name] for name in oracles]
    ends = {name: {"base": few.bench.fresh, "oracle": final_adapter(run)} for name, run in oracles.items()}

    def lines(group: list[Task]) -> list[Line]:
        made = [{**ends[task.name], **make(task)} for task in group]
        own = [{key: in_each(adapter) for key, adapter in one.items()} for one in made]
        return [accuracies(few, task, one, few.examples) for task, one in zip(group, own, strict=True)]

    keys = {t.name: hashed(t.to_dict()) + adapter_digest(ends[t.name]["oracle"]) for t in tasks}
    about = {**about, "examples": few.examples}
    return lines_of(few, about, tasks, lines, keys=keys, desc=desc, progress=progress)


def validation_oracles(few: FewShot) -> dict[str, Trajectory]:
    """Validation task → its own run, of the tasks that can be scored. ValueError without any."""
    runs = {run.task.name: run for run in validation_runs(few.bench.recipe, few.bench)}
    found = {name: runs[name] for name in sorted(runs) if few.bench.suite[name].evaluation}
    if not found:
        raise ValueError(
            "evaluate.sampling_steps and evaluate.training_tasks need validation tasks with evaluation "
            "examples and a finished run each, and there are none. Set suite.validation above 0 and run "
            "`ltdi collect`, or leave both empty."
        )
    return found


def header(few: FewShot, found: Mapping[str, Line]) -> dict[str, Any]:
    """What a sweep was scored on."""
    examples = min(len(few.bench.suite[name].evaluation[: few.examples]) for name in found)
    return {"split": "validation", "tasks": len(found), "examples": examples}


def gain_row(few: FewShot, found: Mapping[str, Line], keys: Sequence[str]) -> dict[str, Any]:
    """Accuracy, G and its interval over the tasks, in both contexts; `keys` (seeds) are averaged first."""
    draws, seed = few.bench.recipe.evaluate.bootstrap, few.bench.recipe.seed
    row = {}
    for context, suffix in zip(CONTEXTS, ("", "_no_prompt"), strict=True):
        method, base, oracle = (column(found, some, context) for some in (keys, ["base"], ["oracle"]))
        gain = recovered_gain(method, base, oracle, list(found), draws=draws, seed=seed)
        row[f"accuracy{suffix}"] = number(float(method.mean()))
        row[f"G{suffix}"], row[f"ci{suffix}"] = number(gain.value), interval(gain)
    return row


def column(found: Mapping[str, Line], keys: Sequence[str], context: str) -> Tensor:
    """Accuracy of every task, mean over the keys (float64)."""
    values = [statistics.fmean(line[key][context] for key in keys) for line in found.values()]
    return torch.tensor(values, dtype=torch.float64)
