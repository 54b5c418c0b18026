"""The denoiser: a small transformer over site tokens, beside a path that is linear in the condition.

In: x_t (batch, site, width), chain time t (batch,), condition (batch, condition), and the rows that drop it.
Out: F (batch, site, width), the end of the present segment (a `diffusion.Predict` once conditioned).
Idea: from one shared start, adapters are close to linear in their task, and a flexible network memorises few
    tasks (METHOD.md §7). So F = s(t)·(W c + b) + g(t)·x + transformer(x, t, c), every part zero at the start:
    an untrained network names z = 0, the codec's centre.
Source: adaptive layer norm after DiT, arXiv 2212.09748 §3.2; METHOD.md §3 for the end-point form.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ltdi_peft.chain import Chain
from ltdi_peft.diffusion import Predict, Step, walk

TIME_WIDTH = 64  # sines and cosines of t
LONGEST_PERIOD = 10_000.0  # chain steps; the shortest is 2π steps, so neighbouring t differ at any T


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes; `linear` and `nonlinear` switch the two paths, at least one is on."""

    sites: int
    width: int
    condition_width: int
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    linear: bool = True
    nonlinear: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sites", "width", "condition_width", "hidden", "layers", "heads"):
            if vars(self)[name] < 1:
                raise ValueError(f"denoiser.{name} must be at least 1, got {vars(self)[name]}.")
        if not (self.linear or self.nonlinear):
            raise ValueError("denoiser.linear and denoiser.nonlinear are both false; turn one of them on.")
        if self.hidden % self.heads:
            raise ValueError(f"denoiser.hidden = {self.hidden} must be a multiple of heads = {self.heads}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"denoiser.dropout must lie in [0, 1), got {self.dropout}.")


def sinusoids(t: Int[Tensor, " batch"]) -> Float[Tensor, "batch time"]:
    """cos and sin of t at geometrically spaced periods, float32."""
    octave = torch.arange(TIME_WIDTH // 2, device=t.device, dtype=torch.float32) / (TIME_WIDTH // 2)
    angle = t[:, None].float() * torch.exp(-math.log(LONGEST_PERIOD) * octave)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def modulated(
    h: Float[Tensor, "batch site hidden"],
    shift: Float[Tensor, "batch hidden"],
    scale: Float[Tensor, "batch hidden"],
) -> Float[Tensor, "batch site hidden"]:
    """Layer norm whose shift and gain come from time and condition."""
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Pre-norm attention over sites, then an MLP; time and condition enter through the norms."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = _zeroed(nn.Linear(hidden, 4 * hidden))
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def attention(self, h: Float[Tensor, "batch site hidden"]) -> Float[Tensor, "batch site hidden"]:
        """Every site looks at every site."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(
        self, h: Float[Tensor, "batch site hidden"], about: Float[Tensor, "batch hidden"]
    ) -> Float[Tensor, "batch site hidden"]:
        """One residual block; `about` holds time and condition."""
        shift_a, scale_a, shift_m, scale_m = self.modulation(about).chunk(4, dim=-1)
        h = h + self.dropout(self.attention(modulated(h, shift_a, scale_a)))
        return h + self.dropout(self.mlp(modulated(h, shift_m, scale_m)))


class Transformer(nn.Module):
    """The non-linear path. Each site has its own way in and out, for the codec gives each its own basis."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.inward = nn.Parameter(torch.randn(config.sites, config.width, hidden) / math.sqrt(config.width))
        self.site = nn.Parameter(torch.randn(config.sites, hidden) / math.sqrt(hidden))
        self.condition = nn.Linear(config.condition_width, hidden)
        self.blocks = nn.ModuleList(Block(hidden, config.heads, config.dropout) for _ in range(config.layers))
        self.modulation = _zeroed(nn.Linear(hidden, 2 * hidden))
        self.outward = nn.Parameter(torch.zeros(config.sites, hidden, config.width))

    def forward(
        self,
        x: Float[Tensor, "batch site width"],
        time: Float[Tensor, "batch hidden"],
        condition: Float[Tensor, "batch condition"],
    ) -> Float[Tensor, "batch site width"]:
        """What the linear path leaves; zero until `outward` has moved."""
        about = F.silu(time + self.condition(condition))
        h = torch.einsum("bsw,swh->bsh", x, self.inward) + self.site + about[:, None]
        for block in self.blocks:
            h = block(h, about)
        h = modulated(h, *self.modulation(about).chunk(2, dim=-1))
        return torch.einsum("bsh,shw->bsw", h, self.outward)


class Denoiser(nn.Module):
    """F(x, t, c), zero when untrained. A dropped row sees `null`, a learned condition, instead of its own."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.null = nn.Parameter(torch.zeros(config.condition_width))
        self.time = nn.Sequential(
            nn.Linear(TIME_WIDTH, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.hidden)
        )
        if config.linear:
            self.map = _zeroed(nn.Linear(config.condition_width, config.sites * config.width))
            self.gains = _zeroed(nn.Linear(config.hidden, 2 * config.sites))
        if config.nonlinear:
            self.transformer = Transformer(config)

    def forward(
        self,
        x: Float[Tensor, "batch site width"],
        t: Int[Tensor, " batch"],
        condition: Float[Tensor, "batch condition"],
        dropped: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch site width"]:
        """The end of the segment that holds t, per row; without the condition in `dropped` rows."""
        return self.predictor(condition, dropped)(x, t)

    def predictor(
        self, condition: Float[Tensor, "batch condition"], dropped: Bool[Tensor, " batch"] | None = None
    ) -> Predict:
        """(x, t) → F of these conditions. W c + b, most of the work, is made once for all t of a chain."""
        if dropped is not None:
            condition = torch.where(dropped[:, None], self.null.to(condition), condition)
        affine = self.affine(condition) if self.config.linear else None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            time = self.time(sinusoids(t).to(self.null))
            end = torch.zeros_like(x) if affine is None else self.linear(x, time, affine)
            return end + self.transformer(x, time, condition) if self.config.nonlinear else end

        return predict

    def affine(self, condition: Float[Tensor, "batch condition"]) -> Float[Tensor, "batch site width"]:
        """W c + b."""
        # An Adam step moves every weight alike, so W c would jump by ∝ condition_width without the root.
        flat = self.map(condition / math.sqrt(self.config.condition_width))
        return flat.view(-1, self.config.sites, self.config.width)

    def linear(
        self,
        x: Float[Tensor, "batch site width"],
        time: Float[Tensor, "batch hidden"],
        affine: Float[Tensor, "batch site width"],
    ) -> Float[Tensor, "batch site width"]:
        """s(t)·(W c + b) + g(t)·x with one s and g per site: late in the chain x says more than c does."""
        share, gain = self.gains(time).unsqueeze(-1).chunk(2, dim=1)
        return (1 + share) * affine + gain * x

    def chain_shares(
        self, step: Step, chain: Chain, steps: int | None = None
    ) -> tuple[Float[Tensor, "site 1"], Float[Tensor, "site 1"]]:
        """(p, q) with p · (W c + b) + q · noise where a chain ends, for a network without its transformer.

        Then F and the sampler's step are linear in x, site by site, with numbers that only t decides: the
        chain of two numbers a site is the chain of all. `step`: of a sampler that adds no noise.
        """
        time = self.time(sinusoids(torch.arange(chain.T, device=self.null.device)).to(self.null))
        share, gain = self.gains(time).unsqueeze(-1).chunk(2, dim=1)
        affine, start = torch.eye(2, device=share.device, dtype=share.dtype)[..., None, None]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return (1 + share[t]) * affine + gain[t] * x

        of_affine, of_noise = walk(step, predict, start.expand(2, self.config.sites, 1), chain, steps=steps)
        return of_affine, of_noise


def conditioned(
    network: nn.Module,
    condition: Float[Tensor, "batch condition"],
    dropped: Bool[Tensor, " batch"] | None = None,
) -> Predict:
    """The network as losses and samplers call it, (x, t) → F; with all rows dropped, guidance's null."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, condition, dropped)

    return predict
