"""Guidance: chosen on validation tasks, without a trace on generator or base; ties leave the plain one."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from tiny_bench import SPLITS

from ltdi_peft.collect import open_bench
from ltdi_peft.generator import load_generator
from ltdi_peft.guidance import (
    GUIDANCE,
    MEAN_SHARES,
    Guidance,
    Tried,
    choose_guidance,
    guidance_accuracies,
    trials,
    validation_prompts,
)
from ltdi_peft.task import Task

room = importlib.import_module("ltdi_peft.guidance")


@pytest.fixture(scope="module")
def bench(world):
    return open_bench(world.recipe)


def test_choosing_the_guidance_leaves_generator_and_base_alone(world, bench):
    generator = load_generator(world.recipe.generator_folder)
    config, weights = generator.config, [w.clone() for w in generator.state_dict().values()]
    base = [p.clone() for p in bench.base.model.parameters()]
    found = choose_guidance(generator, bench, SPLITS["validation"]).table()
    assert list(found) == [str(share) for share in MEAN_SHARES]
    assert all(list(one) == [str(scale) for scale in GUIDANCE] for one in found.values())
    assert all(0 <= accuracy <= 1 for one in found.values() for accuracy in one.values())
    assert generator.config == config
    assert all(torch.equal(a, b) for a, b in zip(weights, generator.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base, bench.base.model.parameters(), strict=True))


def tried(*accuracies):
    """One trial each: (scale, mean share), then its accuracy on every task."""
    trials_, values = zip(*accuracies, strict=True)
    return Tried(tuple(Guidance(*one) for one in trials_), torch.tensor(values, dtype=torch.float64))


def test_equal_accuracies_leave_the_plain_prediction():
    equal = tried(*(((one.scale, one.mean_share), [0.2, 0.3]) for one in trials("shared_a")))
    assert equal.best() == Guidance(1.0, 1.0)
    for tasks in (0, 1):  # nothing to compare on
        accuracy = torch.zeros(2, tasks, dtype=torch.float64)
        assert Tried((Guidance(2.0, 0.0), Guidance(1.0, 0.0)), accuracy).best() == Guidance(1.0, 1.0)


def test_a_scale_is_left_only_for_one_that_is_ahead_beyond_its_error():
    """Task by task: the same means, once with equal differences and once with a task that decides alone."""
    plain = ((1.0, 1.0), [0.2, 0.4, 0.9, 0.5])
    steady = tried(plain, ((1.5, 1.0), [0.22, 0.42, 0.91, 0.53]))
    assert steady.best() == Guidance(1.5, 1.0)
    lucky = tried(plain, ((1.5, 1.0), [0.18, 0.38, 0.88, 0.64]))
    assert lucky.table() == {"1.0": pytest.approx({"1.0": 0.5, "1.5": 0.52})}
    assert steady.table() == lucky.table()
    assert lucky.best() == Guidance(1.0, 1.0)


def test_the_better_share_wins_and_a_tie_keeps_the_mean():
    flat = tried(*(((scale, share), [0.4, 0.4]) for share in (1.0, 0.0) for scale in (1.0, 2.0)))
    assert flat.best() == Guidance(1.0, 1.0)
    better = tried(((1.0, 1.0), [0.4, 0.4]), ((1.0, 0.0), [0.1, 0.1]), ((2.0, 0.0), [0.5, 0.5]))
    assert better.best() == Guidance(2.0, 0.0)


def test_without_a_start_the_mean_is_never_left_out():
    assert {one.mean_share for one in trials("canonical")} == {1.0}
    assert len(trials("shared_a")) == len(MEAN_SHARES) * len(GUIDANCE)


def test_each_accuracy_is_that_of_its_own_trial(bench, monkeypatch):
    """Every adapter carries its trial in its weights, and a score that reads them must find it again."""
    site = bench.spec.sites[0].name

    def marked(prompt, one):
        mark = one.scale / 4 + one.mean_share / 100
        return {name: (a, torch.full_like(b, mark)) for name, (a, b) in bench.fresh.items()}

    def reading(base, sheet, stacked):
        return SimpleNamespace(accuracy=stacked[site][1][:, 0, 0])

    monkeypatch.setattr(room, "score", reading)
    tasks = [bench.suite[name] for name in SPLITS["validation"] + SPLITS["train"][:1]]
    found = guidance_accuracies(bench, tasks, marked, "shared_a", 12).table()
    for one in trials("shared_a"):
        accuracy = found[str(one.mean_share)][str(one.scale)]
        assert accuracy == pytest.approx(one.scale / 4 + one.mean_share / 100)


def test_validation_tasks_are_asked_in_different_words():
    own = ("a", "b", "c")
    tasks = [
        Task(f"t{n}", ["Do it."], evaluation_prompts=own[:width]) for n, width in enumerate((3, 3, 3, 3, 2))
    ]
    asked = [validation_prompts(tasks)[task.name] for task in tasks]
    assert asked == [["a"], ["b"], ["c"], ["a"], ["a"]]
