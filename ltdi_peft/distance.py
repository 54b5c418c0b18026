"""Distances between adapters, and their mean, in ΔW.

In: adapters {site: (A, B)} of one `AdapterSpec`.  Out: Frobenius distances of ΔW = scaling·BA, per site or
over all sites; the adapter nearest to a mean ΔW.
Idea: ΔW does not depend on the gauge. ⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ) needs rank-sized matrices only, so no
(fan_out, fan_in) matrix is formed, and float64 is affordable.
Source: METHOD.md §6; truncated SVD as the nearest matrix of a rank, Eckart & Young 1936
(doi:10.1007/BF02288367).
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.gauge import balanced, require_spec_sites, site_factors
from ltdi_peft.spec import Adapter, AdapterSpec, Factors, Site


def _inner_products(x: Factors, y: Factors) -> Float[Tensor, "left right"]:
    """⟨B_x A_x, B_y A_y⟩ = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ) of every pair; x, y: A, Bᵀ of (adapter, rank, fan)."""
    of_a, of_b = (u.flatten(0, 1) @ v.flatten(0, 1).mT for u, v in zip(x, y, strict=True))
    return (of_a * of_b).reshape(len(x[0]), x[0].shape[1], len(y[0]), y[0].shape[1]).sum((1, 3))


def _squares(
    spec: AdapterSpec, got: Adapter, want: Adapter
) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"]]:
    """‖ΔW_got − ΔW_want‖² and ‖ΔW_want‖² per site."""
    require_spec_sites(got, spec, "got")
    require_spec_sites(want, spec, "want")
    distances, norms = [], []
    for site in spec.sites:
        (a,), (b,) = _stacked([got], site)
        (to_a,), (to_b,) = _stacked([want], site)
        # (B − B')A + B'(A − A') instead of BA − B'A': nothing large cancels, equal adapters are at exactly 0.
        difference = torch.cat([a, a - to_a])[None], torch.cat([b - to_b, to_b])[None]
        distances.append(site.scaling**2 * _inner_products(difference, difference)[0, 0])
        norms.append(
            site.scaling**2 * _inner_products((to_a[None], to_b[None]), (to_a[None], to_b[None]))[0, 0]
        )
    return torch.stack(distances).clamp_min(0), torch.stack(norms).clamp_min(0)


def _stacked(adapters: Sequence[Adapter], site: Site) -> Factors:
    """One site's A (adapter, rank, fan_in) and Bᵀ (adapter, rank, fan_out), float64."""
    factors = [site_factors(adapter, site, f"adapter {i}") for i, adapter in enumerate(adapters, start=1)]
    return torch.stack([a for a, _ in factors]).double(), torch.stack([b.mT for _, b in factors]).double()


def delta_w_error(spec: AdapterSpec, got: Adapter, want: Adapter) -> dict[str, float]:
    """‖ΔW_got − ΔW_want‖ / ‖ΔW_want‖ (Frobenius) per site; for ΔW_want = 0: 0 if ΔW_got = 0, else infinity.

    From (2·rank)² Gram matrices in float64, no (fan_out, fan_in) matrix; resolution about 1e-8.
    """
    squares, norms = _squares(spec, got, want)
    errors = torch.where(squares == 0, 0.0, squares / norms).sqrt()
    return {site.name: float(error) for site, error in zip(spec.sites, errors, strict=True)}


def delta_w_distance(spec: AdapterSpec, a: Adapter, b: Adapter, *, relative: bool = False) -> float:
    """Frobenius distance of ΔW over all sites together; `relative`: divided by the norm of b's ΔW."""
    squares, norms = _squares(spec, a, b)
    distance, norm = float(squares.sum().sqrt()), float(norms.sum().sqrt())
    if not relative or distance == 0:
        return distance
    return distance / norm if norm else math.inf


def pairwise_delta_w_distances(
    spec: AdapterSpec, left: Sequence[Adapter], right: Sequence[Adapter]
) -> Float[Tensor, "left right"]:
    """Frobenius distance of ΔW over all sites, of every pair, float64; resolution 1e-8 of the norms."""
    for adapters, where in ((left, "left"), (right, "right")):
        for number, adapter in enumerate(adapters, start=1):
            require_spec_sites(adapter, spec, f"{where} adapter {number}")
    squares = torch.zeros(len(left), len(right), dtype=torch.float64)
    if not left or not right:
        return squares
    for site in spec.sites:
        x, y = _stacked(left, site), _stacked(right, site)
        norm_x, norm_y = (((a @ a.mT) * (b @ b.mT)).sum((1, 2)) for a, b in (x, y))
        # Some of `left` at a time: the two Gram matrices of a chunk have at most 2**24 numbers (128 MB) each.
        chunk = max(1, 2**24 // (site.rank**2 * len(right)))
        for i in range(0, len(left), chunk):
            inner = _inner_products((x[0][i : i + chunk], x[1][i : i + chunk]), y)
            squares[i : i + chunk] += site.scaling**2 * (norm_x[i : i + chunk, None] + norm_y - 2 * inner)
    return squares.clamp_min(0).sqrt()


def truncated_mean(adapters: Iterable[Adapter], spec: AdapterSpec) -> Adapter:
    """The adapter of spec's ranks nearest to the mean ΔW: its truncated SVD, balanced float32 factors.

    The mean of n adapters has rank up to n · rank: their stacked factors are held, memory O(n · adapter).
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("truncated_mean of no adapters; expected at least one.")
    for number, adapter in enumerate(adapters, start=1):
        require_spec_sites(adapter, spec, f"adapter {number}")
    mean = {}
    for site in spec.sites:
        all_a, all_b = _stacked(adapters, site)
        a, b = balanced(all_a.flatten(0, 1), all_b.flatten(0, 1).mT / len(adapters))
        mean[site.name] = (a[: site.rank].float().contiguous(), b[:, : site.rank].float().contiguous())
    return mean
