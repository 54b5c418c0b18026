"""How far a prediction is followed: the guidance of generators and of the ridge rival alike.

In: something that makes an adapter of a prompt and a `Guidance`, validation tasks.  Out: the best trial.
Idea: adapter = mean_share · mean + scale · (prediction − mean), counted from the shared start. What all
training runs have in common helps the adapter that works alone, and may cost what the start knew; how much
of either is right is seen on validation tasks only.
Source: the scale is classifier-free guidance's, arXiv:2207.12598; the one-standard-error rule, Breiman et al.
1984.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench
from ltdi_peft.generator import Generator
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task

GUIDANCE = (0.75, 1.0, 1.25, 1.5, 2.0)
MEAN_SHARES = (1.0, 0.0)
SCALE_EXAMPLES = 32  # of each validation task, to choose by


@dataclass(frozen=True)
class Guidance:
    """How a prediction becomes an adapter: mean_share · mean + scale · (prediction − mean) on the start."""

    scale: float = 1.0
    mean_share: float = 1.0


Accuracies = dict[str, dict[str, float]]  # mean share → guidance scale → accuracy on validation tasks


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
) -> Accuracies:
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
) -> Accuracies:
    """Mean accuracy of each trial; by default with the prompt in context, the headline column."""
    tried = trials(gauge)
    prompts = validation_prompts(tasks)

    def made(task: Task) -> list[Adapter]:
        return [adapter(prompts[task.name], one) for one in tried]

    found: Accuracies = {str(one.mean_share): {} for one in tried}
    accuracies = mean_accuracies(bench, tasks, made, len(tried), examples, context)
    for one, accuracy in zip(tried, accuracies, strict=True):
        found[str(one.mean_share)][str(one.scale)] = accuracy
    return found


def validation_prompts(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """What a generator is told of each task: one held-out prompt, another for the next task.

    Whoever is compared must give the tasks in one order, the suite's. Unseen tasks are asked in all of their
    prompts; what suits one wording need not suit the others.
    """
    asked = ((task, number % len(task.held_out_prompts)) for number, task in enumerate(tasks))
    return {task.name: [task.held_out_prompts[number]] for task, number in asked}


def mean_accuracies(
    bench: Bench,
    tasks: Sequence[Task],
    made: Callable[[Task], Sequence[Adapter]],
    count: int,
    examples: int,
    context: str = "prompt",
) -> list[float]:
    """Mean over the tasks of each of a task's `count` adapters; 0 without tasks.

    context: "prompt", the task's held-out ones in the model's context, in turn, or "no_prompt".
    """
    totals = [0.0] * count
    for task in tasks:
        stacked = stack_adapters(made(task), bench.adapted.device)
        prompts = task.held_out_prompts if context == "prompt" else None
        sheet = make_sheet(bench.adapted, task.evaluation[:examples], prompts)
        accuracies = score(bench.adapted, sheet, stacked).accuracy.tolist()
        totals = [total + accuracy for total, accuracy in zip(totals, accuracies, strict=True)]
    return [total / max(len(tasks), 1) for total in totals]


def best_guidance(found: Accuracies, scored: int) -> Guidance:
    """The mean share with the best accuracy (all of the mean, if equal), and with it `best_scale`."""
    share = max(found, key=lambda one: max(found[one].values()))
    return Guidance(best_scale(found[share], scored), float(share))


def best_scale(accuracy: dict[str, float], scored: int) -> float:
    """The scale nearest to 1, the plain prediction, within one standard error of the best accuracy.

    scored: examples behind each accuracy. A handful of validation tasks cannot tell the large scales apart,
    and an adapter pushed too far fails on some tasks altogether.
    """
    best = max(accuracy.values())
    least = best - math.sqrt(best * (1 - best) / max(scored, 1))
    return float(min((s for s in accuracy if accuracy[s] >= least), key=lambda s: abs(float(s) - 1)))
