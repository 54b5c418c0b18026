"""Intervals over tasks.

In: one number a task for each method, and the cluster of each task (itself, or its domain).
Out: `Estimate`s.
Idea: recovered gain, the difference of two gains and the mean accuracy difference are all Σx / Σy over tasks,
so one paired bootstrap over clusters serves all three; what is compared is subtracted within the task.
Source: percentile and cluster bootstrap, Efron & Tibshirani 1993, chapters 8 and 13.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DETECTABLE = 2.8  # standard errors: 1.96 + 0.84, two-sided 5 % and power 80 %
# Resamples whose gain to recover is not positive have no ratio; when more than this share has none, there is
# no interval.
MOST_UNDEFINED = 0.025


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums, its 95 % interval and bootstrap standard error; NaN where there is none."""

    value: float
    low: float
    high: float
    error: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0 (false without an interval)."""
        return self.low > 0

    @property
    def detectable(self) -> float:
        """The smallest difference that a test at 5 % finds with a probability of 80 %."""
        return DETECTABLE * self.error


def recovered_gain(
    method: Float[Tensor, " task"],
    base: Float[Tensor, " task"],
    oracle: Float[Tensor, " task"],
    clusters: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """G = Σ(method − base) / Σ(oracle − base)."""
    return ratio(method - base, oracle - base, clusters, draws=draws, seed=seed)


def gain_difference(
    left: Float[Tensor, " task"],
    right: Float[Tensor, " task"],
    base: Float[Tensor, " task"],
    oracle: Float[Tensor, " task"],
    clusters: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """G(left) − G(right), paired: base cancels within the task."""
    return ratio(left - right, oracle - base, clusters, draws=draws, seed=seed)


def mean_difference(
    left: Float[Tensor, " task"],
    right: Float[Tensor, " task"],
    clusters: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of left − right over the tasks, paired: the primary test of any claim."""
    return ratio(left - right, torch.ones_like(left), clusters, draws=draws, seed=seed)


def ratio(
    numerator: Float[Tensor, " task"],
    denominator: Float[Tensor, " task"],
    clusters: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> Estimate:
    """Σ numerator / Σ denominator with a percentile interval from `draws` resamples of the clusters.

    One cluster gives no interval. Raises ValueError without tasks, or unless every task has a cluster.
    """
    if not len(numerator) or len(numerator) != len(clusters):
        raise ValueError(
            f"{len(numerator)} tasks with {len(clusters)} clusters: expected one cluster for each task."
        )
    names = sorted(set(clusters))
    owner = torch.tensor([names.index(cluster) for cluster in clusters])
    x, y = (
        torch.zeros(len(names)).double().index_add(0, owner, part.double())
        for part in (numerator, denominator)
    )
    value = float(quotient(x.sum(), y.sum()))
    drawn = torch.empty(0)
    if len(names) > 1:
        weights = resamples(len(names), draws, seed)
        drawn = quotient(weights @ x, weights @ y)
        drawn = drawn[drawn.isfinite()]
    if len(drawn) < max(2, (1 - MOST_UNDEFINED) * draws):
        return Estimate(value, math.nan, math.nan, math.nan)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(value, low, high, float(drawn.std()))


def resamples(clusters: int, draws: int, seed: int) -> Float[Tensor, "draw cluster"]:
    """How often each cluster is in each resample: `clusters` drawn with replacement (float64)."""
    rng = torch.Generator().manual_seed(seed)
    index = torch.randint(clusters, (draws, clusters), generator=rng)
    return torch.zeros(draws, clusters).double().scatter_add(1, index, torch.ones(draws, clusters).double())


def quotient(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The ratio x / y where y > 0, else NaN: a gain that the oracle does not have cannot be recovered."""
    return torch.where(y > 0, x / y, math.nan)
