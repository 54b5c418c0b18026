"""One representative (A, B) per adapter, and the coordinates of every site.

In: {site: (A, B)} and, but for `canonical`, a start.  Out: `Frame`s: per site float64 coordinates x ⇄ (A, B).
Idea: (GA, BG⁻¹) is the same adapter for every invertible G, so one *gauge* is fixed. There an adapter has
coordinates x that are zero at the gauge's origin:

    gauge           origin        coordinates x of a site                         for adapters
    shared_a        θ_0           (B − B_0)·L,  L Lᵀ = scaling²·A Aᵀ              with one frozen A
                    or an origin that θ_0 was trained into
    shared_start    θ_0           w_A·(A − A_0), w_B·(B − B_0)                    trained from one θ_0
    canonical       zero adapter  √scaling·(√S Vᵀ, U √S) of BA = U S Vᵀ           from anywhere
    reference       zero adapter  the same, rotated onto `start` (Procrustes)     from anywhere

In `shared_a` distances of x are distances of ΔW; in `shared_start` to first order and up to direction.
Source: METHOD.md §6; LoRA, arXiv:2106.09685 §4.1; Procrustes, Schönemann 1966 (doi:10.1007/BF02289451).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.spec import (
    Adapter,
    AdapterSpec,
    Factors,
    Site,
    Sites,
    SpecMismatchError,
    check_adapter,
    require_fit,
    require_sites,
)

GAUGES = ("shared_a", "shared_start", "canonical", "reference")

Stream = Callable[[], Iterable[Sites]]
"""Training adapters, read lazily; every call starts a new pass over the same adapters in the same order."""

# Below this ratio of A's singular values, ΔW determines B to fewer than two digits in float32.
RANK_TOLERANCE = 1e-5
# Relative room for an A that passed through float32 arithmetic; a trained A is off by 1e-3 and more.
SAME_A = 1e-6


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

    @torch.no_grad()
    def coordinates(
        self, adapter: Sites, where: str, out: Float[Tensor, " dim"] | None = None
    ) -> Float[Tensor, " dim"]:
        """Float64 coordinates of the adapter's site, brought into the gauge; refuses what does not fit.

        out: float64, where they go.
        """
        a, b = site_factors(adapter, self.site, where)
        if self.gauge == "shared_a":
            _require_same_a(self, a, where)
        elif self.gauge != "shared_start":
            a, b = balanced(a, b)
            a, b = turned_to(self.reference, (a, b)) if self.reference else (a, b)
        x = torch.empty(self.dim, dtype=torch.float64) if out is None else out
        of_a, of_b = x.split([self.dim - self.b.numel(), self.b.numel()])
        if self.weight_a:
            of_a.view_as(a).copy_(a).sub_(self.a).mul_(self.weight_a)
        # Copied first: a difference of float32 and float64 takes four times as long.
        from_b = of_b.view_as(b).copy_(b).sub_(self.b)
        if self.gauge == "shared_a":
            from_b.copy_(from_b @ self.root)
        else:
            from_b.mul_(self.root[0, 0])  # a multiple of the identity
        return x

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


def _frame(
    gauge: str, site: Site, start: Factors | None, weights: Float[Tensor, " 2"], origin: Factors | None
) -> Frame:
    """The coordinates of one site; `weights` = (w_A, w_B), of which shared_a uses none, `origin` it alone."""
    reference = balanced(*start) if start and gauge == "reference" else None
    if start is None or reference:
        start = torch.zeros(site.rank, site.fan_in), torch.zeros(site.fan_out, site.rank)
    a, b = start[0].double(), start[1].double()
    if gauge == "shared_a":
        root = _metric_root(site, a)
        a, b = (factor.double() for factor in origin) if origin else (a, b)
        return Frame(gauge, site, a, b, 0.0, root, torch.linalg.inv(root))
    weight_a, weight_b = weights.tolist()
    eye = torch.eye(site.rank, dtype=torch.float64)
    return Frame(gauge, site, a, b, weight_a, weight_b * eye, eye / weight_b, reference)


def site_frames(
    spec: AdapterSpec,
    gauge: str,
    start: Adapter | None,
    weights: Float[Tensor, "site 2"],
    origin: Adapter | None = None,
) -> tuple[Frame, ...]:
    """The coordinates of every site, in the spec's order.

    origin: in `shared_a`, what the same differences in B, measured with the start's A, are counted from.
    """
    starts, origins = ([one[site.name] if one else None for site in spec.sites] for one in (start, origin))
    parts = zip(spec.sites, starts, weights, origins, strict=True)
    return tuple(_frame(gauge, *of_site) for of_site in parts)


def block_weights(
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
        require_spec_sites(adapter, spec, where)
        norms = [_block_norms(*site_factors(adapter, site, where)) for site in spec.sites]
        squares += torch.stack(norms).square()
    return (squares / max(count, 1)).sqrt()


# --- what may come in -------------------------------------------------------------------------------------


def require_gauge(gauge: str, start: Adapter | None) -> None:
    """Raise ValueError for an unknown gauge, or one that does not go with this start."""
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


def require_spec_sites(adapter: Sites, spec: AdapterSpec, where: str) -> None:
    """Raise BrokenAdapterError unless `adapter` has exactly the spec's sites."""
    require_sites({site.name for site in spec.sites}, set(adapter), where)


def site_factors(adapter: Sites, site: Site, where: str) -> Factors:
    """(A, B) of one site, if they are finite and have the shapes of the spec. Touches no other site.

    Raises BrokenAdapterError that names `where`, the site and the factor.
    """
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


def float32_copy(start: Adapter | None, spec: AdapterSpec) -> Adapter | None:
    """A float32 copy of the start on the CPU; raises BrokenAdapterError unless it fits `spec`."""
    if start is None:
        return None
    check_adapter(spec, start, "start")
    copies = {}
    for site in spec.sites:
        a, b = (w.to("cpu", torch.float32, copy=True) for w in start[site.name])
        copies[site.name] = (a.contiguous(), b.contiguous())
    return copies
