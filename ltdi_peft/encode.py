"""Adapter ⇄ token matrix.

In: {site: (A, B)}.  Out: tokens (site, width) float32, one row per site in `AdapterSpec.sites` order;
narrower sites are padded with zeros (`AdapterCodec.mask`).
Idea: (GA, BG⁻¹) is the same adapter for every invertible G, so a codec fixes one *gauge*. There an adapter
has coordinates x that are zero at the gauge's origin; x is projected on the strongest directions of the
training adapters and divided by one scale per site. Nothing is centred: zero tokens are the origin, and the
span through it holds every linear combination of the training adapters.

    gauge           origin        coordinates x of a site                         for adapters
    shared_a        θ_0           (B − B_0)·L,  L Lᵀ = scaling²·A Aᵀ              with one frozen A
    shared_start    θ_0           w_A·(A − A_0), w_B·(B − B_0)                    trained from one θ_0
    canonical       zero adapter  √scaling·(√S Vᵀ, U √S) of BA = U S Vᵀ           from anywhere
    reference       zero adapter  the same, rotated onto `start` (Procrustes)     from anywhere

In `shared_a` distances of x are distances of ΔW; in `shared_start` to first order and up to direction.
Inverse: `decode`, exact in ΔW at full width up to float32 rounding.
Source: METHOD.md §6; LoRA, arXiv:2106.09685 §4.1; block-merge SVD after Brand 2006
(doi:10.1016/j.laa.2005.07.021); Procrustes, Schönemann 1966 (doi:10.1007/BF02289451).
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ltdi_peft.spec import (
    Adapter,
    AdapterSpec,
    BrokenAdapterError,
    Factors,
    Site,
    SpecMismatchError,
    check_adapter,
    require_fit,
    require_sites,
)

FORMAT_VERSION = 1
HEADER = "ltdi_codec"  # the one key of the file's metadata; its value is JSON
GAUGES = ("shared_a", "shared_start", "canonical", "reference")
BASIS_DTYPES = {"float32": torch.float32, "float16": torch.float16}
CPU = torch.device("cpu")

Stream = Callable[[], Iterable[Adapter]]
"""Training adapters, read lazily; every call starts a new pass over the same adapters in the same order."""

# Snapshots carry float32 rounding of 6e-8: a direction of 1e-6 of the strongest is hardly more than rounding.
RESOLVED = 1e-6
# Below this ratio of A's singular values, ΔW determines B to fewer than two digits in float32.
RANK_TOLERANCE = 1e-5
# Relative room for an A that passed through float32 arithmetic; a trained A is off by 1e-3 and more.
SAME_A = 1e-6
# Buffer rows that a merge takes at least: fewer make its eigenproblems small and many.
SMALLEST_BLOCK = 64


# --- the gauge: one representative (A, B) per adapter, and its coordinates --------------------------------


def balanced(a: Float[Tensor, "rank fan_in"], b: Float[Tensor, "fan_out rank"]) -> Factors:
    """Factors (√S Vᵀ, U √S) of BA = U S Vᵀ, float64; S descends, each column of U has its largest entry > 0.

    The same for (GA, BG⁻¹). BA is never formed: QR of both factors, then an SVD of (rank, rank).
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    left, right = q_b @ u, vh @ q_a.mT
    root = s.sqrt() * left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0]
    missing = len(a) - len(s)  # a rank above fan_in or fan_out has fewer singular values than rows
    pad = torch.nn.functional.pad
    return pad(root[:, None] * right, (0, 0, 0, missing)), pad(left * root, (0, missing))


