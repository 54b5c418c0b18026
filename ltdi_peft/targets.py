"""What the evaluation is meant to reach, and what a result reached.

In: the result of `evaluate`.  Out: one row a target: what was found, and whether that meets either column.
Idea: targets stand beside the figures of the same run, the missed ones too; a figure that a recipe does not
measure says so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ltdi_peft.tables import lines_of, shown

RIVALS = ("multi_task_lora", "multi_task_lora_4x", "mean", "nearest", "ridge", "t2l_sft")
SHOTS = "16"  # examples of the few-shot target
FEWER_STEPS = (5, 10)  # times fewer than from scratch
SPEED_UP = (100, 1000)
Verdict = tuple[str, bool | None]  # what is wanted, and whether it is so; None: not measured


@dataclass(frozen=True)
class Target:
    """A figure, its value as text (empty: not measured), and its two columns (None: no target)."""

    figure: str
    found: str
    first: Verdict | None
    then: Verdict | None = None


def targets(result: dict[str, Any]) -> Iterator[Target]:
    """All of them, in the order of the protocol."""
    for rival in RIVALS:
        yield above(result, "unseen_tasks", rival)
    yield recovered(result, "unseen_tasks", 0.90)
    yield above(result, "unseen_domains", "multi_task_lora")
    yield recovered(result, "unseen_domains", 0.50)
    yield few_shot(result)
    yield from prompt_gaps(result)
    yield from steps(result)
    yield from speed_up(result)


def above(result: dict[str, Any], split: str, rival: str) -> Target:
    """Paired accuracy of ours and a rival, prompt in context."""
    pair = result["paired"].get(f"ours - {rival}", {}).get(split)
    figure = f"{split.replace('_', ' ')}: accuracy over `{rival}`"
    if pair is None:
        return Target(figure, "", ("interval above 0", None))
    met = pair["ci"] is not None and pair["ci"][0] > 0
    return Target(figure, shown(pair["accuracy"], pair["ci"], "+", digits=3), ("interval above 0", met))


def recovered(result: dict[str, Any], split: str, wanted: float) -> Target:
    """G of ours, prompt in context."""
    row = result["methods"].get("ours", {}).get(split)
    value = None if row is None else row["G"]
    found = "" if row is None or value is None else shown(value, row["ci"])
    return Target(f"{split.replace('_', ' ')}: G", found, None, reaches(value, wanted))


def few_shot(result: dict[str, Any]) -> Target:
    """The best candidate by its loss on the examples, against a LoRA trained on them."""
    rows = result.get("few_shot", {}).get(SHOTS)
    figure, about = f"{SHOTS} examples, no gradient step: accuracy", "above a LoRA trained on them"
    if rows is None:
        return Target(figure, "", (about, None), reaches(None, 0.90))
    ours, lora = rows["best_of"], rows["lora"]
    found = f"{shown(ours['accuracy'])} against {shown(lora['accuracy'])}"
    if "over_lora_ci" not in ours:  # a result from before G was measured there
        return Target(figure, found, (about, ours["accuracy"] > lora["accuracy"]), reaches(None, 0.90))
    gap = ours["over_lora_ci"]
    found = f"{found}, {shown(ours['over_lora'], gap, '+', digits=3)}; G {shown(ours['G'], ours['ci'])}"
    return Target(figure, found, (about, gap is not None and gap[0] > 0), reaches(ours["G"], 0.90))


def prompt_gaps(result: dict[str, Any]) -> Iterator[Target]:
    """G(right prompt) − G(wrong prompt), with the prompt in context and without."""
    row = result["controls"]["prompt"].get("unseen_tasks")
    figure = "unseen tasks: G(right prompt) − G(wrong)"
    gap, found = gap_of(row)
    ahead = None if row is None else bool(row["ci"]) and row["ci"][0] > 0
    yield Target(figure, found, ("interval above 0", ahead), reaches(gap, 0.10))
    gap, found = gap_of(row and row["no_prompt"])
    yield Target(f"{figure}, no prompt in context", found, reaches(gap, 0.20), reaches(gap, 0.40))


def gap_of(row: dict[str, Any] | None) -> tuple[float | None, str]:
    """Right − wrong, as number and text."""
    if row is None:
        return None, ""
    gap = row["right"] - row["wrong"]
    return gap, shown(gap, row["ci"], "+")


def reaches(value: float | None, wanted: float) -> Verdict:
    """Whether a figure is as large as wanted."""
    return f"≥ {wanted:.2f}", None if value is None else value >= wanted


def steps(result: dict[str, Any]) -> Iterator[Target]:
    """Gradient steps to 95 % of the oracle's gain: from the generated adapter, the start, from scratch."""
    curve = result.get("curve")
    names = ("generated", "fresh", "start")
    ours, fresh, start = (curve[name]["steps_to_95"] if curve else None for name in names)
    figure, (few, fewer) = "steps to 95 % of the oracle's gain", FEWER_STEPS
    wanted = [f"{times}× fewer than from scratch" for times in (few, fewer)]
    if curve is None:
        yield Target(figure, "", (wanted[0], None), (wanted[1], None))
        return
    found = f"{said(ours)}; from scratch {said(fresh)}, from the multi-task LoRA {said(start)}"
    scratch = curve["points"][-1] + 1 if fresh is None else fresh  # at least that many
    met = [ours is not None and scratch >= times * max(ours, 1) for times in (few, fewer)]
    yield Target(figure, found, (wanted[0], met[0]), (wanted[1], met[1]))
    ahead = ours is not None and (start is None or ours < start)
    yield Target(figure, found, ("fewer than from the multi-task LoRA", ahead))


def said(count: int | None) -> str:
    """A number of steps, or that the curve ends before it."""
    return "not reached" if count is None else str(count)


def speed_up(result: dict[str, Any]) -> Iterator[Target]:
    """Seconds of the fastest fine-tune over seconds of generating, one adapter at a time and in a batch."""
    for key in ("batch_1", "batch_32"):
        value = result.get("cost", {}).get("speed_up", {}).get(key)
        figure = f"speed-up over fine-tuning, {key.replace('_', ' of ')}"
        verdicts = [(f"{times}×", None if value is None else value >= times) for times in SPEED_UP]
        yield Target(figure, "" if value is None else f"{value:.0f}×", verdicts[0], verdicts[1])


def targets_table(result: dict[str, Any]) -> str:
    """All of a result's, as Markdown."""
    return target_lines(targets(result))


def target_lines(found: Iterable[Target]) -> str:
    """These, as Markdown."""
    rows = [
        [target.figure, target.found or "not measured", verdict(target.first), verdict(target.then)]
        for target in found
    ]
    return lines_of(["figure", "found", "first target", "then"], rows)


def verdict(one: Verdict | None) -> str:
    """What is wanted, with the answer where there is one."""
    if one is None:
        return ""
    wanted, met = one
    return wanted if met is None else f"{wanted}: {'met' if met else '**missed**'}"
