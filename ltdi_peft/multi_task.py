"""One LoRA for all training tasks: the multi-task rival at two ranks, and what the answers' form alone buys.

In: a bench with collected runs.  Out: adapters in `<output>/<method>/`, each with its plan and its validation
curve in `curve.json`; what is being trained goes on after an interruption.
Idea: a rival is only worth beating at its best, so each is trained on at least as many examples as all single
runs together and the best of its curve on validation tasks is kept. What was made is never made again, and
refused by a recipe with another plan.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ltdi_peft.adapter import load_adapter_folder, save_adapter_folder
from ltdi_peft.baselines import adapter_digest, mean_accuracy
from ltdi_peft.batched import stack_adapters, unstack_adapter
from ltdi_peft.collect import Bench, lay_out, shared_start
from ltdi_peft.config import FitConfig, Recipe, to_dict
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.fit import FitState, Pool, fit_steps, joined, make_pool
from ltdi_peft.fit_point import POINT_FILE, FitPoint
from ltdi_peft.score import make_sheet
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task
from ltdi_peft.trajectory import flat, unflat

EVERY = 100  # steps between two validation scores
VALIDATION_EXAMPLES = 24  # of each validation task, at each of these scores
WIDER = 4  # times the rank of the recipe: `multi_task_lora_4x`

Trained = tuple[Adapter, dict[str, Any]]
"""The adapter that was best on validation tasks, and steps, examples and curve as JSON."""


# ---- the three


def train_multi_task_lora(bench: Bench, *, progress: bool = True) -> Trained:
    """The multi-task LoRA, from the shared start, with every prompt in context; made once.

    Raises ValueError when the folder holds one that was made by another plan.
    """
    start = shared_start(bench, progress=progress)
    tasks, plan = bench.suite.split("train"), multi_task_plan(bench, start)
    return made_once(bench, "multi_task_lora", plan, start, tasks, progress=progress)


def train_wide_multi_task_lora(wide: Bench, *, progress: bool = True) -> Trained:
    """The multi-task LoRA of a `widened` bench, from its fresh adapter; made once.

    It sees as many examples in all as `multi_task_lora`. Raises ValueError when the folder holds one that was
    made by another plan.
    """
    tasks, plan = wide.suite.split("train"), wide_plan(wide)
    return made_once(wide, "multi_task_lora_4x", plan, wide.fresh, tasks, progress=progress)


def train_format_only(bench: Bench, *, progress: bool = True) -> Trained:
    """A LoRA on all training tasks with their answers shuffled, fitted as the shared start; made once.

    What is better than this has learned more than what answers look like. Raises ValueError when the folder
    holds one that was made by another plan.
    """
    recipe = bench.recipe
    tasks = [shuffled(task, recipe.collect.rows, recipe.seed) for task in bench.suite.split("train")]
    return made_once(bench, "format_only", format_plan(bench), bench.fresh, tasks, progress=progress)


def widened(bench: Bench, times: int = WIDER) -> Bench:
    """The bench for adapters of `times` rank and alpha on the same sites: the scaling, alpha/rank, stays."""
    adapter = bench.recipe.adapter
    if bench.recipe.collect.start == "recorded":
        raise ValueError(
            "multi_task_lora_4x widens the LoRA of the recipe, but collect.start is 'recorded': leave it out "
            "of evaluate.methods."
        )
    wider = replace(adapter, rank=times * adapter.rank, alpha=times * adapter.alpha)
    return lay_out(replace(bench.recipe, adapter=wider), bench.suite, bench.base)


def shuffled(task: Task, rows: int, seed: int) -> Task:
    """The task with the answers of its first `rows` training examples in random order, and no other example.

    The order depends on seed and name alone. Some answers may stay where they were: an order that moved all
    of them would tell what an answer is not. Choices are dropped: training reads the answer alone.
    """
    examples = task.train[:rows]
    answers = [example.answer for example in examples]
    random.Random(f"{seed}/{task.name}").shuffle(answers)
    moved = [replace(e, answer=answer, choices=()) for e, answer in zip(examples, answers, strict=True)]
    return Task(task.name, task.prompts, task.domain, task.family, moved)


# ---- what each is trained on, as JSON


def multi_task_plan(bench: Bench, start: Adapter) -> dict[str, Any]:
    """From the shared start on, with every prompt in context.

    `rule` is the number of further steps after which it has seen as many examples as the start, all single
    runs and the origin together; evaluate.multi_task_steps may say another.
    """
    recipe = bench.recipe
    single, multi = recipe.collect.single, recipe.collect.multi_task
    seen = len(bench.suite.split("train")) * recipe.collect.seeds * single.steps * single.batch_size
    rule = math.ceil(seen / multi.batch_size) + recipe.train.origin_steps
    steps = recipe.evaluate.multi_task_steps or rule
    return {
        **common_plan(bench, start, replace(multi, steps=steps, prompt_in_context=1.0)),
        "rule": rule,
        "shortened": steps < rule,
        "examples": (start_steps(recipe) + steps) * multi.batch_size,
    }


def wide_plan(wide: Bench) -> dict[str, Any]:
    """From the fresh adapter, with as many examples as start and `multi_task_plan` together."""
    plan, before = multi_task_plan(wide, wide.fresh), start_steps(wide.recipe)
    adapter = wide.recipe.adapter
    fit = plan["fit"] | {"steps": before + plan["fit"]["steps"]}
    return {**plan, "fit": fit, "rule": before + plan["rule"], "rank": adapter.rank, "alpha": adapter.alpha}


def format_plan(bench: Bench) -> dict[str, Any]:
    """From the fresh adapter, with the settings of the shared start, on shuffled answers."""
    config = bench.recipe.collect.multi_task
    plan = common_plan(bench, bench.fresh, config)
    rows = bench.recipe.collect.rows
    return {**plan, "answers": "shuffled", "rows": rows, "examples": config.steps * config.batch_size}


def common_plan(bench: Bench, start: Adapter, config: FitConfig) -> dict[str, Any]:
    """What every plan names."""
    names = [task.name for task in bench.suite.split("train")]
    digest = adapter_digest(start)
    return {"fit": to_dict(config), "start": digest, "tasks": names, "seed": bench.recipe.seed}


def start_steps(recipe: Recipe) -> int:
    """Steps that the shared start took on all tasks."""
    return recipe.collect.multi_task.steps if recipe.collect.start == "multi_task" else 0


# ---- training


def made_once(
    bench: Bench, name: str, plan: dict[str, Any], start: Adapter, tasks: Sequence[Task], *, progress: bool
) -> Trained:
    """What `<output>/<name>` holds, trained first if it holds nothing whole.

    ValueError when it was made by another plan, naming what differs.
    """
    folder = bench.recipe.folder / name
    if not (folder / "curve.json").is_file():
        config = FitConfig(**plan["fit"])
        recipe = bench.recipe
        halves = {"rows": recipe.collect.rows, "base": to_dict(recipe.base)}
        halves["validation"] = [task.name for task in validation_tasks(bench)]
        point = FitPoint(folder / POINT_FILE, plan | halves)
        adapter, curve = fit_multi_task(bench, start, tasks, config, point, name=name, progress=progress)
        save_adapter_folder(folder, bench.spec, adapter, overwrite=True)
        replace_file(folder / "curve.json", json_bytes({"plan": plan, "curve": curve}))
        point.remove()
    report = read_json(folder / "curve.json")
    require_same_plan(folder, report["plan"], plan)
    shown = ("rule", "shortened", "rank", "examples")
    about = {key: plan[key] for key in shown if key in plan} | {"steps": plan["fit"]["steps"]}
    return load_adapter_folder(folder, expected=bench.spec)[1], about | {"curve": report["curve"]}


def require_same_plan(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError with the names of what differs."""
    if changed := sorted(key for key in new if old.get(key) != new[key]):
        raise ValueError(
            f"{folder} was trained with another {changed}. Remove the folder to train it again, or give the "
            f"run another `output`."
        )


