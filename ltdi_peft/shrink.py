"""A generator in fewer bytes.

In: a trained `Generator`, conditions of its training prompts, bytes.  Out: a `Generator` of a narrower width.
Idea: the codec holds every direction of the training runs, what the generator makes lies in far fewer. Per
site the strongest directions of the generated tokens become the codec's basis, and all that reads or writes
tokens (centre, mean, denoiser) is turned into it, in 8 bits (int8.py): the same adapters, up to what lies
outside and to rounding.
Only the noise differs: a seed draws it in the narrower width.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.distance import delta_w_distance
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.generator import BUFFERS, Generator
from ltdi_peft.int8 import rounded

MAX_BYTES = 25_000_000
TOGETHER = 256  # prompts whose tokens are made at a time
DIGITS = 6  # of the error in config.json


@dataclass(frozen=True)
class Directions:
    """What a generator makes at one site, strongest first."""

    rows: Float[Tensor, "direction used"]  # orthonormal, in the numbers of a token that are not padding
    energy: Float[Tensor, " direction"]


def shrink(
    generator: Generator,
    conditions: Float[Tensor, "prompt condition"] | None = None,
    *,
    held_out: Float[Tensor, "prompt condition"] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Generator:
    """The generator at the largest width whose two safetensors files have at most `max_bytes` bytes.

    conditions: of training prompts, which say what is kept; default: those in the generator, one a training
    task. held_out: of prompts that the error is measured on; default: every fourth of `conditions`, measured
    with directions of the others. `config.shrunk` holds `from_width`, `width`, `prompts` and `error`. Raises
    ValueError for a generator that was shrunk before, and where not even width 1 fits.
    """
    if generator.config.shrunk:
        raise ValueError("this generator was shrunk before: shrink the one that `ltdi train` wrote.")
    conditions = generator.conditions if conditions is None else conditions
    directions = strongest(generator, conditions)
    width = fitting_width(generator, directions, max_bytes)
    small = measured = narrowed(generator, directions, width)
    if held_out is None:
        left_out = torch.arange(len(conditions)) % 4 == 0
        held_out = conditions[left_out]
        measured = narrowed(generator, strongest(generator, conditions[~left_out]), width)
    about = {"prompts": len(held_out), "error": round(moved(measured, generator, held_out), DIGITS)}
    small.config = replace(small.config, shrunk={**(small.config.shrunk or {}), **about})
    return small


@torch.no_grad()
def strongest(generator: Generator, conditions: Float[Tensor, "prompt condition"]) -> list[Directions]:
    """Principal directions, about the shared start, of what the generator makes of these conditions.

    For both purposes. The mean adapter and what is made without a condition weigh as much as all prompts
    together, so that any guidance stays possible. A site's scale is one number: tokens are as far apart as
    their ΔW (gauge.py).
    """
    weight = len(conditions) ** 0.5
    sums = gram(weight * generator.mean[None])
    for own in purposes(generator):
        shared = own.config.mean_share * own.mean
        sums += gram(weight * (own.tokens(conditions[:1], guidance_scale=0.0) - shared))
        for part in conditions.split(TOGETHER):
            sums += gram(own.tokens(part) - shared)
    used = generator.codec.mask.sum(1).tolist()
    return [principal(one[:size, :size]) for one, size in zip(sums, used, strict=True)]


def purposes(generator: Generator) -> list[Generator]:
    """The generator as it answers beside a prompt in context, and without one, where that is another."""
    return [generator.purposed(beside) for beside in ((True, False) if generator.alone else (True,))]


def gram(tokens: Float[Tensor, "row site width"]) -> Float[Tensor, "site width width"]:
    """Σ x xᵀ per site, float64."""
    return torch.einsum("nsv,nsw->svw", tokens.double(), tokens.double())


def principal(sums: Float[Tensor, "used used"]) -> Directions:
    """Eigenvectors as rows, by descending eigenvalue."""
    values, vectors = torch.linalg.eigh(sums)
    return Directions(vectors.flip(1).mT, values.flip(0).clamp_min(0))


# ---- the narrower generator


def narrowed(generator: Generator, directions: Sequence[Directions], width: int) -> Generator:
    """The generator in the `width` strongest directions of every site, rounded to 8 bits."""
    codec, turn = narrowed_codec(generator.codec, directions, width)
    config = replace(
        generator.config,
        denoiser={**generator.config.denoiser, "width": width},
        shrunk={"from_width": generator.codec.width, "width": width, "prompts": 0, "error": 0.0},
    )
    state = turned(generator.state_dict(), turn)
    read = {"tuning": generator.tuning, "attributes": generator.attributes}
    small = Generator(config, codec, **read, **{name: state[name] for name in BUFFERS})  # pyright: ignore[reportArgumentType]  # BUFFERS are its names
    small.load_state_dict({name: rounded(weight) for name, weight in state.items()})
    return small.eval()


def narrowed_codec(
    codec: AdapterCodec, directions: Sequence[Directions], width: int
) -> tuple[AdapterCodec, Float[Tensor, "site narrow wide"]]:
    """The codec with narrower bases, and the map from its tokens' numbers to those that it had."""
    turn, bases, kept = torch.zeros(len(codec.frames), width, codec.width), [], []
    for site, (frame, basis, found) in enumerate(zip(codec.frames, codec.bases, directions, strict=True)):
        # A site with no more coordinates than the width has the identity for its basis, as in `fit`.
        rows = torch.eye(frame.dim) if frame.dim <= width else found.rows[:width].float()
        turn[site, : len(rows), : rows.shape[1]] = rows
        wide = rows if basis is None else rows @ basis.float()
        bases.append(None if frame.dim <= width else rounded(wide))
        kept.append(found.energy[: len(rows)].sum() / found.energy.sum().clamp_min(1e-30))
    energy = codec.energy_kept * torch.stack(kept).float()
    return replace(codec, width=width, bases=tuple(bases), energy_kept=energy, int8=True), turn


