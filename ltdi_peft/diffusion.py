"""Trajectory diffusion: one chain from noise to weights, trained to stop at k local targets on its way.

In: encoded trajectories z (batch, k, site, width), the k local targets of each row, the last = final weights;
    a network `predict(x, t)` that names F, the end of the present segment.
Out: losses per row, or weights z (batch, site, width) made from noise.
Idea: the residual vanishes where the one global sampler, aiming at the end of its present segment J(t), takes
    the very step that local chain j would take. So j is no input of the network.
Source: arXiv 2502.01117 (Lt-Di / Mc-Di); METHOD.md §3. Chain time t = 0 … T: 0 = noise, T = weights.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.chain import Chain, Rng, Share, Times, consistent_end, draw_below, gaussian, noised, per_sample

Targets = Float[Tensor, "batch k site width"]
Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t (batch, site, width), t (batch,)) → F, like x_t
Weight = Callable[[Tensor, Tensor], Tensor]  # (abar(t), abar_J(t)), each (batch,) → weight of ‖z_J − F‖²
Step = Callable[[Tensor, Tensor, Chain, int, int, Rng | None], Tensor]  # (x_t, F, chain, t, s, rng) → x_s

MIN_SNR = 5.0  # γ of Hang et al., arXiv 2303.09556


def published(abar: Share, here: Share) -> Share:
    """The paper's weight in F: about 1e-5 at t = 0, the one step where the condition alone decides."""
    return (1 - abar) * here / (1 - here)


def uniform(abar: Share, here: Share) -> Share:
    """Every step counts alike in ‖z_J − F‖²."""
    return torch.ones_like(here)


def min_snr(abar: Share, here: Share) -> Share:
    """The signal-to-noise ratio of the present segment's chain, at most γ = 5."""
    return epsilon(abar, here).clamp(max=MIN_SNR)


def epsilon(abar: Share, here: Share) -> Share:
    """The whole ratio, `published` / (1 − abar): for k = 1 this is vanilla diffusion's own ‖f − ε‖²."""
    return here / (1 - here)


WEIGHTS = {"published": published, "uniform": uniform, "min_snr": min_snr, "epsilon": epsilon}


@dataclass(frozen=True)
class DrawnLoss:
    """Losses per row (mean over site and width), and the local target j (from 1) and time t of each."""

    value: Share
    j: Times
    t: Times


def local_consistency(
    predict: Predict, z: Targets, chain: Chain, rng: Rng, weight: Weight = uniform, noise_floor: float = 1.0
) -> DrawnLoss:
    """‖√(1 − abar_j)·f − √(1 − abar)·ε‖² with j uniform, t uniform in 0 … e_j − 1; z has chain.k targets.

    Written in F: weight · (1 − abar_j)/(1 − abar_J) · ‖F* − F‖², F* the `consistent_end`. `weight` is one of
    t alone, so it cannot move the ideal network. `noise_floor` < 1 lowers each row's noise by a factor drawn
    in [noise_floor, 1], because the mean-only path has less noise than x_t.
    """
    if z.shape[1] != chain.k:
        raise ValueError(f"z has {z.shape[1]} local targets, the chain k = {chain.k}; they must be equal.")
    j = draw_below(torch.full((len(z),), chain.k), rng) + 1
    t = draw_below(chain.ends[j - 1], rng)
    end = _pick(z, j)
    lowered = noise_floor + (1 - noise_floor) * torch.rand(len(z), generator=rng, device=rng.device)
    noise = per_sample(lowered, end) * gaussian(tuple(end.shape), rng, end)
    abar_j, here = chain.abar_of(j, t), chain.abar_here(t)
    x = noised(end, noise, abar_j)
    error = mean_square(consistent_end(x, end, abar_j, here) - predict(x, t.to(x.device)))
    scale = weight(chain.abar[t], here) * (1 - abar_j) / (1 - here)
    return DrawnLoss(scale.to(error) * error, j, t)


def vanilla(
    predict: Predict, z: Targets, chain: Chain, rng: Rng, weight: Weight = uniform, noise_floor: float = 1.0
) -> DrawnLoss:
    """Only the final weights, on the full chain (chain.k = 1); z may hold any number of targets."""
    _require_full_chain("vanilla", chain)
    drawn = local_consistency(predict, z[:, -1:], chain, rng, weight, noise_floor)
    return DrawnLoss(drawn.value, torch.full_like(drawn.j, z.shape[1]), drawn.t)