def turned_to(reference: Factors, factors: Factors) -> Factors:
    """Balanced `factors` as (QᵀA, BQ) with the orthogonal Q that brings them nearest to `reference`."""
    (a, b), (to_a, to_b) = factors, reference
    u, _, vh = torch.linalg.svd(b.mT @ to_b + a @ to_a.mT)
    turn = u @ vh
    return turn.mT @ a, b @ turn


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates of one site: x = [weight_a·(A − A_0), (B − B_0)·root]; weight_a = 0: A frozen, not in x."""

    gauge: str
    site: Site
    a: Float[Tensor, "rank fan_in"]  # A_0, zero in `canonical` and `reference`
    b: Float[Tensor, "fan_out rank"]  # B_0
    weight_a: float
    root: Float[Tensor, "rank rank"]
    inverse: Float[Tensor, "rank rank"]  # of root
    reference: Factors | None = None  # balanced, float64; gauge `reference` only

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return (self.a.numel() if self.weight_a else 0) + self.b.numel()

    def coordinates(self, adapter: Adapter, where: str) -> Float[Tensor, " dim"]:
        """Float64 coordinates of the adapter's site, brought into the gauge; refuses what does not fit."""
        a, b = _site_factors(adapter, self.site, where)
        if self.gauge == "shared_a":
            _require_same_a(self, a, where)
        elif self.gauge != "shared_start":
            a, b = balanced(a, b)
            a, b = turned_to(self.reference, (a, b)) if self.reference else (a, b)
        of_b = ((b - self.b) @ self.root).flatten()
        return torch.cat([(self.weight_a * (a - self.a)).flatten(), of_b]) if self.weight_a else of_b

    def factors(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch rank fan_in"], Float[Tensor, "batch fan_out rank"]]:
        """The inverse of `coordinates`, for a batch; differentiable."""
        of_a, of_b = x.split([self.dim - self.b.numel(), self.b.numel()], dim=1)
        b = self.b + of_b.reshape(-1, *self.b.shape) @ self.inverse
        if not self.weight_a:
            return self.a.expand(len(x), -1, -1), b
        return self.a + of_a.reshape(-1, *self.a.shape) / self.weight_a, b

    def to(self, device: torch.device, dtype: torch.dtype) -> "Frame":
        """The same frame for decoding elsewhere."""
        a, b, root, inverse = (w.to(device, dtype) for w in (self.a, self.b, self.root, self.inverse))
        return replace(self, a=a, b=b, root=root, inverse=inverse)


def _metric_root(site: Site, a: Float[Tensor, "rank fan_in"]) -> Float[Tensor, "rank rank"]:
    """L with L Lᵀ = scaling²·A Aᵀ, so that ‖dB·L‖ = ‖scaling·dB·A‖."""
    singular = torch.linalg.svdvals(a)
    if len(a) > a.shape[1] or float(singular[-1]) <= RANK_TOLERANCE * float(singular[0]):
        raise ValueError(
            f"site {site.name}: the start's A is rank-deficient (singular values {float(singular[0]):.3g} … "
            f"{float(singular[-1]):.3g}, rank {site.rank}), so ΔW does not determine B in gauge 'shared_a'. "
            f"Start from an A of full rank, or use gauge 'shared_start'."
        )
    return site.scaling * torch.linalg.cholesky(a @ a.mT)


def _frame(gauge: str, site: Site, start: Factors | None, weights: Float[Tensor, " 2"]) -> Frame:
    """The coordinates of one site; `weights` = (w_A, w_B), of which shared_a uses none."""
    reference = balanced(*start) if start and gauge == "reference" else None
    if start is None or reference:
        start = torch.zeros(site.rank, site.fan_in), torch.zeros(site.fan_out, site.rank)
    a, b = start[0].double(), start[1].double()
    if gauge == "shared_a":
        root = _metric_root(site, a)
        return Frame(gauge, site, a, b, 0.0, root, torch.linalg.inv(root))
    weight_a, weight_b = weights.tolist()
    eye = torch.eye(site.rank, dtype=torch.float64)
    return Frame(gauge, site, a, b, weight_a, weight_b * eye, eye / weight_b, reference)


def _frames(
    spec: AdapterSpec, gauge: str, start: Adapter | None, weights: Float[Tensor, "site 2"]
) -> tuple[Frame, ...]:
    starts = [start[site.name] if start else None for site in spec.sites]
    return tuple(_frame(gauge, *parts) for parts in zip(spec.sites, starts, weights, strict=True))


def _block_weights(
    stream: Stream, spec: AdapterSpec, start: Adapter | None, gauge: str
) -> Float[Tensor, "site 2"]:
    """(w_A, w_B) per site: how far ΔW moves, to first order, for a unit of A and for a unit of B.

    ΔW moves by scaling·(B_0 dA + dB A_0), and ‖B_0 dA‖² is ‖B_0‖²/rank on average over the directions of a
    unit dA. Where a block of θ_0 is zero (B_0 of a fresh start), the root mean square of that block's norm
    over the training adapters stands in for it.
    """
    scaling = torch.tensor([site.scaling for site in spec.sites], dtype=torch.float64)
    if gauge != "shared_start" or start is None:
        return scaling.sqrt()[:, None].repeat(1, 2)
    norms = torch.stack([_block_norms(*start[site.name]) for site in spec.sites])
    if (norms == 0).any():
        norms = torch.where(norms == 0, _training_norms(stream, spec), norms)
    norms = torch.where(
        norms == 0, norms.flip(1), norms
    )  # a block that never leaves zero: any weight will do
    norms = torch.where(norms == 0, 1.0, norms)
    root_rank = torch.tensor([site.rank for site in spec.sites], dtype=torch.float64).sqrt()
    return (scaling / root_rank)[:, None] * norms.flip(1)


def _block_norms(a: Float[Tensor, "rank fan_in"], b: Float[Tensor, "fan_out rank"]) -> Float[Tensor, " 2"]:
    return torch.stack([a.double().norm(), b.double().norm()])


def _training_norms(stream: Stream, spec: AdapterSpec) -> Float[Tensor, "site 2"]:
    """Root mean square of ‖A‖ and ‖B‖ over one pass of the stream."""
    squares, count = torch.zeros(len(spec.sites), 2, dtype=torch.float64), 0
    for count, adapter in enumerate(stream(), start=1):
        where = f"adapter {count} of the stream"
        _require_sites(adapter, spec, where)
        norms = [_block_norms(*_site_factors(adapter, site, where)) for site in spec.sites]
        squares += torch.stack(norms).square()
    return (squares / max(count, 1)).sqrt()


# --- what may come in -------------------------------------------------------------------------------------


def _require_gauge(gauge: str, start: Adapter | None) -> None:
    if gauge not in GAUGES:
        raise ValueError(f"gauge is {gauge!r}; known gauges are {', '.join(GAUGES)}.")
    if gauge == "canonical" and start is not None:
        raise ValueError(
            "gauge 'canonical' has the zero adapter as its origin, but a start was given. Pass start=None, "
            "or choose 'shared_a' or 'shared_start' (origin θ_0) or 'reference' (aligned to the start)."
        )
    if gauge != "canonical" and start is None:
        raise ValueError(
            f"gauge {gauge!r} needs a start (θ_0, or the reference adapter), got None. Pass "
            f"start=trajectory.start(), or use gauge 'canonical' for imported adapters."
        )


def _require_choices(spec: AdapterSpec, width: int | None, basis_dtype: str) -> None:
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; expected a positive number, or None for an exact inverse.")
    if basis_dtype not in BASIS_DTYPES:
        raise ValueError(f"basis_dtype is {basis_dtype!r}; known are {', '.join(BASIS_DTYPES)}.")
    for site in spec.sites:
        if not site.scaling > 0:
            raise ValueError(
                f"site {site.name}: scaling is {site.scaling}, so its ΔW is zero. Set lora_alpha > 0."
            )


def _require_same_count(counts: set[int]) -> None:
    if counts == {0}:
        raise ValueError("the stream of training adapters is empty (or a used-up iterator); expected ≥ 1.")
    if len(counts) > 1:
        raise ValueError(
            f"the stream yielded {sorted(counts)} adapters in different passes. It is called once per pass "
            f"and must yield the same adapters: pass e.g. `lambda: iter(adapters)`, not one iterator."
        )


def _require_sites(adapter: Adapter, spec: AdapterSpec, where: str) -> None:
    require_sites({site.name for site in spec.sites}, set(adapter), where)


def _site_factors(adapter: Adapter, site: Site, where: str) -> Factors:
    """(A, B) of one site, if they are finite and have the shapes of the spec. Touches no other site."""
    a, b = adapter[site.name]
    require_fit(a, (site.rank, site.fan_in), f"{where}: site {site.name}, lora_A")
    require_fit(b, (site.fan_out, site.rank), f"{where}: site {site.name}, lora_B")
    return a, b


def _require_same_a(frame: Frame, a: Float[Tensor, "rank fan_in"], where: str) -> None:
    difference = float((a - frame.a).abs().max())
    if difference > SAME_A * float(frame.a.abs().max()):
        raise SpecMismatchError(
            f"{where}: site {frame.site.name}, lora_A differs from the start by up to {difference:.3g}, but "
            f"this codec has gauge 'shared_a' (one frozen A). Record with A frozen from this start, or fit a "
            f"codec with gauge 'shared_start' (A trained from one start) or 'canonical' (any adapters)."
        )


def _float32_copy(start: Adapter | None, spec: AdapterSpec) -> Adapter | None:
    if start is None:
        return None
    check_adapter(spec, start, "start")
    copies = {}
    for site in spec.sites:
        a, b = (w.to(CPU, torch.float32, copy=True) for w in start[site.name])
        copies[site.name] = (a.contiguous(), b.contiguous())
    return copies


# --- the strongest directions of a stream -----------------------------------------------------------------


class StreamingSubspace:
    """The `width` strongest directions about the origin of a stream of vectors, in bounded memory.

    Block-merge SVD: when the buffer of keep + block rows is full, its `keep` strongest scaled right singular
    vectors replace it. Exact while the data has at most `keep` directions; `lost` is the energy dropped on
    the way. For dim ≤ width the basis is the identity (None) and only the energy is summed.
    """

    def __init__(self, dim: int, width: int) -> None:
        self.width = width
        self.keep = min(dim, width + width // 2)  # what a later block may still lift into the first `width`
        self.shape = (self.keep + max(width, SMALLEST_BLOCK), dim) if dim > width else (0, dim)
        # With the product that replaces the kept rows.
        self.bytes = 8 * dim * (self.shape[0] + self.keep) if dim > width else 0
        self._rows = torch.empty(0, dim, dtype=torch.float64)  # allocated by `add`, released by `basis`
        self._filled = 0
        self.energy = self.lost = 0.0

    def add(self, x: Float[Tensor, " dim"]) -> None:
        """Take one vector (a copy)."""
        self.energy += float(x @ x)
        if self.shape[0] == 0:
            return
        if self._filled == 0:
            self._rows = torch.empty(self.shape, dtype=torch.float64)
        if self._filled == len(self._rows):
            energies, rows = self._strongest(self.keep)
            self.lost += float(self._rows.square().sum() - energies.sum())
            self._filled = len(rows)
            self._rows[: self._filled] = rows
        self._rows[self._filled] = x
        self._filled += 1

    def _strongest(self, count: int) -> tuple[Float[Tensor, " found"], Float[Tensor, "found dim"]]:
        """Squared singular values, descending, and scaled right singular vectors, from the Gram matrix."""
        rows = self._rows[: self._filled]
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        found = values > RESOLVED**2 * values[0]
        return values[found], vectors[:, found].mT @ rows

    def basis(self) -> tuple[float, Float[Tensor, "found dim"] | None]:
        """Energy on, and at most `width` orthonormal rows (strongest first, largest entry > 0), or None.

        Releases the buffer: call it once, after the last vector.
        """
        if self.shape[0] == 0:
            return self.energy, None
        energies, rows = self._strongest(self.width)
        self._rows = self._rows.new_empty(0, self.shape[1])
        # QR restores the orthogonality that a Gram matrix loses for weak rows: 1e-16·(σ_1/σ_i)².
        q = torch.linalg.qr(rows.mT)[0].mT
        return float(energies.sum()), q.gather(1, q.abs().argmax(1, keepdim=True)).sign() * q


def _groups(subspaces: Sequence[StreamingSubspace], spec: AdapterSpec, budget: int) -> list[list[int]]:
    """Site numbers per pass, in order, so that the buffers of one pass fit into `budget` bytes."""
    groups, used = [[]], 0
    for number, subspace in enumerate(subspaces):
        if subspace.bytes > budget:
            raise ValueError(
                f"memory_budget is {budget} bytes, but site {spec.sites[number].name} alone needs "
                f"{subspace.bytes} at width {subspace.width}. Raise the budget or lower the width."
            )
        if used + subspace.bytes > budget:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += subspace.bytes
    return groups


# --- the codec --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Row:
    """One token row, on one device in one dtype: token ⇄ coordinates."""

    frame: Frame
    basis: Float[Tensor, "used dim"] | None  # None: the identity
    gram: Float[Tensor, "used used"] | None  # Cholesky factor of basis·basisᵀ (the identity but for rounding)
    used: int  # numbers of the token that are not padding
    scale: float

    def coordinates(self, token: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        x = token[:, : self.used] * self.scale
        return x if self.basis is None else x @ self.basis

    def token(self, x: Float[Tensor, " dim"]) -> Float[Tensor, " used"]:
        """The token whose coordinates are nearest to x, so encode(decode(z)) = z also for a float16 basis."""
        if self.basis is None or self.gram is None:
            return x / self.scale
        inner = self.basis @ x.to(self.basis.dtype)
        return torch.cholesky_solve(inner[:, None], self.gram)[:, 0] / self.scale


def _row(
    frame: Frame, basis: Tensor | None, used: int, scale: float, device: torch.device, dtype: torch.dtype
) -> _Row:
    frame = frame.to(device, dtype)
    if basis is None:
        return _Row(frame, None, None, used, scale)
    exact = basis.double()
    gram = torch.linalg.cholesky(exact @ exact.mT)
    return _Row(frame, basis.to(device, dtype), gram.to(device, dtype), used, scale)


class _TokenEnergy:
    """Sums ‖token‖² of one site over a pass."""

    def __init__(self, row: _Row) -> None:
        self.row = row
        self.energy = 0.0

    def add(self, x: Float[Tensor, " dim"]) -> None:
        self.energy += float(self.row.token(x).double().square().sum())


Feed = tuple[Frame, StreamingSubspace | _TokenEnergy]


@dataclass(frozen=True, eq=False)
class AdapterCodec:
    """Adapter ⇄ tokens (site, width) in one gauge, fitted on training adapters only. From `fit` or `load`."""

    spec: AdapterSpec
    gauge: str
    width: int
    start: Adapter | None  # θ_0; the reference in gauge `reference`; None in gauge `canonical`
    block_weights: Float[Tensor, "site 2"]  # (w_A, w_B) of the coordinates, float64; shared_a uses none
    bases: tuple[Tensor | None, ...]  # per site (used, dim), orthonormal rows; None: the identity
    scale: Float[Tensor, " site"]  # x = scale · basisᵀ · token: training tokens have rms 1 per site
    energy_kept: Float[
        Tensor, " site"
    ]  # share of the training coordinates' energy that the width keeps, 0 … 1
    frames: tuple[Frame, ...] = field(init=False, repr=False)
    _placed: dict[tuple[torch.device, torch.dtype], tuple[_Row, ...]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        _require_gauge(self.gauge, self.start)
        frames = _frames(self.spec, self.gauge, self.start, self.block_weights)
        object.__setattr__(self, "frames", frames)

    @classmethod
    def fit(
        cls,
        stream: Stream,
        spec: AdapterSpec,
        start: Adapter | None,
        *,
        gauge: str,
        width: int | None,
        memory_budget: int = 2**30,
        basis_dtype: str = "float32",
        progress: bool = False,
    ) -> "AdapterCodec":
        """Fit directions and scales on the training adapters of `stream`.

        start: θ_0 in the shared gauges, the reference in gauge `reference`, None in `canonical`. width:
        numbers per token; None: as many as the widest site has coordinates, for an exact inverse.
        memory_budget: bytes of buffers at a time; less means more passes (the result, width · coordinates
        numbers a site, comes on top). basis_dtype: "float16" halves the codec. Raises ValueError for an
        unknown gauge, a stream that is empty or cannot be repeated, adapters that do not fit `spec`, a budget
        too small for one site.
        """
        _require_gauge(gauge, start)
        _require_choices(spec, width, basis_dtype)
        start = _float32_copy(start, spec)
        weights = _block_weights(stream, spec, start, gauge)
        frames = _frames(spec, gauge, start, weights)
        subspaces = [StreamingSubspace(frame.dim, width or frame.dim) for frame in frames]
        bar = "codec" if progress else None
        bases, kept, count = _fit_bases(stream, spec, frames, subspaces, memory_budget, bar)
        stored = tuple(None if basis is None else basis.to(BASIS_DTYPES[basis_dtype]) for basis in bases)
        unit = torch.ones(len(frames))
        width = width or max(frame.dim for frame in frames)
        codec = cls(spec, gauge, width, start, weights, stored, unit, unit)
        lossy = [i for i, subspace in enumerate(subspaces) if subspace.lost > 1e-6 * subspace.energy]
        if lossy:  # what the merges dropped is missing in `kept`: measure it
            rows = codec._at(CPU, torch.float32)
            meters = [_TokenEnergy(rows[i]) for i in lossy]
            feeds = [(frames[i], meter) for i, meter in zip(lossy, meters, strict=True)]
            _require_same_count({count, _one_pass(stream, spec, feeds, bar)})
            kept[lossy] = torch.tensor([meter.energy for meter in meters], dtype=torch.float64)
        energy = torch.tensor([subspace.energy for subspace in subspaces], dtype=torch.float64)
        return codec._scaled(kept, energy, count)

    def _scaled(
        self, kept: Float[Tensor, " site"], energy: Float[Tensor, " site"], count: int
    ) -> "AdapterCodec":
        """With the scales of `count` training adapters; a site that never left the origin has scale 1."""
        scale = (kept / (count * self.mask.sum(1).clamp_min(1))).sqrt().float()
        share = torch.where(energy > 0, kept / energy, 1.0).clamp_max(1.0).float()
        # A new object: the buffers in _placed belong to the old scale.
        return replace(self, scale=torch.where(scale > 0, scale, 1.0), energy_kept=share)

    @property
    def mask(self) -> Bool[Tensor, "site width"]:
        """True where a token holds a number, False where it is padding (always zero)."""
        sizes = zip(self.frames, self.bases, strict=True)
        used = torch.tensor([frame.dim if basis is None else len(basis) for frame, basis in sizes])
        return torch.arange(self.width) < used[:, None]

    def encode(self, adapter: Adapter, where: str = "adapter") -> Float[Tensor, "site width"]:
        """Float32 tokens on the CPU. Raises ValueError, naming `where`, for an adapter that does not fit."""
        _require_sites(adapter, self.spec, where)
        tokens = torch.zeros(len(self.frames), self.width)
        for token, row, frame in zip(tokens, self._at(CPU, torch.float32), self.frames, strict=True):
            token[: row.used] = row.token(frame.coordinates(adapter, where))
        return tokens

    def encode_many(self, adapters: Iterable[Adapter]) -> Float[Tensor, "adapter site width"]:
        """`encode` of each; they are read one at a time."""
        tokens = [self.encode(adapter, f"adapter {i}") for i, adapter in enumerate(adapters, start=1)]
        return torch.stack(tokens) if tokens else torch.zeros(0, len(self.frames), self.width)

    def decode(self, tokens: Float[Tensor, "site width"]) -> Adapter:
        """The adapter of the tokens: float32, CPU, contiguous. decode(0) is the gauge's origin."""
        if not tokens.isfinite().all():
            raise BrokenAdapterError("tokens to decode hold NaN or infinity; expected finite numbers.")
        with torch.no_grad():
            factors = self.decode_factors(tokens.detach().to(CPU, torch.float32)[None])
        # Copies: A may be a view of the start's A.
        return {name: (a[0].clone(), b[0].clone()) for name, (a, b) in factors.items()}

    def decode_factors(
        self, tokens: Float[Tensor, "batch site width"]
    ) -> dict[str, tuple[Float[Tensor, "batch rank fan_in"], Float[Tensor, "batch fan_out rank"]]]:
        """Differentiable `decode` of a batch, on the tokens' device and in their dtype: {site: (A, B)}.

        In gauge `shared_a` A is a view of the start's A, without a gradient. Raises ValueError for tokens of
        another shape.
        """
        expected = (len(self.frames), self.width)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"tokens have (site, width) = {tuple(tokens.shape[1:])}, this codec's have {expected}. They "
                f"come from another codec: encode again with this one."
            )
        rows = self._at(tokens.device, tokens.dtype)
        pairs = zip(rows, tokens.unbind(1), strict=True)
        return {row.frame.site.name: row.frame.factors(row.coordinates(token)) for row, token in pairs}

    def _at(self, device: torch.device, dtype: torch.dtype) -> tuple[_Row, ...]:
        """Buffers of every site, made once per device and dtype."""
        if (device, dtype) not in self._placed:
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                used, scale = self.mask.sum(1).tolist(), self.scale.tolist()
                parts = zip(self.frames, self.bases, used, scale, strict=True)
                self._placed[device, dtype] = tuple(_row(*part, device, dtype) for part in parts)
        return self._placed[device, dtype]

    def save(self, path: Path | str) -> None:
        """One safetensors file, written whole or not at all; equal codecs give equal bytes."""
        path = Path(path)
        table = {"scale": self.scale, "energy_kept": self.energy_kept, "block_weights": self.block_weights}
        for site, basis in zip(self.spec.sites, self.bases, strict=True):
            if basis is not None:
                table[f"{site.name}.basis"] = basis.contiguous()
            if self.start is not None:
                table[f"{site.name}.lora_A"], table[f"{site.name}.lora_B"] = self.start[site.name]
        about = {"format_version": FORMAT_VERSION, "gauge": self.gauge, "width": self.width}
        # One key only: safetensors writes several in the random order of a hash map.
        metadata = {HEADER: json.dumps({**about, "spec": self.spec.to_dict()}, sort_keys=True)}
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        save_file(table, partial, metadata=metadata)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path | str, *, gauge: str | None = None) -> "AdapterCodec":
        """The inverse of `save`; `gauge`: the one expected. Raises ValueError for a damaged file."""
        header, table = _read(Path(path))
        if gauge is not None and header["gauge"] != gauge:
            raise ValueError(
                f"{path}: this codec has gauge {header['gauge']!r}, expected {gauge!r}. Tokens of one gauge "
                f"mean nothing in another: fit a codec with gauge {gauge!r}."
            )
        spec, start = AdapterSpec.from_dict(header["spec"]), None
        try:
            if header["gauge"] != "canonical":
                start = {s.name: (table[f"{s.name}.lora_A"], table[f"{s.name}.lora_B"]) for s in spec.sites}
            scale, kept, weights = table["scale"], table["energy_kept"], table["block_weights"]
        except KeyError as error:
            raise ValueError(f"{path}: tensor {error} is missing. Fit the codec again.") from error
        bases = tuple(table.get(f"{site.name}.basis") for site in spec.sites)
        codec = cls(spec, header["gauge"], header["width"], start, weights, bases, scale, kept)
        for frame, basis in zip(codec.frames, bases, strict=True):
            if (frame.dim > codec.width) != (basis is not None):
                raise ValueError(f"{path}: {frame.site.name}.basis is missing or not expected. Fit it again.")
        return codec


def round_trip(codec: AdapterCodec, adapter: Adapter) -> Adapter:
    """decode(encode(adapter)): what the codec's width leaves of an adapter."""
    return codec.decode(codec.encode(adapter))


def _fit_bases(
    stream: Stream,
    spec: AdapterSpec,
    frames: Sequence[Frame],
    subspaces: Sequence[StreamingSubspace],
    memory_budget: int,
    bar: str | None,
) -> tuple[list[Tensor | None], Float[Tensor, " site"], int]:
    """(basis or None for the identity, energy on it) per site, and the number of adapters."""
    bases, kept, counts = [], [], set()
    for group in _groups(subspaces, spec, memory_budget):
        counts.add(_one_pass(stream, spec, [(frames[i], subspaces[i]) for i in group], bar))
        _require_same_count(counts)
        for i in group:
            energy, basis = subspaces[i].basis()
            kept.append(energy)
            bases.append(None if basis is None else basis.float())
    return bases, torch.tensor(kept, dtype=torch.float64), counts.pop()


def _one_pass(stream: Stream, spec: AdapterSpec, feeds: Sequence[Feed], bar: str | None) -> int:
    """Feed each frame's coordinates of every adapter to its meter; returns the number of adapters."""
    count = 0
    for count, adapter in enumerate(tqdm(stream(), desc=bar, unit="adapter", disable=bar is None), start=1):
        where = f"adapter {count} of the stream"
        _require_sites(adapter, spec, where)
        for frame, sink in feeds:
            sink.add(frame.coordinates(adapter, where))
    return count


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a codec file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            table = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}). Fit the codec again."
        ) from error
    if HEADER not in metadata:
        raise ValueError(
            f"{path}: not a codec (its header has no {HEADER!r}); expected AdapterCodec.save's file."
        )
    header = json.loads(metadata[HEADER])
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: codec format version {header['format_version']}, but this ltdi_peft reads version "
            f"{FORMAT_VERSION}. Install the version that wrote it, or fit the codec again."
        )
    return header, table


