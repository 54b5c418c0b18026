"""The optional sections of a result: few_shot, curve, sampling_steps, training_tasks.

In: an opened protocol.  Out: those sections that the recipe asks for, by name.
Idea: each is off by default, as each takes longer than the table; what they share is one `FewShot`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ltdi_peft.baselines import final_adapter
from ltdi_peft.collect import Bench
from ltdi_peft.curve import curve, ends_of
from ltdi_peft.few_shot import FewShot, ladder, with_gains
from ltdi_peft.generator import Generator
from ltdi_peft.kept import Line
from ltdi_peft.multi_task import validation_tasks
from ltdi_peft.protocol import Protocol
from ltdi_peft.spec import Adapter
from ltdi_peft.sweep import steps_sweep
from ltdi_peft.task import Task
from ltdi_peft.task_curve import task_curve


def sections(protocol: Protocol, *, progress: bool) -> dict[str, Any]:
    """Every section that the recipe's `evaluate` asks for."""
    about, found = protocol.recipe.evaluate, {}
    start = protocol.fixed.get("multi_task_lora", protocol.fixed["start"])
    few = opened(protocol.bench, protocol.generators["ours"], start, protocol.folder)
    if about.few_shot.tasks:

        def ends(task: Task) -> Line:
            return ends_of(few, task, final_adapter(protocol.oracles[task.name]))

        unseen = protocol.bench.suite.split("unseen_tasks")
        found |= few_shot(few, unseen, ends, progress=progress)
    if about.sampling_steps:
        steps = about.sampling_steps
        found["sampling_steps"] = steps_sweep(few, protocol.generators, steps, progress=progress)
    if about.training_tasks:
        parts = (few, protocol.data, protocol.encoder, protocol.fixed["start"], about.training_tasks)
        found["training_tasks"] = task_curve(*parts, progress=progress)
    return found


def opened(bench: Bench, generator: Generator, start: Adapter, folder: Path) -> FewShot:
    """What every section is measured with, as the bench's recipe wants it; for the rest see `FewShot`."""
    about = bench.recipe.evaluate
    sizes = {"counts": about.few_shot.counts, "steps": about.few_shot.steps, "examples": about.examples}
    sizes |= {"in_context": about.few_shot.in_context}
    return FewShot(bench, generator, start, folder, **sizes)


def few_shot(
    few: FewShot, tasks: Sequence[Task], ends: Callable[[Task], Line], *, progress: bool
) -> dict[str, Any]:
    """A result's sections few_shot and curve, as the recipe wants them, on the first of these unseen tasks.

    ends: accuracy of base and oracle on a task, as `curve.ends_of` finds it.
    """
    about = few.bench.recipe.evaluate.few_shot
    tasks = tasks[: about.tasks]
    validation = validation_tasks(few.bench)[: about.validation]
    rungs = ladder(few, tasks, validation, progress=progress)
    reached = {task.name: ends(task) for task in tasks}
    options = {"draws": few.bench.recipe.evaluate.bootstrap, "seed": few.bench.recipe.seed}
    found: dict[str, Any] = {"few_shot": with_gains(rungs, reached, **options)}
    if about.curve_steps:
        found["curve"] = curve(few, tasks, validation, reached, steps=about.curve_steps, progress=progress)
    return found
