"""The attribute classifier of a recipe, fitted once.

In: a recipe with `condition.attributes`, a bench.  Out: `<output>/attributes.safetensors`.
Idea: it reads what the recipe's own encoder, tuned or not, makes of all training prompts.
"""

from ltdi_peft.attributes import (
    FILE,
    AttributeClassifier,
    classifier_plan,
    fit_classifier,
    load_classifier,
    save_classifier,
)
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe
from ltdi_peft.encoding import tasks_with_runs
from ltdi_peft.kept import hashed
from ltdi_peft.multi_task import require_same_plan
from ltdi_peft.prepare import prompt_conditions


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
    texts = [[task.name, list(task.prompts), list(task.attributes)] for task in tasks]
    plan = {"encoder": hashed(encoder.identity()), "tasks": hashed({"tasks": texts})}
    file = recipe.folder / FILE
    if file.is_file():
        require_same_plan(file, classifier_plan(file), plan)
        return
    conditions = prompt_conditions(encoder, tasks, keep=recipe.folder / "cache", progress=progress)
    save_classifier(fit_classifier(conditions, [task.attributes for task in tasks]), file, plan)
