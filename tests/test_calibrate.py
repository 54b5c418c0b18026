"""Calibration: on training examples that the LoRA did not see; kept; refused under other settings."""

from dataclasses import replace

import pytest
from tiny_bench import tiny_bench, tiny_recipe

from ltdi_peft import calibrate as room
from ltdi_peft.calibrate import CALIBRATION_FILE, FIT, calibrate, measured, parted
from ltdi_peft.score import chance
from ltdi_peft.task import Example, Task

FAST = replace(FIT, steps=2)


@pytest.fixture
def bench(tmp_path):
    return tiny_bench(tiny_recipe(tmp_path / "run"))


def test_the_lora_does_not_see_what_it_is_scored_on():
    train = [(f"in {n}", "x") for n in range(200)]
    task = Task("t", ["p"], train=train, evaluation=[("other", "y")])
    part, held = parted(task)
    assert (len(part.train), len(held)) == (200 - room.HELD_OUT, room.HELD_OUT)
    assert (*part.train, *held) == task.train
    few = replace(task, train=task.train[:10])
    assert [len(one) for one in (parted(few)[0].train, parted(few)[1])] == [5, 5]


def test_figures_of_every_task(bench):
    found = calibrate(bench, fit=FAST, progress=False)
    assert list(found) == list(bench.suite.tasks)
    for values in found.values():
        assert list(values) == ["base", "oracle", "chance", "constant"]
        assert values["chance"] == pytest.approx(1 / 3, abs=1e-4)
        assert all(0 <= value <= 1 for value in values.values())


def test_a_lora_that_learns_gains(bench):
    """One fixed answer among three is learned in a few steps; without a step the gain is exactly 0."""
    examples = [Example(f"w{n % 7} w{n % 5}", "w19", ("w19", "w18", "w17")) for n in range(24)]
    task = Task("fixed", ["say a"], train=examples)
    trained = measured(bench, [task], replace(FIT, steps=30, learning_rate=3e-2))["fixed"]
    assert trained["oracle"] == trained["constant"] == 1.0
    still = measured(bench, [task], replace(FIT, steps=1, learning_rate=1e-12))["fixed"]
    assert still["oracle"] == still["base"] < 1.0


def test_what_is_measured_is_kept(bench, monkeypatch):
    names = list(bench.suite.tasks)
    tasks = [bench.suite[name] for name in names]
    first = calibrate(bench, tasks[:5], fit=FAST, progress=False)
    asked = []
    original = room.measured

    def watched(bench, group, fit):
        asked.extend(task.name for task in group)
        return original(bench, group, fit)

    monkeypatch.setattr(room, "measured", watched)
    whole = calibrate(bench, tasks, fit=FAST, progress=False)
    assert sorted(asked) == sorted(names[5:])  # the killed run's five are not measured again
    assert {name: whole[name] for name in names[:5]} == first
    again = tiny_bench(bench.recipe)
    assert calibrate(again, tasks, fit=FAST, progress=False) == whole
    assert len(asked) == len(names[5:])


def test_other_settings_are_refused(bench):
    calibrate(bench, [bench.suite["a/first/plain"]], fit=FAST, progress=False)
    with pytest.raises(ValueError, match=rf"{CALIBRATION_FILE} was measured with other \['fit.steps'\]"):
        calibrate(bench, fit=replace(FAST, steps=3), progress=False)


def test_a_task_too_small_is_named(bench):
    with pytest.raises(ValueError, match="task 'one' has 1 training examples; calibrating needs at least 2"):
        calibrate(bench, [Task("one", ["p"], train=[("a", "b")])], progress=False)


def test_chance():
    two, free = Example("a", "x", ("x", "y")), Example("b", "z")
    assert chance([two]) == 0.5
    assert chance([two, free]) == 0.25