def validation_tasks(bench: Bench) -> list[Task]:
    """The validation tasks that can be scored."""
    return [task for task in bench.suite.split("validation") if task.evaluation]


def fit_multi_task(
    bench: Bench,
    start: Adapter,
    tasks: Sequence[Task],
    config: FitConfig,
    point: FitPoint,
    *,
    name: str,
    progress: bool,
) -> tuple[Adapter, list[dict[str, int | float]]]:
    """Train on `tasks` together; the best adapter on validation tasks (or the start) and the curve.

    Goes on from `point`, which is written at every validation score.
    """
    stacked, state = stack_adapters([start], bench.adapted.device), FitState()
    found = point.load(state, stacked)  # a point of another plan is refused before anything takes long
    sheets = [
        make_sheet(bench.adapted, task.evaluation[:VALIDATION_EXAMPLES], task.held_out_prompts)
        for task in validation_tasks(bench)
    ]
    pool = shared_pool(bench, tasks, config, progress=progress)
    if found:
        best, curve = unflat(found[0], bench.spec), found[1]
    else:
        best, curve = start, [{"step": 0, "accuracy": mean_accuracy(bench, sheets, stacked)}]
    # A and B are both trained, whatever the gauge: the rival need not stay in the frame of the stored runs.
    seeds = [bench.recipe.seed]
    steps = fit_steps(bench.adapted, stacked, [pool], config, seeds=seeds, train_a=True, state=state)
    bar = tqdm(steps, initial=state.step, total=config.steps, desc=name, disable=not progress, unit="step")
    for step in bar:
        if step.index % EVERY == 0 or step.index == config.steps:
            accuracy = mean_accuracy(bench, sheets, stacked)
            # Of equal ones the longest trained: without validation tasks every accuracy is 0.
            if accuracy >= max(point["accuracy"] for point in curve):
                best = unstack_adapter(stacked, 0)
            curve.append({"step": step.index, "accuracy": accuracy})
            point.save(state, stacked, flat(best), curve)
    return best, curve


def shared_pool(bench: Bench, tasks: Sequence[Task], config: FitConfig, *, progress: bool) -> Pool:
    """Training rows of `tasks`, without the prompt too where the fit asks for it.

    No more rows a task than the steps can draw; where the bench keeps as many on disk, those.
    """
    own = bench.recipe.collect
    rows = min(own.rows, math.ceil(config.steps * config.batch_size / len(tasks)))
    bar = tqdm(tasks, desc="lower layers", disable=not progress, unit="task")
    plain = config.prompt_in_context < 1

    def pool(task: Task) -> Pool:
        if own.keep_lower and rows == own.rows and bench.suite.tasks.get(task.name) is task:
            return bench.pool(task)  # with plain rows, which a fit without them does not draw
        return make_pool(bench.adapted, task, rows, plain=plain)

    return joined([pool(task) for task in bar])
