"""How far adapters are from the oracle's and from those that were stored, in ΔW.

In: adapters of one spec, stored runs.  Out: distances and relative errors.
Idea: a generator that memorises lies on a stored adapter; held-out oracles say how near is natural.
"""

import statistics
from collections.abc import Iterator, Sequence

import torch

from ltdi_peft.baselines import final_adapter
from ltdi_peft.distance import pairwise_delta_w_distances
from ltdi_peft.spec import Adapter, AdapterSpec, site_norms
from ltdi_peft.store import Trajectory

AT_ONCE = 32  # stored adapters in memory at a time


def relative_errors(spec: AdapterSpec, made: dict[str, list[Adapter]]) -> dict[str, float]:
    """‖ΔW − ΔW_oracle‖ / ‖ΔW_oracle‖ of each method, mean over its adapters."""
    (oracle,) = made["oracle"]
    norm = sum(value**2 for value in site_norms(spec, oracle).values()) ** 0.5
    distances = {
        m: pairwise_delta_w_distances(spec, adapters, [oracle])
        for m, adapters in made.items()
        if m != "oracle"
    }
    return {m: round(float(found.mean()) / max(norm, 1e-12), 6) for m, found in distances.items()}


def in_parts(runs: Sequence[Trajectory]) -> Iterator[tuple[list[Trajectory], list[Adapter]]]:
    """Runs with their final adapters, a bounded number at a time."""
    for first in range(0, len(runs), AT_ONCE):
        part = list(runs[first : first + AT_ONCE])
        yield part, [final_adapter(run) for run in part]


def nearest_distances(
    spec: AdapterSpec, adapters: Sequence[Adapter], stored: Sequence[Trajectory]
) -> list[float]:
    """ΔW distance from each adapter to the nearest stored final adapter."""
    parts = [
        pairwise_delta_w_distances(spec, adapters, finals).min(1).values for _, finals in in_parts(stored)
    ]
    return [round(value, 6) for value in torch.stack(parts).min(0).values.tolist()]


def between_stored(
    spec: AdapterSpec, stored: Sequence[Trajectory], most: int = 2 * AT_ONCE
) -> dict[str, float]:
    """Median distance of stored runs (at most `most`) to the nearest other one, and of another task."""
    picked = list(stored)[:: -(-len(stored) // most)]
    other_run, other_task = [], []
    for left, adapters in in_parts(picked):
        near_run, near_task = (
            torch.full((len(left),), torch.inf).double(),
            torch.full((len(left),), torch.inf).double(),
        )
        for right, finals in in_parts(stored):
            distance = pairwise_delta_w_distances(spec, adapters, finals)
            run = torch.tensor([[a.run_id == b.run_id for b in right] for a in left])
            task = torch.tensor([[a.task.name == b.task.name for b in right] for a in left])
            near_run = torch.minimum(near_run, distance.masked_fill(run, torch.inf).min(1).values)
            near_task = torch.minimum(near_task, distance.masked_fill(task, torch.inf).min(1).values)
        other_run += near_run.tolist()
        other_task += near_task.tolist()
    return {
        "stored_to_nearest_stored": round(statistics.median(other_run), 6),
        "stored_to_nearest_other_task": round(statistics.median(other_task), 6),
    }