def naive(
    predict: Predict, z: Targets, chain: Chain, rng: Rng, weight: Weight = uniform, noise_floor: float = 1.0
) -> DrawnLoss:
    """Every local target as if it ended the full chain (chain.k = 1): abar in both places."""
    _require_full_chain("naive", chain)
    j = draw_below(torch.full((len(z),), z.shape[1]), rng) + 1
    drawn = local_consistency(predict, _pick(z, j).unsqueeze(1), chain, rng, weight, noise_floor)
    return DrawnLoss(drawn.value, j, drawn.t)


LOSSES = {"vanilla": vanilla, "naive": naive, "local_consistency": local_consistency}


def _pick(z: Targets, j: Times) -> Float[Tensor, "batch site width"]:
    return z[torch.arange(len(z), device=z.device), (j - 1).to(z.device)]


def _require_full_chain(loss: str, chain: Chain) -> None:
    if chain.k != 1:
        raise ValueError(f"{loss!r} uses the full chain, got k = {chain.k}. Use chain_for({loss!r}, …).")


def mean_square(error: Float[Tensor, "batch ..."]) -> Share:
    """Mean over everything but the rows."""
    return error.square().flatten(1).mean(1)


def chain_for(loss: str, law: str = "cosine", k: int = 3, T: int = 20) -> Chain:
    """The chain to train and to generate on: only local consistency has segments, the others k = 1."""
    if loss not in LOSSES:
        raise ValueError(f"diffusion.loss is {loss!r}; known losses are {sorted(LOSSES)}.")
    return Chain(law, k if loss == "local_consistency" else 1, T)


def weight_for(loss: str, weight: str) -> Weight:
    """The weight by name; `published` is ‖f − ε‖² for vanilla, which has no factor (1 − abar)."""
    if weight not in WEIGHTS:
        raise ValueError(f"diffusion.weight is {weight!r}; known weights are {sorted(WEIGHTS)}.")
    return epsilon if (loss, weight) == ("vanilla", "published") else WEIGHTS[weight]


def _shares(chain: Chain, t: int, s: int) -> tuple[float, float, float]:
    """abar_J(t) and abar_J(s) of the segment that holds t, and ∏ α from t to s."""
    abar, ends = chain.numbers
    end = abar[next(e for e in ends if e > t)]
    return abar[t] / end, abar[s] / end, abar[t] / abar[s]


def mean_step(x: Tensor, end: Tensor, chain: Chain, t: int, s: int, rng: Rng | None = None) -> Tensor:
    """(x − (1 − α)/√(1 − abar)·f)/√α written in F: the mean of x_s, given x_t and the segment's end."""
    now, then, alpha = _shares(chain, t, s)
    return (math.sqrt(alpha) * (1 - then) * x + math.sqrt(then) * (1 - alpha) * end) / (1 - now)


def ddim_step(x: Tensor, end: Tensor, chain: Chain, t: int, s: int, rng: Rng | None = None) -> Tensor:
    """Keep the implied noise and lower its share (arXiv 2010.02502, η = 0), inside the present segment."""
    now, then, _ = _shares(chain, t, s)
    noise = (x - math.sqrt(now) * end) / math.sqrt(1 - now)
    return math.sqrt(then) * end + math.sqrt(1 - then) * noise


def stochastic_step(x: Tensor, end: Tensor, chain: Chain, t: int, s: int, rng: Rng | None = None) -> Tensor:
    """`mean_step` plus the global chain's posterior noise (arXiv 2006.11239 eq. 7); none at s = T."""
    if rng is None:
        raise ValueError("the stochastic sampler adds noise at every step: pass rng, a torch.Generator.")
    now, then = float(chain.abar[t]), float(chain.abar[s])
    deviation = math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    return mean_step(x, end, chain, t, s) + deviation * gaussian(tuple(x.shape), rng, x)


def path(
    step: Step,
    predict: Predict,
    start: Tensor,
    chain: Chain,
    rng: Rng | None = None,
    steps: int | None = None,
) -> Iterator[Tensor]:
    """x_0 = start (noise), then x at every time of chain.times(steps); the last one is the weights."""
    x = start
    yield x
    for t, s in pairwise(chain.times(steps)):
        end = predict(x, torch.full((len(x),), t, device=x.device))
        x = step(x, end, chain, t, s, rng)
        yield x


def walk(
    step: Step,
    predict: Predict,
    start: Tensor,
    chain: Chain,
    rng: Rng | None = None,
    steps: int | None = None,
) -> Tensor:
    """The weights at the end of `path`; each sampler is this function with its step filled in."""
    return deque(path(step, predict, start, chain, rng, steps), maxlen=1)[0]


