"""Targets: what counts as met, as missed, as not measured."""

from copy import deepcopy
from typing import Any

import pytest

from ltdi_peft.targets import RIVALS, Target, targets, targets_table

WON = {"accuracy": 0.05, "ci": [0.01, 0.09]}
LEVEL = {"accuracy": 0.05, "ci": [-0.01, 0.11]}
GAP = {"right": 0.9, "wrong": 0.4, "ci": [0.3, 0.6]}
ROW = {"G": 0.95, "ci": [0.9, 0.99]}
CURVE = {
    "points": [0, 1, 2, 4, 8, 16, 32],
    "generated": {"steps_to_95": 2},
    "start": {"steps_to_95": 4},
    "fresh": {"steps_to_95": 16},
}
RESULT: dict[str, Any] = {
    "methods": {"ours": {"unseen_tasks": ROW, "unseen_domains": ROW}},
    "paired": {f"ours - {rival}": {"unseen_tasks": WON, "unseen_domains": WON} for rival in RIVALS},
    "controls": {"prompt": {"unseen_tasks": {**GAP, "no_prompt": GAP}}},
    "few_shot": {"16": {"best_of": {"accuracy": 0.9}, "lora": {"accuracy": 0.8}}},
    "curve": CURVE,
    "cost": {"speed_up": {"batch_1": 1200.0, "batch_32": 150.0}},
}
EMPTY: dict[str, Any] = {"methods": {}, "paired": {}, "controls": {"prompt": {}}}


def found(result: dict[str, Any], figure: str) -> list[Target]:
    """The targets whose figure begins so."""
    return [target for target in targets(result) if target.figure.startswith(figure)]


def answers(result: dict[str, Any], figure: str) -> list[tuple[bool | None, ...]]:
    """Met or not, of both columns."""
    return [
        tuple(verdict and verdict[1] for verdict in (target.first, target.then))
        for target in found(result, figure)
    ]


def changed(*path: str, to: object) -> dict[str, Any]:
    """The result with one value replaced."""
    result = deepcopy(RESULT)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return result


def test_a_result_that_reaches_nearly_all():
    missed = [
        target.figure
        for target in targets(RESULT)
        if any(verdict and verdict[1] is False for verdict in (target.first, target.then))
    ]
    assert missed == ["steps to 95 % of the oracle's gain", "speed-up over fine-tuning, batch of 32"]


def test_what_a_recipe_did_not_measure_is_said():
    assert all(target.found == "" for target in targets(EMPTY))
    verdicts = [v for target in targets(EMPTY) for v in (target.first, target.then) if v]
    assert {met for _, met in verdicts} == {None}
    assert targets_table(EMPTY).count("not measured") == len(list(targets(EMPTY)))


@pytest.mark.parametrize("split", ["unseen_tasks", "unseen_domains"])
def test_a_difference_whose_interval_holds_zero_is_missed(split: str):
    name = f"{split.replace('_', ' ')}: accuracy over `multi_task_lora`"
    path = ("paired", "ours - multi_task_lora", split)
    assert answers(RESULT, name) == [(True, None)]
    assert answers(changed(*path, to=LEVEL), name) == [(False, None)]
    assert answers(changed(*path, to={"accuracy": 0.5, "ci": None}), name) == [(False, None)]


def test_recovered_gain_has_its_bound():
    assert answers(RESULT, "unseen domains: G") == [(None, True)]
    low = changed("methods", "ours", "unseen_domains", to={"G": 0.49, "ci": None})
    assert answers(low, "unseen domains: G") == [(None, False)]


def test_examples_alone_must_beat_training_on_them():
    assert answers(RESULT, "16 examples") == [(True, None)]
    assert answers(changed("few_shot", "16", "lora", "accuracy", to=0.9), "16 examples") == [(False, None)]
    row = {"accuracy": 0.9, "G": 0.95, "ci": [0.9, 1.0], "over_lora": 0.1, "over_lora_ci": [0.02, 0.18]}
    for change, verdict in (
        ({}, (True, True)),
        ({"G": 0.89}, (True, False)),
        ({"over_lora_ci": [-0.01, 0.2]}, (False, True)),
        ({"over_lora_ci": None}, (False, True)),
    ):
        result = changed("few_shot", "16", "best_of", to={**row, **change})
        assert answers(result, "16 examples") == [verdict]


def test_the_prompt_gap_needs_interval_and_size():
    row = {"right": 0.9, "wrong": 0.85, "ci": [0.01, 0.09]}
    small = changed("controls", "prompt", "unseen_tasks", to={**row, "no_prompt": row})
    assert answers(RESULT, "unseen tasks: G(right") == [(True, True), (True, True)]
    assert answers(small, "unseen tasks: G(right") == [(True, False), (False, False)]


@pytest.mark.parametrize(
    ("ours", "start", "fresh", "times", "fewer"),
    [
        (2, 4, 16, (True, False), True),
        (2, 2, 32, (True, True), False),
        (0, None, 8, (True, False), True),  # no step at all counts as one
        (4, None, None, (True, False), True),  # from scratch: more than the 32 of the curve
        (None, None, None, (False, False), False),
    ],
)
def test_steps_are_compared_with_both_origins(
    ours: int | None, start: int | None, fresh: int | None, times: tuple[bool, bool], fewer: bool
):
    numbers = {"generated": ours, "start": start, "fresh": fresh}
    curve = CURVE | {name: {"steps_to_95": count} for name, count in numbers.items()}
    assert answers(changed("curve", to=curve), "steps to") == [times, (fewer, None)]


def test_speed_up_has_two_bounds():
    assert answers(RESULT, "speed-up") == [(True, True), (True, False)]
