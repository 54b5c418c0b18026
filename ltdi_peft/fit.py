"""Gradient steps on many adapters at once: the engine of collecting, refining and the multi-task rival.

In: start factors of n adapters and one pool of rows each.
Out: an iterator of steps; the factors are trained in place.
Idea: the loss of each adapter is its own token mean, so their gradients are independent and one backward
pass serves all; AdamW is element-wise, so one optimiser over stacked factors is n optimisers; only clipping
and SAM need norms per adapter. Draws come from a seed an adapter, so that grouping changes nothing.
Source: AdamW and clipping as `transformers.Trainer` does them; SAM, arXiv:2010.01412.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ltdi_peft.batched import AdaptedBase, Row, Stacked, make_row
from ltdi_peft.config import FitConfig
from ltdi_peft.lower import kept_inputs
from ltdi_peft.score import summed
from ltdi_peft.task import Example, Task

PIECE_ROWS = 32  # rows a forward pass: enough for full speed on two cores, few enough to be of like length
ACCELERATOR_ROWS = 256  # the same on an accelerator, which waits for launches and not for padding


@dataclass(frozen=True)
class Pool:
    """A task's training rows with their kept lower activations: `prompted` and `plain` index into `rows`."""

    rows: tuple[Row, ...]
    inputs: tuple[Tensor, ...]
    prompted: tuple[int, ...]
    plain: tuple[int, ...]


@dataclass(frozen=True)
class FitStep:
    """One optimiser step: its number from 1, each adapter's loss before it, and the learning rate it used."""

    index: int
    loss: Float[Tensor, " adapter"]
    learning_rate: float


@dataclass
class FitState:
    """Where a fit stands after a step; its factors are the caller's. The next step overwrites the moments."""

    step: int = 0  # steps done
    moments: dict[int, dict[str, Any]] = field(default_factory=dict)  # AdamW's, of each factor


def make_pool(
    base: AdaptedBase, task: Task, rows: int, *, plain: bool = True, keep: Path | None = None
) -> Pool:
    """The first `rows` training examples with a paraphrase each (in turn), every second also without.

    keep: a folder to keep lower activations in.
    """
    examples = training_examples(task, rows)
    tokenizer = base.base.tokenizer
    made = [make_row(tokenizer, task.prompts[i % len(task.prompts)], e) for i, e in enumerate(examples)]
    prompted = tuple(range(len(made)))
    if plain:
        made += [make_row(tokenizer, None, example) for example in examples[::2]]
    return Pool(tuple(made), pool_inputs(base, made, keep), prompted, tuple(range(len(prompted), len(made))))


def make_plain_pool(base: AdaptedBase, task: Task, rows: int, *, keep: Path | None = None) -> Pool:
    """The first `rows` training examples, none with a prompt; else as `make_pool`."""
    made = [make_row(base.base.tokenizer, None, example) for example in training_examples(task, rows)]
    return Pool(tuple(made), pool_inputs(base, made, keep), (), tuple(range(len(made))))


def training_examples(task: Task, rows: int) -> Sequence[Example]:
    """The first `rows`; ValueError for a task without any."""
    if not task.train:
        raise ValueError(f"task {task.name!r} has no training examples; collecting needs them.")
    return task.train[:rows]


def pool_inputs(base: AdaptedBase, rows: Sequence[Row], keep: Path | None) -> tuple[Tensor, ...]:
    """Lower activations of the rows, computed, or kept in a folder."""
    return tuple(kept_inputs(base, rows, keep) if keep else base.inputs(rows))


def joined(pools: Sequence[Pool]) -> Pool:
    """All pools as one: the multi-task pool."""
    rows, inputs, prompted, plain = [], [], [], []
    for pool in pools:
        prompted += [len(rows) + index for index in pool.prompted]
        plain += [len(rows) + index for index in pool.plain]
        rows += pool.rows
        inputs += pool.inputs
    return Pool(tuple(rows), tuple(inputs), tuple(prompted), tuple(plain))


def draws(pool: Pool, config: FitConfig, seed: int) -> Iterator[list[int]]:
    """Row indices, batch after batch: permutations of the prompted and of the plain rows, mixed by a coin."""
    rng = torch.Generator().manual_seed(seed)
    queues: dict[bool, list[int]] = {True: [], False: []}
    share = config.prompt_in_context if pool.plain else 1.0
    while True:
        batch = []
        for coin in torch.rand(config.batch_size, generator=rng).tolist():
            prompted = coin < share
            if not queues[prompted]:
                source = pool.prompted if prompted else pool.plain
                queues[prompted] = [source[i] for i in torch.randperm(len(source), generator=rng).tolist()]
            batch.append(queues[prompted].pop())
        yield batch


