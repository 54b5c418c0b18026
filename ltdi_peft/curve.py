"""Accuracy against gradient steps, from three origins, and the steps to 95 % of the oracle's gain.

In: what the few-shot ladder has, and what base model and oracle score on each task.
Out: {"points": [0, 1, …], "generated": {"accuracy": […], "steps_to_95": …, "per_task": {…}}, "start": …, …}.
Idea: at a constant learning rate the adapter after s steps of a long run is that of a run of s steps, so one
run gives the whole curve. Each origin has its own rate, the one with the best mean over the curve on
validation tasks: points are spaced like a geometric series, so early steps count as much as late ones.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltdi_peft.baselines import ENOUGH
from ltdi_peft.batched import Stacked, stack_adapters
from ltdi_peft.collect import run_seed
from ltdi_peft.config import FitConfig
from ltdi_peft.few_shot import CONTEXTS, ORIGINS, FewShot, best_rate, lines_of, origins
from ltdi_peft.fit import fit_steps, make_pool
from ltdi_peft.kept import Line
from ltdi_peft.score import Sheet, make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task

COLUMNS = {"accuracy": "prompt", "accuracy_no_prompt": "no_prompt"}  # of a result → context


@dataclass(frozen=True)
class Climb:
    """One curve to take: where it begins, and its learning rate."""

    origin: str
    rate: float


def curve(
    few: FewShot,
    tasks: Sequence[Task],
    validation: Sequence[Task],
    ends: Mapping[str, Line],
    *,
    steps: int = 96,
    progress: bool = True,
) -> dict[str, Any]:
    """Curves of up to `steps` steps on all training rows of each task; for a result's "curve".

    ends: task → accuracy of base and oracle, as `ends_of` finds it. Origins: the generated adapter,
    `few.start`, the fresh one; their grids of rates are those of the ladder's roads that begin there. Raises
    ValueError, before anything is trained, for a task without training or evaluation examples or without
    its ends.
    """
    require_curves(tasks, ends)
    points = curve_points(steps)
    chosen = chosen_rates(few, validation, points, progress=progress)
    climbs = {origin: Climb(origin, chosen[origin]["learning_rate"]) for origin in chosen}

    def lines(group: list[Task]) -> list[Line]:
        return take_curves(few, group, climbs, points, few.examples, CONTEXTS)

    about = {"curve": {origin: climb.rate for origin, climb in climbs.items()}, "examples": few.examples}
    about |= {"points": points, "rows": few.bench.recipe.collect.rows}
    found = lines_of(few, about, tasks, lines, desc="steps", progress=progress)
    found = {name: line | ends[name] for name, line in found.items()}
    rows = {origin: curve_row(found, origin, points) | chosen[origin] for origin in climbs}
    return {"points": points, **{name: means_of(found, name) for name in ("base", "oracle")}, **rows}


def require_curves(tasks: Sequence[Task], ends: Mapping[str, Line]) -> None:
    """ValueError for a task without oracle, training or evaluation examples."""
    for task in tasks:
        if task.name not in ends or not task.train or not task.evaluation:
            raise ValueError(
                f"task {task.name!r} needs its oracle, training and evaluation examples for a curve; it has "
                f"{len(task.train)} and {len(task.evaluation)} examples, oracle: {task.name in ends}."
            )


def curve_points(steps: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … and `steps`: powers of two and halfway between them."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a curve has at least 1 step.")
    powers = [2**i for i in range(steps.bit_length())]
    between = [3 * power // 2 for power in powers[1:]]
    return sorted({0, steps, *(point for point in (*powers, *between) if point <= steps)})


def chosen_rates(
    few: FewShot, validation: Sequence[Task], points: list[int], *, progress: bool
) -> dict[str, dict[str, Any]]:
    """Origin → the rate with the best mean accuracy over points and validation tasks, prompt in context."""
    grids = {origin: few.rates[method] for method, origin in ORIGINS.items()}
    if all(len(grid) == 1 for grid in grids.values()):
        return {origin: {"learning_rate": grid[0]} for origin, grid in grids.items()}
    climbs = {f"{origin}/{rate}": Climb(origin, rate) for origin, grid in grids.items() for rate in grid}
    examples = few.validation_examples

    def lines(group: list[Task]) -> list[Line]:
        return take_curves(few, group, climbs, points, examples, CONTEXTS[:1])

    about = {"curve_trials": grids, "points": points, "examples": examples}
    about |= {"rows": few.bench.recipe.collect.rows}
    found = lines_of(few, about, validation, lines, desc="steps: rates", progress=progress)
    return {o: best_rate(found, {rate: f"{o}/{rate}" for rate in grid}) for o, grid in grids.items()}


def take_curves(
    few: FewShot,
    tasks: list[Task],
    climbs: dict[str, Climb],
    points: list[int],
    examples: int,
    contexts: Sequence[str],
) -> list[Line]:
    """Per task, climb → context → accuracy at every point. A and B are trained, at a constant rate."""
    bench = few.bench
    pools = [make_pool(bench.adapted, task, bench.recipe.collect.rows) for task in tasks]
    begin = [origins(few, task) for task in tasks]
    sheets = [sheets_of(few, task, examples, contexts) for task in tasks]
    lines: list[Line] = [{} for _ in tasks]
    for name, climb in climbs.items():
        stacked = stack_adapters([one[climb.origin] for one in begin], bench.adapted.device)
        config = FitConfig(points[-1], few.batch_size, climb.rate, schedule="constant", warmup=0.0)
        seeds = [run_seed(bench.recipe.seed, 0)] * len(tasks)
        found = [accuracies_now(few, sheets, stacked)]
        for step in fit_steps(bench.adapted, stacked, pools, config, seeds=seeds, train_a=True):
            if step.index in points:
                found.append(accuracies_now(few, sheets, stacked))
        for index, line in enumerate(lines):
            line[name] = {context: [at[index][context] for at in found] for context in contexts}
    return lines


def sheets_of(few: FewShot, task: Task, examples: int, contexts: Sequence[str]) -> dict[str, Sheet]:
    """The task's evaluation examples in each context."""
    return {
        context: make_sheet(
            few.bench.adapted,
            task.evaluation[:examples],
            task.held_out_prompts if context == "prompt" else None,
        )
        for context in contexts
    }


