"""The optional sections of a result: few_shot, curve, sampling_steps, training_tasks.

In: an opened protocol.  Out: those sections that the recipe asks for, by name.
Idea: each is off by default, as each takes longer than the table; what they share is one `FewShot`.
"""

from typing import Any

from ltdi_peft.baselines import final_adapter
from ltdi_peft.curve import curve
from ltdi_peft.few_shot import FewShot, ladder
from ltdi_peft.multi_task import validation_tasks
from ltdi_peft.protocol import Protocol
from ltdi_peft.sweep import steps_sweep
from ltdi_peft.task_curve import task_curve


def sections(protocol: Protocol, *, progress: bool) -> dict[str, Any]:
    """Every section that the recipe's `evaluate` asks for."""
    about, found = protocol.recipe.evaluate, {}
    few = opened(protocol)
    if about.few_shot.tasks:
        found |= few_shot(protocol, few, progress=progress)
    if about.sampling_steps:
        steps = about.sampling_steps
        found["sampling_steps"] = steps_sweep(few, protocol.generators, steps, progress=progress)
    if about.training_tasks:
        parts = (few, protocol.data, protocol.encoder, protocol.fixed["start"], about.training_tasks)
        found["training_tasks"] = task_curve(*parts, progress=progress)
    return found


def opened(protocol: Protocol) -> FewShot:
    """What every section is measured with."""
    about = protocol.recipe.evaluate.few_shot
    return FewShot(
        protocol.bench,
        protocol.generators["ours"],
        protocol.fixed.get("multi_task_lora", protocol.fixed["start"]),
        protocol.folder,
        counts=about.counts,
        steps=about.steps,
        examples=protocol.recipe.evaluate.examples,
    )


def few_shot(protocol: Protocol, few: FewShot, *, progress: bool) -> dict[str, Any]:
    """The result's sections few_shot and curve, on the first unseen tasks in seen domains."""
    about, suite = protocol.recipe.evaluate.few_shot, protocol.bench.suite
    tasks = suite.split("unseen_tasks")[: about.tasks]
    validation = validation_tasks(protocol.bench)[: about.validation]
    found = {"few_shot": ladder(few, tasks, validation, progress=progress)}
    if about.curve_steps:
        oracles = {task.name: final_adapter(protocol.oracles[task.name]) for task in tasks}
        found["curve"] = curve(few, tasks, validation, oracles, steps=about.curve_steps, progress=progress)
    return found