def scheduled(peak: float, step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up over a share, then the schedule.

    Without warm-up it is transformers' own; a warm-up here begins at peak/n, because transformers' first step
    at rate 0 would be one of few wasted.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * shares[schedule]


def losses(
    base: AdaptedBase, rows: Sequence[Row], inputs: Sequence[Tensor], stacked: Stacked
) -> Float[Tensor, " adapter"]:
    """Mean cross-entropy over the answer tokens of each adapter's rows (rows grouped by adapter)."""
    adapters = next(iter(stacked.values()))[0].shape[0]
    logits, target, row = base.answer_logits(rows, inputs, stacked)
    adapter = row // (len(rows) // adapters)
    token_loss = functional.cross_entropy(logits, target, reduction="none")
    return summed(token_loss, adapter, adapters) / torch.bincount(adapter, minlength=adapters)


def backward(
    base: AdaptedBase, rows: Sequence[Row], inputs: Sequence[Tensor], stacked: Stacked
) -> Float[Tensor, " adapter"]:
    """`losses`, and their gradients in those factors that ask for one.

    Piece by piece: rows of like length go together, so that little is padding.
    """
    adapters = next(iter(stacked.values()))[0].shape[0]
    leaves = [factor for pair in stacked.values() for factor in pair if factor.requires_grad]
    each = len(rows) // adapters
    own = [range(first, first + each) for first in range(0, len(rows), each)]
    ordered = [sorted(indices, key=lambda index: len(rows[index].ids)) for indices in own]
    tokens = torch.tensor([sum(len(rows[index].ids) - rows[index].answer for index in part) for part in own])
    total = torch.zeros(adapters, device=base.device)
    most = PIECE_ROWS if base.device.type == "cpu" else ACCELERATOR_ROWS
    step = max(1, most // adapters)
    for first in range(0, each, step):
        piece = [index for part in ordered for index in part[first : first + step]]
        logits, target, row = base.answer_logits(
            [rows[i] for i in piece], [inputs[i] for i in piece], stacked
        )
        token_loss = functional.cross_entropy(logits, target, reduction="none")
        loss = summed(token_loss, row // (len(piece) // adapters), adapters) / tokens.to(base.device)
        # The base weights of a model that is not frozen get no gradient either.
        loss.sum().backward(inputs=leaves)
        total = total + loss.detach()
    return total


def fit_steps(
    base: AdaptedBase,
    stacked: Stacked,
    pools: Sequence[Pool],
    config: FitConfig,
    *,
    seeds: Sequence[int],
    train_a: bool,
    state: FitState | None = None,
) -> Iterator[FitStep]:
    """Train `stacked` in place, one optimiser step a yield. Adapter i draws from pools[i] with seeds[i].

    `train_a` False leaves every A as it is. `state` is kept up to date; one that has steps goes on from
    there. ValueError unless there is one pool and one seed an adapter.
    """
    adapters = next(iter(stacked.values()))[0].shape[0]
    if not len(pools) == len(seeds) == adapters:
        raise ValueError(
            f"{adapters} adapters need a pool and a seed each, got {len(pools)} and {len(seeds)}."
        )
    trained = [f.requires_grad_(True) for a, b in stacked.values() for f in ((a, b) if train_a else (b,))]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    streams = [draws(pool, config, seed) for pool, seed in zip(pools, seeds, strict=True)]
    peak, shape = config.learning_rate, {"warmup": config.warmup, "schedule": config.schedule}
    state = state or FitState()
    if state.step:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state.moments})
        for stream in streams:
            next(islice(stream, state.step, state.step), None)  # draws that were used
    try:
        for step in range(state.step, config.steps):
            drawn = [(pool, i) for pool, stream in zip(pools, streams, strict=True) for i in next(stream)]
            rows, inputs = [pool.rows[i] for pool, i in drawn], [pool.inputs[i] for pool, i in drawn]
            rate = scheduled(peak, step, config.steps, **shape)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = backward(base, rows, inputs, stacked)
            if config.sam_rho > 0:
                sharpen(base, rows, inputs, stacked, trained, config.sam_rho)
            clip_per_adapter(trained, config.max_grad_norm)
            optimizer.step()
            state.step, state.moments = step + 1, optimizer.state_dict()["state"]
            yield FitStep(step + 1, loss, rate)
    finally:
        for factor in trained:
            factor.requires_grad_(False)


def gradient_norms(trained: Sequence[Tensor]) -> Float[Tensor, " adapter"]:
    """‖g‖ over all factors of each adapter."""
    squares = [factor.grad.flatten(1).pow(2).sum(1) for factor in trained if factor.grad is not None]
    return torch.stack(squares).sum(0).sqrt()


def clip_per_adapter(trained: Sequence[Tensor], most: float) -> None:
    """Scale each adapter's gradient to at most this norm (the same 1e-6 as torch's own clipping)."""
    scale = (most / (gradient_norms(trained) + 1e-6)).clamp(max=1.0)
    for factor in trained:
        factor.grad.mul_(scale.view(-1, 1, 1))  # type: ignore[union-attr]


def sharpen(
    base: AdaptedBase,
    rows: Sequence[Row],
    inputs: Sequence[Tensor],
    stacked: Stacked,
    trained: Sequence[Tensor],
    rho: float,
) -> None:
    """Replace the gradients at θ by those at θ + ρ g/‖g‖ (per adapter); θ itself comes back bit for bit."""
    before = [factor.detach().clone() for factor in trained]
    scale = (rho / (gradient_norms(trained) + 1e-12)).view(-1, 1, 1)
    with torch.no_grad():
        for factor in trained:
            factor.add_(factor.grad * scale)  # type: ignore[operator]
            factor.grad = None
    backward(base, rows, inputs, stacked)
    with torch.no_grad():
        for factor, old in zip(trained, before, strict=True):
            factor.copy_(old)