def turned(state: dict[str, Tensor], turn: Float[Tensor, "site narrow wide"]) -> dict[str, Tensor]:
    """Weights of a generator whose tokens are turned into the narrower width."""
    sites, _, wide = turn.shape
    out = dict(state)
    inputs = state["centre"].view(-1, sites, wide)
    out["centre"] = torch.einsum("isw,snw->isn", inputs, turn).flatten(1)
    out["mean"] = torch.einsum("sw,snw->sn", state["mean"], turn)
    for network in ("denoiser", "alone"):
        linear, flexible = f"{network}.map", f"{network}.transformer"
        if (weight := state.get(f"{linear}.weight")) is not None:
            rows = weight.view(sites, wide, -1)
            out[f"{linear}.weight"] = torch.einsum("swc,snw->snc", rows, turn).flatten(0, 1)
            bias = state[f"{linear}.bias"].view(sites, wide)
            out[f"{linear}.bias"] = torch.einsum("sw,snw->sn", bias, turn).flatten()
        if (inward := state.get(f"{flexible}.inward")) is not None:
            out[f"{flexible}.inward"] = torch.einsum("swh,snw->snh", inward, turn)
            outward = state[f"{flexible}.outward"]
            out[f"{flexible}.outward"] = torch.einsum("shw,snw->shn", outward, turn)
    return out


# ---- bytes and error


def stored_bytes(generator: Generator) -> int:
    """Of the generator's safetensors files."""
    with tempfile.TemporaryDirectory() as folder:
        generator.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def fitting_width(generator: Generator, directions: Sequence[Directions], max_bytes: int) -> int:
    """The largest width that fits: bytes grow by nearly the same number with each."""
    most = generator.codec.width

    def size(width: int) -> int:
        return stored_bytes(narrowed(generator, directions, width))

    one, two = size(1), size(min(2, most))
    if one > max_bytes:
        raise ValueError(
            f"at width 1 the generator has {one} bytes already, {max_bytes} are allowed: allow more."
        )
    width = min(most, 1 + (max_bytes - one) // max(two - one, 1))
    while width < most and size(width + 1) <= max_bytes:
        width += 1  # longer rows take 8 bits a number instead of 16 (int8.py)
    while size(width) > max_bytes:
        width -= 1  # headers grow with the digits of the shapes
    return width


@torch.no_grad()
def moved(small: Generator, generator: Generator, conditions: Float[Tensor, "prompt condition"]) -> float:
    """Mean over prompts of ‖ΔW' − ΔW‖ / ‖ΔW − ΔW_0‖: how far, of its way from the shared start ΔW_0.

    Over both purposes too.
    """
    spec, start = generator.spec, generator.codec.nothing()
    errors = []
    for pair in zip(purposes(generator), purposes(small), strict=True):
        for condition in conditions.split(1):
            before, after = (one.codec.decode(one.tokens(condition)[0]) for one in pair)
            way = delta_w_distance(spec, before, start)
            errors.append(delta_w_distance(spec, after, before) / max(way, 1e-30))
    return fmean(errors)
