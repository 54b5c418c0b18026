"""The attribute classifier of a recipe, fitted once.

In: a recipe with `condition.attributes`, a bench.  Out: `<output>/attributes.safetensors`.
Idea: it reads what the recipe's own encoder, tuned or not, makes of all training prompts, and of some of each
task's inputs.
"""

import random
from collections.abc import Sequence

import torch

from ltdi_peft.attributes import (
    FILE,
    AttributeClassifier,
    classifier_plan,
    fit_classifier,
    load_classifier,
    reading_inputs,
    save_classifier,
)
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe
from ltdi_peft.encoding import tasks_with_runs
from ltdi_peft.kept import hashed
from ltdi_peft.multi_task import require_same_plan
from ltdi_peft.prepare import EXAMPLE_POOL, prompt_conditions
from ltdi_peft.task import Task

INPUT_DRAWS, MOST_INPUTS = 8, 16  # of each training task, 1 … 16 inputs each


def recipe_attributes(recipe: Recipe) -> AttributeClassifier | None:
    """What `fit_attributes` wrote for this recipe; None for one without. FileNotFoundError before that."""
    if not recipe.condition.attributes:
        return None
    file = recipe.folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: this recipe reads attributes. Run `ltdi train` with it first."
        )
    return load_classifier(file)


def fit_attributes(bench: Bench, encoder: PromptEncoder, *, progress: bool = True) -> None:
    """Fit the recipe's classifier on what `encoder` makes of prompts, and write it, unless it is there.

    ValueError where no training task has attributes, and for a file that was made by another plan.
    """
    recipe = bench.recipe
    if not recipe.condition.attributes:
        return
    names = tasks_with_runs(recipe, [task.name for task in bench.suite.split("train")])
    tasks = [bench.suite[name] for name in names]
    texts = [[t.name, list(t.prompts), list(t.attributes), drawn_inputs(t)] for t in tasks]
    plan = {"encoder": hashed(encoder.identity()), "tasks": hashed({"tasks": texts})}
    file = recipe.folder / FILE
    if file.is_file():
        require_same_plan(file, classifier_plan(file), plan)
        return
    conditions = prompt_conditions(encoder, tasks, keep=recipe.folder / "cache", progress=progress)
    classifier = fit_classifier(conditions, [task.attributes for task in tasks])
    save_classifier(told_inputs(classifier, encoder, tasks), file, plan)


def told_inputs(
    classifier: AttributeClassifier, encoder: PromptEncoder, tasks: Sequence[Task]
) -> AttributeClassifier:
    """It reads inputs as well, unless a training task has no examples to draw them from."""
    if not all(task.train for task in tasks):
        return classifier
    found = encoder.about([inputs for task in tasks for inputs in drawn_inputs(task)])
    return reading_inputs(classifier, torch.stack(found.split(INPUT_DRAWS)), [t.attributes for t in tasks])


def drawn_inputs(task: Task) -> list[list[str]]:
    """Of the task's first training examples; depends on its name alone. Empty without examples."""
    pool = [example.input for example in task.train[:EXAMPLE_POOL]]
    draws = [random.Random(f"inputs/{task.name}/{index}") for index in range(INPUT_DRAWS)]
    return [rng.sample(pool, min(rng.randint(1, MOST_INPUTS), len(pool))) for rng in draws] if pool else []
