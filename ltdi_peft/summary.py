"""From task scores to the numbers of the result file.

In: one `TaskScores` a task.
Out: the sections methods, paired, controls, power and per_task of EVALUATION's result file.
Idea: nothing here runs a model, so every claim of a result can be recomputed from its own `per_task`.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltdi_peft.statistics import Estimate, gain_difference, mean_difference, recovered_gain

CONTEXTS = ("prompt", "no_prompt")  # whether the task prompt is in the model's context
UNSEEN = ("unseen_tasks", "unseen_domains")
FEW_DOMAINS = 8  # with fewer clusters an interval says little, so the domains are listed
RIVALS = (
    "multi_task_lora",
    "multi_task_lora_4x",
    "ridge",
    "nearest",
    "mean",
    "start",
    "base",
)  # whose difference the power is given for, in turn


@dataclass(frozen=True)
class TaskScores:
    """What was measured on one task; several values of a method are its seeds with their prompts."""

    task: str
    split: str
    domain: str
    examples: int
    chance: float  # accuracy of guessing among the choices, 0 where there are none
    accuracy: dict[str, dict[str, list[float]]]  # context → method → values
    nearest: dict[str, list[float]]  # "ours", "oracle" → ΔW distance to the nearest stored adapter
    error: dict[str, float]  # method → ‖ΔW − ΔW_oracle‖ / ‖ΔW_oracle‖, mean over its adapters, if comparable
    wrong_tasks: list[str]  # whose prompts the wrong-prompt control used
    same_format: bool  # whether those tasks have this task's answer format

    def mean(self, context: str, method: str) -> float:
        """Accuracy, averaged over seeds."""
        return statistics.fmean(self.accuracy[context][method])


@dataclass(frozen=True)
class Column:
    """One split in one context: mean accuracy a task, for every method."""

    accuracy: dict[str, Tensor]
    tasks: tuple[TaskScores, ...]
    clusters: tuple[str, ...]
    draws: int
    seed: int

    def gain(self, method: str) -> Estimate:
        """Recovered gain of a method."""
        base, oracle = self.accuracy["base"], self.accuracy["oracle"]
        return recovered_gain(
            self.accuracy[method], base, oracle, self.clusters, draws=self.draws, seed=self.seed
        )

    def gain_difference(self, left: str, right: str) -> Estimate:
        """G(left) − G(right), paired."""
        a, b, base, oracle = (self.accuracy[name] for name in (left, right, "base", "oracle"))
        return gain_difference(a, b, base, oracle, self.clusters, draws=self.draws, seed=self.seed)

    def accuracy_difference(self, left: str, right: str) -> Estimate:
        """Mean accuracy difference, paired."""
        a, b = self.accuracy[left], self.accuracy[right]
        return mean_difference(a, b, self.clusters, draws=self.draws, seed=self.seed)


Columns = dict[str, dict[str, Column]]
"""Split → context → column."""


def columns_of(scores: Sequence[TaskScores], *, draws: int, seed: int) -> Columns:
    """Every split that has tasks; unseen domains are resampled by domain."""
    found: Columns = {}
    for split in UNSEEN:
        tasks = tuple(one for one in scores if one.split == split)
        if not tasks:
            continue
        clusters = tuple(one.domain if split == "unseen_domains" else one.task for one in tasks)
        methods = list(tasks[0].accuracy["prompt"])
        found[split] = {
            context: Column(
                {
                    m: torch.tensor([one.mean(context, m) for one in tasks], dtype=torch.float64)
                    for m in methods
                },
                tasks,
                clusters,
                draws,
                seed,
            )
            for context in CONTEXTS
        }
    return found


def summarise(scores: Sequence[TaskScores], *, draws: int, seed: int) -> dict[str, Any]:
    """The result's sections that follow from the scores alone. ValueError without any task."""
    columns = columns_of(scores, draws=draws, seed=seed)
    if not columns:
        raise ValueError("no scores of unseen tasks or unseen domains to summarise.")
    methods = list(next(iter(columns.values()))["prompt"].accuracy)
    others = [name for name in methods if name != "ours"] if "ours" in methods else []
    return {
        "methods": {m: {s: method_row(pair, m) for s, pair in columns.items()} for m in methods},
        "paired": {
            f"ours - {other}": {s: paired_row(pair, other) for s, pair in columns.items()} for other in others
        },
        "controls": {
            "prompt": {
                s: prompt_row(pair)
                for s, pair in columns.items()
                if "ours_wrong_prompt" in methods and others
            },
            "memorisation": {s: memorisation_row(pair["prompt"].tasks) for s, pair in columns.items()},
        },
        "power": {s: power_row(pair["prompt"], others) for s, pair in columns.items() if others},
        "per_task": {one.task: dataclasses.asdict(one) for one in scores},
    }


