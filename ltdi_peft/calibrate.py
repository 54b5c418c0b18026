"""What a LoRA of its own gains on each task of a suite: which tasks are worth having in it.

In: a recipe, for its suite, base model and adapter.  Out: `<output>/calibration.json`: task → accuracies.
Idea: a task that a LoRA cannot learn says nothing about generated adapters. It is measured on training
examples that the LoRA did not see, so the evaluation examples have no part in the choice of tasks.
Resumable: written after every group of tasks; a task that is there is not measured again.
Source: EVALUATION.md, "Base models and tasks".
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ltdi_peft.batched import stack_adapters, unstack_adapter
from ltdi_peft.collect import Bench, run_seed
from ltdi_peft.config import FitConfig, Recipe, to_dict
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.fit import fit_steps, make_pool
from ltdi_peft.score import chance, make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.strict import differing
from ltdi_peft.task import Example, Task

CALIBRATION_FILE = "calibration.json"
HELD_OUT = (
    48  # training examples kept from the LoRA to score it on; half of them where there are fewer than 96
)
FIT = FitConfig(steps=48, batch_size=8, learning_rate=4e-3, prompt_in_context=1.0)


def calibrate(
    bench: Bench, tasks: Sequence[Task] | None = None, *, fit: FitConfig = FIT, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Task → accuracy of `base`, of its own LoRA (`oracle`), of guessing (`chance`), of one fixed answer.

    All with the task prompt in context (training paraphrases), A and B trained from the fresh adapter; of
    all tasks of the suite unless some are given. ValueError for a folder measured with other settings and
    for a task with fewer than 2 training examples.
    """
    found = read_measured(bench.recipe, fit)
    tasks = list(bench.suite.tasks.values()) if tasks is None else list(tasks)
    if few := [task for task in tasks if len(task.train) < 2]:
        raise ValueError(
            f"task {few[0].name!r} has {len(few[0].train)} training examples; calibrating needs at least 2."
        )
    # Tasks of like length go together, so that little is padding.
    missing = sorted((task for task in tasks if task.name not in found), key=first_length)
    together = bench.recipe.collect.together
    with tqdm(total=len(missing), desc="calibrating", disable=not progress, unit="task") as bar:
        for place in range(0, len(missing), together):
            group = missing[place : place + together]
            found |= measured(bench, group, fit)
            write_measured(bench.recipe, fit, found)
            bar.update(len(group))
    return {task.name: found[task.name] for task in tasks}


def first_length(task: Task) -> int:
    """Characters of the first inputs."""
    return sum(len(example.input) for example in task.train[:16])


def parted(task: Task) -> tuple[Task, tuple[Example, ...]]:
    """The task with fewer training examples, and those taken from it."""
    held = min(HELD_OUT, len(task.train) // 2)
    return replace(task, train=task.train[:-held]), task.train[-held:]


def measured(bench: Bench, group: Sequence[Task], fit: FitConfig) -> dict[str, dict[str, float]]:
    """The accuracies of a group of tasks whose LoRAs are trained in one forward pass a step."""
    parts = [parted(task) for task in group]
    pools = [make_pool(bench.adapted, task, bench.recipe.collect.rows, plain=False) for task, _ in parts]
    stacked = stack_adapters([bench.fresh] * len(group), bench.adapted.device)
    seeds = [run_seed(bench.recipe.seed, 0)] * len(group)
    for _ in fit_steps(bench.adapted, stacked, pools, fit, seeds=seeds, train_a=True):
        pass
    adapters = [unstack_adapter(stacked, index) for index in range(len(group))]
    return {
        task.name: accuracies(bench, task, held, adapter)
        for (task, held), adapter in zip(parts, adapters, strict=True)
    }


def accuracies(bench: Bench, task: Task, held: Sequence[Example], adapter: Adapter) -> dict[str, float]:
    """Of the base model, the adapter, guessing among the choices, and the commonest answer alone."""
    sheet = make_sheet(bench.adapted, held, task.prompts)
    both = score(bench.adapted, sheet, stack_adapters([bench.fresh, adapter], bench.adapted.device)).accuracy
    base, oracle = both.tolist()
    constant = Counter(example.answer for example in held).most_common(1)[0][1] / len(held)
    values = {"base": base, "oracle": oracle, "chance": chance(held), "constant": constant}
    return {name: round(value, 4) for name, value in values.items()}


def settings(recipe: Recipe, fit: FitConfig) -> dict[str, Any]:
    """What must be equal for two measurements to stand in one file."""
    whole = to_dict(recipe)
    about = {"seed": recipe.seed, "base": whole["base"], "adapter": whole["adapter"]}
    return json.loads(json.dumps(about | {"rows": recipe.collect.rows, "fit": to_dict(fit)}))


def read_measured(recipe: Recipe, fit: FitConfig) -> dict[str, dict[str, float]]:
    """What `<output>/calibration.json` holds. ValueError if it was measured with other settings."""
    file = recipe.folder / CALIBRATION_FILE
    if not file.is_file():
        return {}
    record = read_json(file)
    if changed := differing(record["settings"], settings(recipe, fit)):
        raise ValueError(
            f"{file} was measured with other {changed}. Give this recipe another `output`, or remove the "
            f"file."
        )
    return record["tasks"]


def write_measured(recipe: Recipe, fit: FitConfig, found: dict[str, dict[str, float]]) -> None:
    """Replace the file."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings(recipe, fit), "tasks": dict(sorted(found.items()))}
    replace_file(recipe.folder / CALIBRATION_FILE, json_bytes(record))