mean_only = partial(walk, mean_step)
ddim = partial(walk, ddim_step)
stochastic = partial(walk, stochastic_step)
SAMPLERS = {"mean_only": mean_only, "ddim": ddim, "stochastic": stochastic}
STEPS = {"mean_only": mean_step, "ddim": ddim_step, "stochastic": stochastic_step}  # of each sampler


def path_loss(
    predict: Predict, z: Targets, start: Tensor, chain: Chain, weight: Weight = uniform
) -> Float[Tensor, "batch step"]:
    """weight · mean (z_{J(t)} − F(x_t, t))² at every t of the mean-only path; k = 1 takes the last z.

    The path is detached step by step, so this is also a loss for training on the network's own path.
    """
    targets = z[:, -1:] if chain.k == 1 else z
    x, losses = start, []
    for t in range(chain.T):
        times = torch.full((len(x),), t)
        end = predict(x, times.to(x.device))
        error = mean_square(_pick(targets, chain.segment(times)) - end)
        losses.append(weight(chain.abar[times], chain.abar_here(times)).to(error) * error)
        x = mean_step(x, end.detach(), chain, t, t + 1)
    return torch.stack(losses, dim=1)


def guided(conditional: Predict, null: Predict, scale: float) -> Predict:
    """Classifier-free guidance, on F since f is affine in it: null + scale · (conditional − null)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(null(x, t), conditional(x, t), scale)

    return predict


def mixing_weights(batch: int, rng: Rng, share: float = 0.5, most: int = 4) -> Float[Tensor, "row task"]:
    """Row i: the weights of the tasks that row i becomes, summing to 1; an identity row where not mixed.

    A mixed row joins m tasks, m uniform in 2 … most, with w = 1/m + (g − mean g)/√m, g standard normal. Then
    E‖w‖² = 1: mixtures of independent tasks keep the mean and covariance of plain ones (a Dirichlet shrinks
    them to the mean), and they reach outside the convex hull of the tasks, as unseen tasks do.
    """
    if batch < 2 or most < 2:
        return torch.eye(batch)
    m = 2 + draw_below(torch.full((batch,), min(most, batch) - 1), rng).unsqueeze(1)
    joined = torch.rand(batch, batch, generator=rng, device=rng.device).cpu().argsort(1).argsort(1) < m
    g = gaussian((batch, batch), rng, torch.empty(0)) * joined
    mixed = (1 / m + (g - g.sum(1, keepdim=True) / m) / m.sqrt()) * joined
    chosen = torch.rand(batch, generator=rng, device=rng.device).cpu() < share
    return torch.where(chosen.unsqueeze(1), mixed, torch.eye(batch))


def mix_tasks(
    z: Targets, condition: Float[Tensor, "batch condition"], rng: Rng, share: float = 0.5, most: int = 4
) -> tuple[Targets, Float[Tensor, "batch condition"]]:
    """Task mixing: a `share` of the rows becomes Σ w_m z_m, Σ w_m c_m with the same `mixing_weights`."""
    weights = mixing_weights(len(z), rng, share, most)
    return torch.einsum("bm,mksw->bksw", weights.to(z), z), weights.to(condition) @ condition


def ideal_denoiser(targets: Float[Tensor, "point k site width"], chain: Chain) -> Predict:
    """What minimises local consistency over a finite set of trajectories: METHOD.md's f*, as an end.

    For vanilla pass targets[:, -1:], for naive targets.flatten(0, 1)[:, None], both with the k = 1 chain.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        every_t, j = t.cpu().repeat_interleave(chain.k), torch.arange(chain.k).repeat(len(t)) + 1
        ended = chain.ends[j - 1] <= every_t
        abar_j = torch.where(ended, 0.5, chain.abar_of(j, every_t))  # ended chains get no share below
        rows, z = x.repeat_interleave(chain.k, 0).unsqueeze(1), targets[:, j - 1].transpose(0, 1)
        noise, closeness = 1 - abar_j, -(rows - per_sample(abar_j.sqrt(), z) * z).square().flatten(2).sum(2)
        # log of e_j⁻¹ · N(x; √abar_j z, (1 − abar_j)I) · (1 − abar_j), the last as the loss weighs F* by it
        evidence = (1 - x[0].numel() / 2) * noise.log() - chain.ends[j - 1].log()
        evidence = evidence.masked_fill(ended, -math.inf).to(x).unsqueeze(1)
        share = (evidence + closeness / per_sample(2 * noise, closeness)).reshape(len(x), -1).softmax(1)
        ends = consistent_end(rows, z, abar_j, chain.abar_here(every_t))
        return (share.view(len(x), -1, 1, 1) * ends.reshape(len(x), -1, *x.shape[1:])).sum(1)

    return predict
