"""How far a prediction is followed: the guidance of generators and of the ridge rival alike.

In: something that makes an adapter of a prompt and a `Guidance`, validation tasks.  Out: `Tried`, the best.
Idea: adapter = mean_share · mean + scale · (prediction − mean), counted from the shared start. What all
training runs have in common helps the adapter that works alone, and may cost what the start knew; how much
of either is right is seen on validation tasks only.
Trials answer the same examples, so they are compared task by task: what a trial is ahead by is told far more
closely than how good it is.
Source: the scale is classifier-free guidance's, arXiv:2207.12598; the one-standard-error rule, Breiman et al.
1984, here of paired differences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench
from ltdi_peft.generator import Generator
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task

GUIDANCE = (0.75, 1.0, 1.25, 1.5, 2.0)
MEAN_SHARES = (1.0, 0.0)
ALONE_SHARES = (0.0, 0.25, 0.5)  # of what the network for adapters alone makes, beside a prompt
SCALE_EXAMPLES = 32  # of each validation task, to choose by


@dataclass(frozen=True)
class Guidance:
    """How a prediction becomes an adapter: mean_share · mean + scale · (prediction − mean) on the start."""

    scale: float = 1.0
    mean_share: float = 1.0


Accuracies = dict[str, dict[str, float]]  # mean share → guidance scale → accuracy on validation tasks


@dataclass(frozen=True)
class Tried:
    """What every trial scored on every validation task."""

    trials: tuple[Guidance, ...]
    accuracy: Float[Tensor, "trial task"]

    def table(self) -> Accuracies:
        """Means over the tasks, for a report; 0 without tasks."""
        found: Accuracies = {str(one.mean_share): {} for one in self.trials}
        for one, accuracy in zip(self.trials, mean_over(self.accuracy), strict=True):
            found[str(one.mean_share)][str(one.scale)] = accuracy
        return found

    def behind(self, best: int) -> list[tuple[float, float]]:
        """How far each trial is behind trial `best`: the mean over the tasks, and its standard error."""
        return gaps_to(self.accuracy, best)

    def best(self) -> Guidance:
        """Of the mean share with the best trial, the scale nearest to 1 that is not told from the best one.

        That is: whose mean difference from it is at most one standard error over the tasks. All of the mean
        and the plain prediction, if equal or without two tasks to compare on. A handful of tasks cannot tell
        the large scales apart, and an adapter pushed too far fails on some tasks altogether.
        """
        if self.accuracy.shape[1] < 2:
            return Guidance()
        best = int(self.accuracy.mean(1).argmax())
        share = self.trials[best].mean_share
        near = [
            one
            for one, (gap, error) in zip(self.trials, self.behind(best), strict=True)
            if one.mean_share == share and gap <= error
        ]
        return min(near, key=lambda one: abs(one.scale - 1))


def gaps_to(accuracy: Float[Tensor, "trial task"], best: int) -> list[tuple[float, float]]:
    """How far each trial is behind trial `best`: the mean over the tasks, and its standard error."""
    gaps = accuracy[best] - accuracy
    errors = gaps.std(1) / math.sqrt(gaps.shape[1])
    return list(zip(gaps.mean(1).tolist(), errors.tolist(), strict=True))


def choose_alone_share(
    generator: Generator, bench: Bench, names: Sequence[str], examples: int = SCALE_EXAMPLES
) -> tuple[float, dict[str, float]]:
    """How much of its network for adapters alone helps those beside a prompt; share → accuracy.

    The least share that is not told from the best one, that is: whose mean difference from it on the
    validation tasks is at most one standard error. 0 without two tasks that have evaluation examples.
    """
    own = generator.config
    tasks = [bench.suite[name] for name in names if bench.suite[name].evaluation]
    if len(tasks) < 2:
        return 0.0, {}
    prompts = validation_prompts(tasks)

    def made(task: Task) -> list[Adapter]:
        found = []
        for share in ALONE_SHARES:
            generator.config = replace(own, alone_share=share)
            found += generator.generate(prompts[task.name], base=bench.base)
        return [one.adapter for one in found]

    try:
        accuracy = task_accuracies(bench, tasks, made, len(ALONE_SHARES), examples)
    finally:
        generator.config = own
    behind = gaps_to(accuracy, int(accuracy.mean(1).argmax()))
    near = [share for share, (gap, error) in zip(ALONE_SHARES, behind, strict=True) if gap <= error]
    return min(near), dict(zip(map(str, ALONE_SHARES), mean_over(accuracy), strict=True))


def trials(gauge: str) -> list[Guidance]:
    """What is tried; in gauge `canonical` there is no start, and nothing to leave out."""
    shares = MEAN_SHARES[:1] if gauge == "canonical" else MEAN_SHARES
    return [Guidance(scale, share) for share in shares for scale in GUIDANCE]


def choose_guidance(
    generator: Generator,
    bench: Bench,
    names: Sequence[str],
    examples: int = SCALE_EXAMPLES,
    *,
    context: str = "prompt",
) -> Tried:
    """`guidance_accuracies` of a generator on the validation tasks that have evaluation examples."""
    own = generator.config

    def generated(prompt: Sequence[str], tried: Guidance) -> Adapter:
        generator.config = replace(own, guidance_scale=tried.scale, mean_share=tried.mean_share)
        return generator.generate(prompt, base=bench.base)[0].adapter

    tasks = [bench.suite[name] for name in names if bench.suite[name].evaluation]
    try:
        return guidance_accuracies(bench, tasks, generated, generator.codec.gauge, examples, context)
    finally:
        generator.config = own


def guidance_accuracies(
    bench: Bench,
    tasks: Sequence[Task],
    adapter: Callable[[Sequence[str], Guidance], Adapter],
    gauge: str,
    examples: int,
    context: str = "prompt",
) -> Tried:
    """Accuracy of each trial on each task; by default with the prompt in context, the headline column."""
    tried = trials(gauge)
    prompts = validation_prompts(tasks)

    def made(task: Task) -> list[Adapter]:
        return [adapter(prompts[task.name], one) for one in tried]

    return Tried(tuple(tried), task_accuracies(bench, tasks, made, len(tried), examples, context))


def validation_prompts(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """What a generator is told of each task: one held-out prompt, another for the next task.

    Whoever is compared must give the tasks in one order, the suite's. Unseen tasks are asked in all of their
    prompts; what suits one wording need not suit the others.
    """
    asked = ((task, number % len(task.held_out_prompts)) for number, task in enumerate(tasks))
    return {task.name: [task.held_out_prompts[number]] for task, number in asked}


def task_accuracies(
    bench: Bench,
    tasks: Sequence[Task],
    made: Callable[[Task], Sequence[Adapter]],
    count: int,
    examples: int,
    context: str = "prompt",
) -> Float[Tensor, "adapter task"]:
    """Of each of a task's `count` adapters, float64.

    context: "prompt", the task's held-out ones in the model's context, in turn, or "no_prompt".
    """
    found = torch.zeros(count, len(tasks), dtype=torch.float64)
    for place, task in enumerate(tasks):
        stacked = stack_adapters(made(task), bench.adapted.device)
        prompts = task.held_out_prompts if context == "prompt" else None
        sheet = make_sheet(bench.adapted, task.evaluation[:examples], prompts)
        found[:, place] = score(bench.adapted, sheet, stacked).accuracy.double().cpu()
    return found


def mean_over(accuracy: Float[Tensor, "adapter task"]) -> list[float]:
    """Of each adapter, over the tasks; 0 without any."""
    return (accuracy.sum(1) / max(accuracy.shape[1], 1)).tolist()
