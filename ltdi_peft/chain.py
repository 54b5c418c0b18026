"""The noising chain: signal shares in continuous time, cut into the segments of k local targets.

In: a law, k and T; weights z, or a noisy x_t with its time t (batch,).
Out: signal shares; x_t from z and back; the residual f from the end F of the present segment and back.
Idea: f is affine in F, so a network that names where its segment ends loses nothing, and a zero network
    ends at the centre instead of at 150 to 400 times noise.
Source: METHOD.md §3. Chain time t = 0 … T: 0 = noise, T = weights.

Tables are float64 on the CPU, because 1 − abar of a long chain is 1e-6 near its end; only finished
coefficients are cast to the data's dtype and device.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rng = torch.Generator
Times = Int[Tensor, " batch"]  # chain times or local targets, one per row
Share = Float[Tensor, " batch"]  # signal shares or weights, one per row

COSINE_LEAST = 1 / 400  # √abar(0): a cosine that reached 0 would make the first step divide by zero
VP_BETA = (0.1, 20.0)  # Song et al., arXiv 2011.13456, appendix C


def cosine(u: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
    """Signal share abar at noise time u: 0 = weights, 1 = noise (after arXiv 2102.09672 §3.2)."""
    return torch.cos(u * math.acos(COSINE_LEAST)) ** 2


def vp(u: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
    """exp(−∫β), β linear in u: integrated, because a β table rescaled to few steps reaches α = 0."""
    low, high = VP_BETA
    return torch.exp(-(low * u + (high - low) * u**2 / 2))


LAWS = {"cosine": cosine, "vp": vp}


@dataclass(frozen=True)
class Chain:
    """T steps from noise to weights under a continuous `law`, cut into k segments. Refuses T < k."""

    law: str = "cosine"
    k: int = 3
    T: int = 20

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"diffusion.law is {self.law!r}; known laws are {sorted(LAWS)}.")
        if not 1 <= self.k <= self.T:
            raise ValueError(
                f"diffusion needs 1 ≤ k ≤ T, a step for every local target; got k = {self.k}, T = {self.T}. "
                f"Raise T or lower k."
            )

    @cached_property
    def abar(self) -> Float[Tensor, " time"]:
        """abar(t) = ∏_{s=t}^{T−1} α_s for t = 0 … T; abar(T) = 1."""
        return LAWS[self.law](1 - torch.arange(self.T + 1, dtype=torch.float64) / self.T)

    @cached_property
    def alpha(self) -> Float[Tensor, " step"]:
        """α_t of step t → t + 1, for t = 0 … T − 1."""
        return self.abar[:-1] / self.abar[1:]

    @cached_property
    def ends(self) -> Int[Tensor, " k"]:
        """e_j = round(j·T/k), the time at which local chain j ends, for j = 1 … k."""
        return torch.tensor([round(j * self.T / self.k) for j in range(1, self.k + 1)])

    @cached_property
    def numbers(self) -> tuple[list[float], list[int]]:
        """`abar` and `ends` outside tensors, which take longer to read than a sampler's step to make."""
        return self.abar.tolist(), self.ends.tolist()

    def segment(self, t: Times) -> Times:
        """J(t), the smallest j with e_j > t, counted from 1; t in 0 … T − 1."""
        return torch.searchsorted(self.ends, t.cpu(), right=True) + 1

    def abar_of(self, j: Times, t: Times) -> Share:
        """abar_j(t) = ∏_{s=t}^{e_j−1} α_s: the signal share of local chain j, 1 at t = e_j."""
        return self.abar[t.cpu()] / self.abar[self.ends[j.cpu() - 1]]

    def abar_here(self, t: Times) -> Share:
        """abar_J(t), the signal share of the present segment's own chain."""
        return self.abar_of(self.segment(t), t)

    def times(self, steps: int | None = None) -> list[int]:
        """0 … T, or at most `steps` strides through it that still stop at every segment end."""
        if steps is None:
            return list(range(self.T + 1))
        if not self.k <= steps <= self.T:
            raise ValueError(f"sampling steps must lie in k … T = {self.k} … {self.T}, got {steps}.")
        to = [0, *self.ends.tolist()]
        strides = pairwise([0, *Chain(self.law, self.k, steps).ends.tolist()])
        parts = [torch.linspace(to[j], to[j + 1], b - a + 1) for j, (a, b) in enumerate(strides)]
        return torch.cat(parts).round().long().unique().tolist()


def per_sample(coefficient: Share, like: Float[Tensor, "batch ..."]) -> Tensor:
    """Lift a (batch,) coefficient so that it multiplies `like` row by row, in its dtype, on its device."""
    return coefficient.to(like).view(-1, *(1,) * (like.ndim - 1))


def gaussian(shape: tuple[int, ...], rng: Rng, like: Tensor) -> Tensor:
    """Standard noise, drawn where `rng` lives, then moved to where `like` lives."""
    return torch.randn(shape, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)


def draw_below(bounds: Times, rng: Rng) -> Times:
    """One integer per row, uniform in 0 … bound − 1, on the CPU."""
    uniforms = torch.rand(len(bounds), generator=rng, device=rng.device).cpu()
    return (uniforms.double() * bounds).long()


def noised(z: Tensor, noise: Tensor, abar: Share) -> Tensor:
    """x_t of a chain that ends at z, with signal share abar."""
    return per_sample(abar.sqrt(), z) * z + per_sample((1 - abar).sqrt(), z) * noise


def denoised(x: Tensor, noise: Tensor, abar: Share) -> Tensor:
    """The inverse of `noised`: the end of the chain, if `noise` is what was mixed in."""
    return (x - per_sample((1 - abar).sqrt(), x) * noise) / per_sample(abar.sqrt(), x)


def residual_from_end(x: Tensor, t: Times, end: Tensor, chain: Chain) -> Tensor:
    """f = √(1 − abar) · (x − √abar_J · F) / (1 − abar_J): the network's f when it names the end F."""
    here = chain.abar_here(t)
    scale = (1 - chain.abar[t.cpu()]).sqrt() / (1 - here)
    return per_sample(scale, x) * (x - per_sample(here.sqrt(), x) * end)


def end_from_residual(x: Tensor, t: Times, residual: Tensor, chain: Chain) -> Tensor:
    """The inverse of `residual_from_end`: the end F that f aims at."""
    here = chain.abar_here(t)
    scale = (1 - here) / (1 - chain.abar[t.cpu()]).sqrt()
    return (x - per_sample(scale, x) * residual) / per_sample(here.sqrt(), x)


def consistent_end(x: Tensor, z: Tensor, abar_j: Share, here: Share) -> Tensor:
    """The end F* at which √(1 − abar_j)·f = √(1 − abar)·ε: the global step is chain j's step. z for j = J."""
    z_share = (1 - here) / (1 - abar_j) * (abar_j / here).sqrt()
    x_share = (here - abar_j) / (1 - abar_j) / here.sqrt()
    return per_sample(x_share, x) * x + per_sample(z_share, x) * z