def method_row(pair: dict[str, Column], method: str) -> dict[str, Any]:
    """Accuracy, gain and interval of one method on one split, in both contexts."""
    tasks = pair["prompt"].tasks
    row: dict[str, Any] = {"tasks": len(tasks), "examples": min(one.examples for one in tasks)}
    for context, suffix in (("prompt", ""), ("no_prompt", "_no_prompt")):
        column = pair[context]
        accuracy, gain = column.accuracy[method], column.gain(method)
        row[f"accuracy{suffix}"] = number(float(accuracy.mean()))
        row[f"G{suffix}"], row[f"ci{suffix}"] = number(gain.value), interval(gain)
        row[f"gain{suffix}"] = number(float((accuracy - column.accuracy["base"]).mean()))
        chance = torch.tensor([one.chance for one in tasks]).double()
        if chance.any():
            row[f"accuracy_over_chance{suffix}"] = number(float(((accuracy - chance) / (1 - chance)).mean()))
    if tasks[0].split == "unseen_domains" and len(set(pair["prompt"].clusters)) < FEW_DOMAINS:
        row["domains"] = {d: domain_row(pair, method, d) for d in sorted(set(pair["prompt"].clusters))}
    return row


def domain_row(pair: dict[str, Column], method: str, domain: str) -> dict[str, float | None]:
    """One domain's accuracies and gains, without intervals."""
    row = {}
    for context, suffix in (("prompt", ""), ("no_prompt", "_no_prompt")):
        column = pair[context]
        inside = torch.tensor([cluster == domain for cluster in column.clusters])
        method_, base, oracle = (column.accuracy[m][inside] for m in (method, "base", "oracle"))
        row[f"accuracy{suffix}"] = number(float(method_.mean()))
        row[f"G{suffix}"] = number(recovered_gain(method_, base, oracle, (domain,) * len(base)).value)
    return row


def paired_row(pair: dict[str, Column], other: str) -> dict[str, Any]:
    """`ours` against another method on the same tasks; the accuracy difference is the primary test."""
    with_prompt, without = (difference(pair[context], other) for context in CONTEXTS)
    return {**with_prompt, "no_prompt": without}


def difference(column: Column, other: str) -> dict[str, Any]:
    """Accuracy and gain difference of `ours` and another method in one context."""
    accuracy, gain = column.accuracy_difference("ours", other), column.gain_difference("ours", other)
    return {
        "accuracy": number(accuracy.value),
        "ci": interval(accuracy),
        "G": number(gain.value),
        "ci_G": interval(gain),
        "detectable_G": number(gain.detectable),
    }


def prompt_row(pair: dict[str, Column]) -> dict[str, Any]:
    """Gains with the right and with wrong prompts and of the mean adapter, and whether the prompt is read.

    It is when right − wrong (`ci`) and right − mean (`ci_mean`) are above 0 in both contexts.
    """
    rows, reads = [], []
    for context in CONTEXTS:
        column = pair[context]
        against_wrong = column.gain_difference("ours", "ours_wrong_prompt")
        row = {
            "right": number(column.gain("ours").value),
            "wrong": number(column.gain("ours_wrong_prompt").value),
            "ci": interval(against_wrong),
        }
        reads.append(against_wrong.above_zero)
        if "mean" in column.accuracy:
            against_mean = column.gain_difference("ours", "mean")
            row |= {"mean": number(column.gain("mean").value), "ci_mean": interval(against_mean)}
            reads.append(against_mean.above_zero)
        rows.append(row)
    tasks = pair["prompt"].tasks
    same = sum(one.same_format for one in tasks)
    return {
        **rows[0],
        "no_prompt": rows[1],
        "reads_its_prompt": all(reads),
        "tasks_with_same_format_wrong": same,
    }


def memorisation_row(tasks: Sequence[TaskScores]) -> dict[str, Any]:
    """Medians of ΔW distances and relative ΔW errors. Ratio near 0: it generates what is stored."""
    generated = median(statistics.fmean(one.nearest["ours"]) for one in tasks if "ours" in one.nearest)
    oracle = median(statistics.fmean(one.nearest["oracle"]) for one in tasks)
    errors = {m: median(one.error[m] for one in tasks) for m in tasks[0].error}
    ratio = number(generated / oracle) if generated is not None and oracle else None
    return {
        "generated_to_nearest_stored": generated,
        "oracle_to_nearest_stored": oracle,
        "ratio": ratio,
        "relative_error": errors,
    }


def power_row(column: Column, others: Sequence[str]) -> dict[str, Any]:
    """The smallest difference to the first rival there is that these tasks can show (5 %, power 80 %)."""
    rival = next((name for name in RIVALS if name in others), others[0])
    return {
        "against": rival,
        "G": number(column.gain_difference("ours", rival).detectable),
        "accuracy": number(column.accuracy_difference("ours", rival).detectable),
        "tasks": len(column.tasks),
    }


def median(values: Iterable[float]) -> float | None:
    """The median as JSON, None of nothing."""
    found = list(values)
    return number(statistics.median(found)) if found else None


def number(value: float) -> float | None:
    """A JSON number of 6 digits after the point; what is not finite becomes null."""
    return round(value, 6) if math.isfinite(value) else None


def interval(estimate: Estimate) -> list[float] | None:
    """The 95 % interval as JSON, null where there is none."""
    ends = number(estimate.low), number(estimate.high)
    return None if ends[0] is None or ends[1] is None else [ends[0], ends[1]]
