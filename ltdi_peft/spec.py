"""An adapter as plain tensors, and the table of what it sits on. Knows nothing of PEFT.

In: numbers and names.  Out: `Adapter` {site: (A, B)} float32 on the CPU, and `AdapterSpec`, the site table
that every later room reads. Keys are sorted by site name, and that order is the token order.
Idea: no list of layer names anywhere: the adapter itself says which linear layers it sits on.
Source: LoRA, arXiv:2106.09685 §4.1; rsLoRA's scaling, arXiv:2312.03732."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""(A, B): A (rank, fan_in), B (fan_out, rank); float32, CPU, contiguous."""
Adapter = dict[str, Factors]
"""Site name → factors. Keys are sorted; that order is the token order."""
Sites = Mapping[str, Factors]
"""An adapter whose sites may be read from a file when they are asked for, and again at every asking."""


class BrokenAdapterError(ValueError):
    """Weights that do not do what they claim: missing, renamed, mis-shaped, not finite, without effect."""


class SpecMismatchError(BrokenAdapterError):
    """An adapter for another base model, site set, rank, alpha or shape than expected."""


class UnsupportedAdapterError(ValueError):
    """An adapter that {site: (A, B)} cannot express; refused by the name of the feature."""


@dataclass(frozen=True)
class Site:
    """One adapted linear layer. ΔW = scaling · B A, with A (rank, fan_in) and B (fan_out, rank)."""

    name: str  # module path inside the base model, e.g. "model.layers.20.self_attn.q_proj"
    fan_in: int
    fan_out: int
    rank: int
    alpha: float
    scaling: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter sits on: the base model, the site table in token order, and PEFT's configuration.

    Each of `sites`, sorted by name, is one adapted linear layer: `name`, `fan_in`, `fan_out`, `rank`,
    `alpha`, `scaling`. It adds ΔW = scaling · B A, with A (rank, fan_in) and B (fan_out, rank).
    """

    base_model: str  # Hub id or local name, what goes to base_model_name_or_path
    sites: tuple[Site, ...]
    config: dict[str, Any]  # LoraConfig.to_dict() as JSON, keys sorted, without versions and paths

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if not names or names != sorted(set(names)):
            raise ValueError(
                f"AdapterSpec.sites are the token order: non-empty, sorted and unique; got {names}."
            )

    @property
    def numbers(self) -> int:
        """Of one adapter, A and B of all sites."""
        return sum(site.rank * (site.fan_in + site.fan_out) for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        sites = [asdict(site) for site in self.sites]
        return {"base_model": self.base_model, "sites": sites, "config": self.config}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "AdapterSpec":
        """The inverse of `to_dict`."""
        return cls(table["base_model"], tuple(Site(**site) for site in table["sites"]), table["config"])


def lora_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The α/r of LoRA, or the α/√r of rsLoRA."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def delta_w(
    a: Float[Tensor, "rank fan_in"], b: Float[Tensor, "fan_out rank"], scaling: float
) -> Float[Tensor, "fan_out fan_in"]:
    """What the adapter adds to the frozen weight: scaling · B A (transposed for GPT-2's Conv1D)."""
    return scaling * (b @ a)


def delta_norms(
    a: Float[Tensor, "*batch rank fan_in"], b: Float[Tensor, "*batch fan_out rank"], scaling: float
) -> Float[Tensor, "*batch"]:
    """‖scaling · B A‖_F, as the trace of (BᵀB)(AAᵀ), without ever forming B A; float64."""
    a, b = a.double(), b.double()  # float32 would lose half its digits to the square
    return abs(scaling) * ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0).sqrt()


def delta_norm(a: Float[Tensor, "rank fan_in"], b: Float[Tensor, "fan_out rank"], scaling: float) -> float:
    """`delta_norms` of one adapter's site."""
    return delta_norms(a, b, scaling).item()


def site_norms(spec: AdapterSpec, adapter: Adapter) -> dict[str, float]:
    """‖ΔW‖_F of every site, in token order."""
    return {site.name: delta_norm(*adapter[site.name], site.scaling) for site in spec.sites}


def moved(adapter: Adapter, start: Adapter, origin: Adapter) -> Adapter:
    """What was `adapter` to `start` to `origin`: the difference of B added there, with the origin's A."""
    return {site: (a, b + adapter[site][1] - start[site][1]) for site, (a, b) in origin.items()}


def require_sites(expected: set[str], got: set[str], where: str) -> None:
    """Raise BrokenAdapterError that names the first missing or unknown site."""
    if missing := sorted(expected - got):
        raise BrokenAdapterError(
            f"{where}: {len(missing)} of {len(expected)} sites are missing, first {missing[0]}."
        )
    if extra := sorted(got - expected):
        raise BrokenAdapterError(
            f"{where}: {len(extra)} sites are not in the model, first {extra[0]}; "
            f"the model has {len(expected)} sites, first {min(expected, default=None)}."
        )


def all_finite(weight: Tensor) -> bool:
    """No NaN, no infinity. Both pass through a sum: a finite one says so, twenty times faster than isfinite.

    A sum may overflow though no value does; then the extremes say it.
    """
    if weight.numel() == 0 or math.isfinite(float(weight.sum())):
        return True
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(weight))


def require_shape(weight: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raise BrokenAdapterError unless one factor has this shape."""
    if tuple(weight.shape) != shape:
        raise BrokenAdapterError(f"{where}: shape is {tuple(weight.shape)}, expected {shape}.")


def require_fit(weight: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raise BrokenAdapterError unless one factor has this shape and is finite."""
    require_shape(weight, shape, where)
    if not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise BrokenAdapterError(f"{where}: {bad} of {weight.numel()} values are NaN or infinite.")


def check_adapter(
    spec: AdapterSpec, adapter: Adapter, where: str, require: Callable[..., None] = require_fit
) -> None:
    """Raise BrokenAdapterError unless `adapter` has exactly the spec's sites and shapes, all finite.

    require: `require_shape` leaves the values to the caller.
    """
    require_sites({site.name for site in spec.sites}, set(adapter), where)
    for site in spec.sites:
        a, b = adapter[site.name]
        require(a, (site.rank, site.fan_in), f"{where}: site {site.name}, lora_A")
        require(b, (site.fan_out, site.rank), f"{where}: site {site.name}, lora_B")


def require_same_spec(expected: AdapterSpec, got: AdapterSpec, where: str) -> None:
    """Raise SpecMismatchError that names the first difference: base model, site set, rank, alpha, shape.

    Dropout, task type and the like may differ: they do not change what the weights mean.
    """
    if expected.base_model != got.base_model:
        raise SpecMismatchError(
            f"{where}: the adapter is for base model {got.base_model!r}, expected {expected.base_model!r}. "
            "Use adapters of one base model, or pass its Hub id if both are the same model."
        )
    ours, theirs = {s.name: s for s in expected.sites}, {s.name: s for s in got.sites}
    if odd := sorted(set(ours) ^ set(theirs)):
        side = "missing" if odd[0] in ours else "not expected"
        raise SpecMismatchError(
            f"{where}: the adapter has {len(theirs)} sites, expected {len(ours)}; first difference: "
            f"{odd[0]} is {side}. Record with the same target_modules."
        )
    for key in ("rank", "alpha", "fan_in", "fan_out", "scaling"):
        for name, site in ours.items():
            if (a := vars(site)[key]) != (b := vars(theirs[name])[key]):
                raise SpecMismatchError(
                    f"{where}: site {name} has {key} {b}, expected {a}. Use one LoraConfig for all."
                )
