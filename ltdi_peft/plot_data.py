"""The numbers of the figures that no file holds: adapters in a plane, similarities, bands over tasks.

In: recorded runs, a generator, sections of a result.  Out: plain tensors, ready to be drawn.
Idea: adapters are compared by their ΔW, which does not depend on the gauge. Distances between ΔW are enough:
their doubly centred squares are the inner products of differences from the mean, so the two directions in
which final adapters differ most need no matrix larger than (run, run), and other adapters are projected by
their distances alone.
Source: principal coordinates, Gower 1966 (doi:10.1093/biomet/53.3-4.325); adding points, Gower 1968; score
interval of a share, Wilson 1927.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ltdi_peft.baselines import final_adapter
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.distance import pairwise_delta_w_distances
from ltdi_peft.generator import Generator
from ltdi_peft.spec import Adapter
from ltdi_peft.statistics import mean_difference, resamples
from ltdi_peft.store import Trajectory

MOST_RUNS = 96  # final adapters in memory: 1.3 GB at 3.4 M parameters each
LEAST = 3  # different adapters that span a plane
SHOWN = 5  # runs whose whole trajectory is drawn
BINS = 8  # of pairs of tasks, equally many in each

T = TypeVar("T")


@dataclass(frozen=True)
class Plane:
    """The plane of the two directions in which a set of adapters differs most, by squared distances."""

    directions: Float[Tensor, "run 2"]  # eigenvectors over the square roots of their eigenvalues
    row_means: Float[Tensor, " run"]  # of the squared distances
    share: tuple[float, float]  # of the variance along each direction

    def __call__(self, squares: Float[Tensor, "point run"]) -> Float[Tensor, "point 2"]:
        """Where points lie, by their squared distances to the adapters; the mean adapter is at (0, 0)."""
        inner = -0.5 * (squares - squares.mean(1, keepdim=True) - self.row_means + self.row_means.mean())
        return inner @ self.directions


def fit_plane(squares: Float[Tensor, "run run"]) -> Plane:
    """ValueError for adapters that do not span a plane."""
    values, vectors = torch.linalg.eigh(centred(squares))
    top, found = values[[-1, -2]], vectors[:, [-1, -2]]
    if float(top[1]) <= 1e-9 * float(top[0]):
        raise ValueError(
            f"the final adapters of {len(squares)} runs do not span a plane; at least {LEAST} different ones "
            f"must."
        )
    signs = found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    first, second = (top / values.clamp_min(0).sum()).tolist()
    return Plane(found * signs / top.sqrt(), squares.mean(0), (first, second))


def centred(squares: Float[Tensor, "run run"]) -> Float[Tensor, "run run"]:
    """Inner products of the differences from the mean, from squared distances."""
    means = squares.mean(0)
    return -0.5 * (squares - means[:, None] - means + means.mean())


# ---- trajectories and chains


@dataclass(frozen=True)
class Track:
    """The way of one adapter through the plane."""

    task: str
    domain: str
    points: Float[Tensor, "time 2"]
    marks: tuple[int, ...] = ()  # times of the local targets


@dataclass(frozen=True)
class AdapterMap:
    """Runs, and perhaps chains, in one plane."""

    plane: Plane
    start: Float[Tensor, " 2"]
    finals: Float[Tensor, "run 2"]
    runs: int  # in the store
    steps: int  # optimiser steps of the first run
    recorded: tuple[Track, ...]
    generated: tuple[Track, ...] = ()
    oracles: Mapping[str, Tensor] = field(default_factory=dict)  # task → where its own run ends
    # Task → ‖ΔW − ΔW of its own run‖ in all directions, of the chain at every time and, last, of the start.
    distances: Mapping[str, Tensor] = field(default_factory=dict)


def map_runs(
    runs: Sequence[Trajectory], k: int = 0, chains: Mapping[str, list[Adapter]] | None = None,
    oracles: Sequence[Trajectory] = (), ends: tuple[int, ...] = (),
) -> AdapterMap:  # fmt: skip
    """The plane of the runs' final adapters, with `SHOWN` whole trajectories in it.

    k: local targets to mark, 0 for none. chains: task → adapters from noise to the end, which stop at the
    times `ends`; oracles: these tasks' own runs. Raises ValueError for fewer than 3 runs.
    """
    spec, picked = runs[0].spec, spread_out(runs, MOST_RUNS)
    finals = [final_adapter(run) for run in picked]
    squares = pairwise_delta_w_distances(spec, finals, finals).square()
    plane = fit_plane(squares)

    def place(adapters: Sequence[Adapter]) -> Tensor:
        return plane(pairwise_delta_w_distances(spec, adapters, finals).square())

    places, recorded = plane(squares), []
    for run in (picked[i] for i in far_apart(places, SHOWN)):
        way = [run.start(), *(run.adapter(snapshot) for snapshot in run.snapshots)]
        targets = {snapshot.step for snapshot in run.local_targets(k)} if k else set()
        marks = tuple(i for i, snapshot in enumerate(run.snapshots, start=1) if snapshot.step in targets)
        recorded.append(Track(run.task.name, run.task.domain, place(way), marks))
    chains, own = chains or {}, {run.task.name: final_adapter(run) for run in oracles}
    domains, start = {run.task.name: run.task.domain for run in oracles}, picked[0].start()
    return AdapterMap(
        plane,
        place([start])[0],
        places,
        len(runs),
        picked[0].snapshots[-1].step,
        tuple(recorded),
        tuple(Track(name, domains[name], place(way), ends) for name, way in chains.items()),
        {name: place([adapter])[0] for name, adapter in own.items()},
        {
            name: pairwise_delta_w_distances(spec, [*way, start], [own[name]])[:, 0]
            for name, way in chains.items()
        },
    )


def chain_adapters(generator: Generator, conditions: Float[Tensor, "1 condition"]) -> list[Adapter]:
    """What the chain of one prompt passes through, from its noise to its end, where the stored runs are."""
    codec = replace(generator.codec, origin=None)
    with torch.no_grad():
        return [codec.decode(tokens[0]) for tokens in generator.token_path(conditions)]


def spread_out(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced."""
    return list(items[:: -(-len(items) // most)])


def far_apart(places: Float[Tensor, "run 2"], most: int) -> list[int]:
    """Indices of at most `most` points: the one farthest out, then each the farthest from those before."""
    found = [int(places.norm(dim=1).argmax())]
    while len(found) < min(most, len(places)):
        found.append(int(torch.cdist(places, places[found]).min(1).values.argmax()))
    return found


def one_a_domain(runs: Sequence[Trajectory], most: int) -> list[Trajectory]:
    """At most `most` runs of different tasks: the first of every domain, then every domain's second, …"""
    by_domain: dict[str, dict[str, Trajectory]] = {}
    for run in runs:
        by_domain.setdefault(run.task.domain, {}).setdefault(run.task.name, run)
    ranked = [(place, run) for tasks in by_domain.values() for place, run in enumerate(tasks.values())]
    return [run for _, run in sorted(ranked, key=lambda pair: pair[0])[:most]]


# ---- similarity of tasks against similarity of adapters


@dataclass(frozen=True)
class Similarity:
    """Pairs of tasks: how alike their prompts and their adapters are."""

    tasks: int
    conditions: Float[Tensor, " pair"]  # cosine of the mean conditions
    adapters: Float[Tensor, " pair"]  # cosine of ΔW − mean ΔW
    same_domain: Bool[Tensor, " pair"]
    correlation: tuple[float, float, float]  # value, low, high
    bins: Float[Tensor, "bin 4"]  # mean of conditions, mean of adapters, low, high


def similarity(runs: Sequence[Trajectory], encoder: PromptEncoder, draws: int = 1000) -> Similarity:
    """Of the first run of each task; 95 % intervals from resampled tasks, as a task is in many pairs."""
    first = {run.task.name: run for run in sorted(runs, key=lambda run: -run.seed)}
    picked = spread_out([first[name] for name in sorted(first)], MOST_RUNS)
    finals = [final_adapter(run) for run in picked]
    gram = centred(pairwise_delta_w_distances(picked[0].spec, finals, finals).square())
    norms = gram.diagonal().clamp_min(1e-12).sqrt()
    means = torch.stack([encoder(run.task.prompts).mean(0) for run in picked]).double()
    unit = functional.normalize(means, dim=-1)
    i, j = torch.triu_indices(len(picked), len(picked), offset=1)
    x, y = (unit @ unit.mT)[i, j], (gram / norms / norms[:, None])[i, j]
    same = torch.tensor([picked[a].task.domain == picked[b].task.domain for a, b in zip(i, j, strict=True)])
    drawn = resamples(len(picked), draws, seed=0)
    weights = torch.cat([torch.ones(1, len(x), dtype=x.dtype), drawn[:, i] * drawn[:, j]])
    r = weighted_correlation(x, y, weights)
    bins = []
    for part in x.argsort().chunk(BINS):
        w = weights[:, part]
        mean = (w @ y[part]) / w.sum(1)
        low, high = middle(mean[1:])
        bins.append([float(x[part].mean()), float(mean[0]), low, high])
    return Similarity(len(picked), x, y, same, (float(r[0]), *middle(r[1:])), torch.tensor(bins))


def weighted_correlation(
    x: Float[Tensor, " pair"], y: Float[Tensor, " pair"], weights: Float[Tensor, "draw pair"]
) -> Float[Tensor, " draw"]:
    """Pearson's r under each row of weights."""
    share = weights / weights.sum(1, keepdim=True)
    x, y = x - (share @ x)[:, None], y - (share @ y)[:, None]
    cross, of_x, of_y = ((share * product).sum(1) for product in (x * y, x * x, y * y))
    return cross / (of_x * of_y).sqrt()


def middle(drawn: Float[Tensor, " draw"]) -> tuple[float, float]:
    """The 95 % percentile interval of the draws that are finite, NaN without any."""
    found = drawn[drawn.isfinite()]
    if not len(found):
        return math.nan, math.nan
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975]).to(found)).tolist()
    return low, high


# ---- intervals of sections


def curve_band(row: dict[str, Any], key: str) -> list[tuple[float, float]]:
    """95 % intervals over tasks of a curve's mean at every point; of one task the values themselves."""
    tasks = torch.tensor([one[key] for one in row["per_task"].values()], dtype=torch.float64)
    names = list(row["per_task"])
    if len(names) < 2:
        return [(value, value) for value in tasks[0].tolist()]
    found = [mean_difference(at, torch.zeros_like(at), names) for at in tasks.unbind(1)]
    return [(one.low, one.high) for one in found]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` examples."""
    z = 1.96
    centre = share + z**2 / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (centre - width) / (1 + z**2 / count), (centre + width) / (1 + z**2 / count)


Losses = dict[str, tuple[str, list[int], list[float]]]
"""Run → (domain, steps, losses)."""


def losses(runs: Sequence[Trajectory]) -> Losses:
    """Of the snapshots whose loss is known, where a run has at least two."""
    found: Losses = {}
    for run in runs:
        known = [(s.step, s.loss) for s in run.snapshots if s.loss is not None]
        if len(known) >= 2:
            steps, values = [step for step, _ in known], [loss for _, loss in known]
            found[run.run_id] = (run.task.domain, steps, values)
    return found
