"""Recovered gain, bootstrap and paired differences: by hand, and against independent references."""

import math

import pytest
import torch
from torch.testing import assert_close

from ltdi_peft.statistics import (
    Estimate,
    gain_difference,
    mean_difference,
    quotient,
    ratio,
    recovered_gain,
    resamples,
)

BASE = torch.tensor([0.0, 0.2, 0.5])
ORACLE = torch.tensor([1.0, 0.8, 0.7])
METHOD = torch.tensor([0.5, 0.2, 0.7])
TASKS = ("a", "b", "c")


def test_recovered_gain_is_a_ratio_of_sums():
    # (0.5 + 0 + 0.2) / (1 + 0.6 + 0.2); the mean of ratios would be 0.5
    found = recovered_gain(METHOD, BASE, ORACLE, TASKS)
    assert found.value == pytest.approx(0.7 / 1.8)
    assert found.low <= found.value <= found.high


def test_base_has_gain_0_and_oracle_1_without_any_width():
    assert recovered_gain(BASE, BASE, ORACLE, TASKS) == Estimate(0.0, 0.0, 0.0, 0.0)
    assert recovered_gain(ORACLE, BASE, ORACLE, TASKS) == Estimate(1.0, 1.0, 1.0, 0.0)


def test_difference_of_gains_is_the_paired_gain():
    other = torch.tensor([0.1, 0.4, 0.6])
    found = gain_difference(METHOD, other, BASE, ORACLE, TASKS)
    separate = [recovered_gain(m, BASE, ORACLE, TASKS).value for m in (METHOD, other)]
    assert found.value == pytest.approx(separate[0] - separate[1])


def test_pairing_removes_what_tasks_share():
    level = torch.linspace(0, 1, 20)
    found = mean_difference(level + 0.1, level, [str(i) for i in range(20)])
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    assert found.above_zero


def test_interval_of_two_tasks_by_enumeration():
    # resamples aa, ab, ba, bb: means 0, ½, ½, 1, so both tails hold 25 %, more than the 2.5 % asked for
    found = mean_difference(torch.tensor([0.0, 1.0]), torch.zeros(2), ("a", "b"), draws=4000)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.error == pytest.approx(math.sqrt(1 / 8), abs=0.02)  # exact: variance 0.125


def test_standard_error_of_a_mean():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = mean_difference(values, torch.zeros(200), [str(i) for i in range(200)], draws=4000)
    expected = float(values.std(correction=0)) / math.sqrt(200)
    assert found.error == pytest.approx(expected, rel=0.05)  # 4000 draws: 1.1 % standard error
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.08)
    assert found.detectable == pytest.approx(2.8 * found.error)


def test_clusters_are_resampled_whole():
    # within each domain all tasks agree, so only two independent numbers exist
    values = torch.tensor([1.0] * 10 + [0.0] * 10)
    domains = ["x"] * 10 + ["y"] * 10
    by_task = mean_difference(values, torch.zeros(20), [str(i) for i in range(20)])
    by_domain = mean_difference(values, torch.zeros(20), domains)
    assert by_domain.error > 2 * by_task.error
    assert by_domain.value == by_task.value


def test_one_cluster_has_no_interval():
    found = mean_difference(METHOD, BASE, ("x", "x", "x"))
    assert found.value == pytest.approx(0.7 / 3)
    assert math.isnan(found.low)
    assert math.isnan(found.error)
    assert not found.above_zero


def test_no_gain_to_recover_has_no_ratio():
    assert math.isnan(recovered_gain(METHOD, ORACLE, BASE, TASKS).value)
    # the sum is positive, but a large share of resamples has none: a value, and no interval
    found = ratio(torch.ones(2), torch.tensor([1.0, -0.9]), ("a", "b"), draws=500, seed=0)
    assert found.value == pytest.approx(20, rel=1e-5)
    assert math.isnan(found.low)


def test_same_seed_same_interval():
    left, right = (ratio(METHOD, ORACLE, TASKS, draws=100, seed=s) for s in (3, 3))
    assert left == right
    assert left != ratio(METHOD, ORACLE, TASKS, draws=100, seed=4)


def test_resamples_draw_as_many_as_there_are():
    weights = resamples(7, 50, 0)
    assert_close(weights.sum(1), torch.full((50,), 7.0, dtype=torch.float64))


def test_quotient_of_nothing():
    assert_close(quotient(torch.tensor([1.0]), torch.tensor([4.0])), torch.tensor([0.25]))
    assert quotient(torch.tensor([1.0]), torch.tensor([0.0])).isnan()


def test_every_task_needs_its_cluster():
    with pytest.raises(ValueError, match="3 tasks with 2 clusters"):
        recovered_gain(METHOD, BASE, ORACLE, ("a", "b"))
    with pytest.raises(ValueError, match="0 tasks"):
        mean_difference(torch.empty(0), torch.empty(0), ())