def accuracies_now(
    few: FewShot, sheets: Sequence[dict[str, Sheet]], stacked: Stacked
) -> list[dict[str, float]]:
    """Accuracy of each task's adapter as it is, by context."""
    return [
        {
            context: round(score(few.bench.adapted, sheet, only(stacked, index)).accuracy.item(), 6)
            for context, sheet in own.items()
        }
        for index, own in enumerate(sheets)
    ]


def only(stacked: Stacked, index: int) -> Stacked:
    """Adapter `index` alone, not a copy."""
    return {site: (a[index : index + 1], b[index : index + 1]) for site, (a, b) in stacked.items()}


def ends_of(few: FewShot, task: Task, oracle: Adapter) -> Line:
    """Accuracy of the base model (a fresh adapter does nothing) and of the oracle."""
    stacked = stack_adapters([few.bench.fresh, oracle], few.bench.adapted.device)
    line: Line = {"base": {}, "oracle": {}}
    for context, sheet in sheets_of(few, task, few.examples, CONTEXTS).items():
        values = score(few.bench.adapted, sheet, stacked).accuracy.tolist()
        line["base"][context], line["oracle"][context] = (round(value, 6) for value in values)
    return line


# ---- numbers from lines


def means_of(found: dict[str, Line], name: str) -> dict[str, float]:
    """Mean over the tasks, in both contexts."""
    return {
        key: round(statistics.fmean(line[name][context] for line in found.values()), 6)
        for key, context in COLUMNS.items()
    }


def curve_row(found: dict[str, Line], origin: str, points: list[int]) -> dict[str, Any]:
    """Mean curve and each task's, with the steps to 95 % of the oracle's gain (prompt in context).

    steps_to_95: of the mean curve, None where it is not reached. median_steps_to_95: over the tasks on which
    the oracle gains anything; a task that does not get there counts as infinitely many.
    """
    mean = {
        key: [
            round(statistics.fmean(values), 6)
            for values in zip(*(line[origin][context] for line in found.values()), strict=True)
        ]
        for key, context in COLUMNS.items()
    }
    per_task = {
        name: {key: line[origin][context] for key, context in COLUMNS.items()}
        | {"steps_to_95": steps_to(points, line[origin]["prompt"], *bounds(line))}
        for name, line in found.items()
    }
    gaining = [name for name, line in found.items() if bounds(line)[1] > bounds(line)[0]]
    taken = [math.inf if (s := per_task[name]["steps_to_95"]) is None else s for name in gaining]
    middle = statistics.median(taken) if taken else math.inf
    base, oracle = (means_of(found, name)["accuracy"] for name in ("base", "oracle"))
    return mean | {
        "steps_to_95": steps_to(points, mean["accuracy"], base, oracle),
        "median_steps_to_95": middle if math.isfinite(middle) else None,
        "reached": sum(math.isfinite(s) for s in taken),
        "gaining": len(gaining),
        "per_task": per_task,
    }


def bounds(line: Line) -> tuple[float, float]:
    """Accuracy of base and oracle, prompt in context."""
    return line["base"]["prompt"], line["oracle"]["prompt"]


def steps_to(points: Sequence[int], accuracy: Sequence[float], base: float, oracle: float) -> int | None:
    """The first point with 95 % of oracle − base; None where there is no gain, or it is not reached."""
    if oracle <= base:
        return None
    wanted = base + ENOUGH * (oracle - base)
    return next((p for p, value in zip(points, accuracy, strict=True) if value >= wanted), None)