# --- distances between adapters, in ΔW --------------------------------------------------------------------


def _inner_products(x: Factors, y: Factors) -> Float[Tensor, "left right"]:
    """⟨B_x A_x, B_y A_y⟩ = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ) of every pair; x, y: A, Bᵀ of (adapter, rank, fan)."""
    of_a, of_b = (u.flatten(0, 1) @ v.flatten(0, 1).mT for u, v in zip(x, y, strict=True))
    return (of_a * of_b).reshape(len(x[0]), x[0].shape[1], len(y[0]), y[0].shape[1]).sum((1, 3))


def _squares(
    spec: AdapterSpec, got: Adapter, want: Adapter
) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"]]:
    """‖ΔW_got − ΔW_want‖² and ‖ΔW_want‖² per site."""
    _require_sites(got, spec, "got")
    _require_sites(want, spec, "want")
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
    factors = [_site_factors(adapter, site, f"adapter {i}") for i, adapter in enumerate(adapters, start=1)]
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
            _require_sites(adapter, spec, f"{where} adapter {number}")
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
        _require_sites(adapter, spec, f"adapter {number}")
    mean = {}
    for site in spec.sites:
        all_a, all_b = _stacked(adapters, site)
        a, b = balanced(all_a.flatten(0, 1), all_b.flatten(0, 1).mT / len(adapters))
        mean[site.name] = (a[: site.rank].float().contiguous(), b[:, : site.rank].float().contiguous())
    return mean
