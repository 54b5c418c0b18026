"""The generator's network under training: what a step draws, its gradients, its averaged weights.

In: a recipe, what `prepare` made, an `Accelerator`.  Out: an iterator of `TrainStep`s.
Idea: a step is drawn in `units`, each from (seed, step, unit) alone, so that one process, two processes and a
resumed run see the same numbers; what a process does is its share of the units.
Stages: weight space (the diffusion loss, plain or REPTILE), then task loss: generated adapters of several
tasks run their tasks' examples through the frozen base model, and the gradient goes back into the network.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ltdi_peft import fit
from ltdi_peft.collect import Bench
from ltdi_peft.config import Recipe
from ltdi_peft.denoiser import Denoiser, DenoiserConfig, conditioned
from ltdi_peft.diffusion import LOSSES, SAMPLERS, Predict, Rng, chain_for, mix_tasks, weight_for
from ltdi_peft.meta import ReptileConfig, reptile_step
from ltdi_peft.prepare import Prepared

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
WEIGHT_SPACE, TASK_LOSS = "weights", "task_loss"


@dataclass(frozen=True)
class TrainStep:
    """One optimiser step. `loss` is this process's mean, still a tensor: reading it waits for the device."""

    index: int  # from 1, through both stages
    stage: str  # WEIGHT_SPACE or TASK_LOSS
    loss: Float[Tensor, ""]
    learning_rate: float


def unit_rng(seed: int, step: int, unit: int) -> Rng:
    """The random numbers of one unit of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{unit}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def denoiser_config(recipe: Recipe, prepared: Prepared) -> DenoiserConfig:
    """Sizes of the network for this codec and these conditions."""
    _, _, sites, width = prepared.data.tokens.shape
    sizes = {"sites": sites, "width": width, "condition_width": prepared.data.conditions.shape[-1]}
    return DenoiserConfig(**sizes, **vars(recipe.denoiser))


def check(recipe: Recipe, prepared: Prepared, accelerator: Accelerator, bench: Bench | None) -> None:
    """ValueError, before any work, for what this recipe cannot do with these processes and these tasks."""
    train, about = recipe.train, recipe.train.task_loss
    if recipe.meta.method == "reptile" and accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"meta.method 'reptile' needs replicated weights, but Accelerate runs "
            f"{accelerator.distributed_type.value}, which shards them. Use recipes/accelerate/ddp.yaml, or "
            f"meta.method: plain."
        )
    if train.units % accelerator.num_processes:
        raise ValueError(
            f"train.units is {train.units}; it must be a multiple of the {accelerator.num_processes} "
            f"processes."
        )
    shared = {"batch_size": train.batch_size} | ({"task_loss.tasks": about.tasks} if about.steps else {})
    for key, count in shared.items():
        if count % train.units:
            raise ValueError(f"train.{key} is {count}; it must be a multiple of train.units, {train.units}.")
    if not about.steps:
        return
    if bench is None:
        raise ValueError("train.task_loss needs the base model and the tasks' examples: pass a bench.")
    if without := [name for name in prepared.data.names if not bench.suite[name].train]:
        raise ValueError(
            f"train.task_loss needs training examples, and task {without[0]!r} has none. Set "
            f"train.task_loss.steps: 0, or give the suite examples."
        )


class Session:
    """The network under training with what it is trained on: optimiser, averaged weights, position.

    `dtype` is of the network (float64 in tests that compare to 1e-10). Weights start from `recipe.seed`.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        accelerator: Accelerator,
        bench: Bench | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check(recipe, prepared, accelerator, bench)
        self.recipe, self.prepared, self.accelerator, self.bench = recipe, prepared, accelerator, bench
        diffusion = recipe.diffusion
        self.chain = chain_for(diffusion.loss, diffusion.law, diffusion.k, diffusion.steps)
        self.loss = LOSSES[diffusion.loss]
        self.weight = weight_for(diffusion.loss, diffusion.weight)
        self.reptile = recipe.meta.method == "reptile"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.plain_network = Denoiser(denoiser_config(recipe, prepared))
        self.plain_network.to(accelerator.device, dtype)
        optimizer = torch.optim.AdamW(
            self.plain_network.parameters(),
            lr=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            fused=True,  # weights and both moments pass through the processor once, not once an operation
        )
        self.network: nn.Module = self.plain_network
        if self.reptile:
            # REPTILE joins the processes itself, once a meta-step; a wrapper would average inner gradients
            # too. "Evaluation mode" is Accelerate's word for: no wrapper, but saved and cast with the others.
            self.network = accelerator.prepare_model(self.plain_network, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.network, self.optimizer = accelerator.prepare(self.plain_network, optimizer)
        self.average = [p.detach().clone() for p in self.network.parameters()]
        self.done = 0
        self.losses: list[tuple[int, float]] = []  # (step, mean over all processes), as logged
        self.seconds = {
            WEIGHT_SPACE: 0.0,
            TASK_LOSS: 0.0,
        }  # of each stage's steps, since this object was made

    @property
    def total(self) -> int:
        """Steps of both stages."""
        return self.recipe.train.steps + self.recipe.train.task_loss.steps

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of every weight."""
        return self.accelerator.distributed_type in SHARDED

    def own_units(self) -> range:
        """This process's units of every step."""
        return range(self.accelerator.process_index, self.recipe.train.units, self.accelerator.num_processes)

    # ---- the loss of one unit

    def draw(self, rng: Rng, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """z (row, k, site, width) centred and scaled, conditions, and which rows drop theirs."""
        data, centre, diffusion = self.prepared.data, self.prepared.centre, self.recipe.diffusion
        run = torch.randint(len(data.tokens), (rows,), generator=rng)
        prompt = torch.randint(data.conditions.shape[1], (rows,), generator=rng)
        task = data.task[run]
        z = (data.tokens[run] - centre.training(task, prompt)) / centre.spread
        condition = data.conditions[task, prompt]
        if diffusion.mixing > 0:
            z, condition = mix_tasks(z, condition, rng, share=diffusion.mixing)
        dropped = torch.rand(rows, generator=rng) < diffusion.condition_dropout
        device, dtype = self.accelerator.device, self.plain_network.null.dtype
        return z.to(device, dtype), condition.to(device, dtype), dropped.to(device)

    def weight_space_loss(self, rng: Rng) -> Float[Tensor, ""]:
        """The diffusion loss on one unit."""
        z, condition, dropped = self.draw(rng, self.recipe.train.batch_size // self.recipe.train.units)
        predict = conditioned(self.network, condition, dropped)
        drawn = self.loss(predict, z, self.chain, rng, self.weight, self.recipe.diffusion.noise_floor)
        return drawn.value.mean()

    def task_loss(self, rng: Rng) -> Float[Tensor, ""]:
        """Mean loss of generated adapters on their own tasks' examples, through the frozen base model."""
        about, data, centre = self.recipe.train.task_loss, self.prepared.data, self.prepared.centre
        bench = self.bench
        if bench is None:
            raise ValueError("train.task_loss needs the base model and the tasks' examples: pass a bench.")
        count = min(about.tasks // self.recipe.train.units, len(data.names))
        task = torch.randperm(len(data.names), generator=rng)[:count]
        prompt = torch.randint(data.conditions.shape[1], (count,), generator=rng)
        noise = torch.randn(count, *data.tokens.shape[2:], generator=rng)
        like = self.plain_network.null
        predict = last_step_only(
            conditioned(self.network, data.conditions[task, prompt].to(like)), self.chain.T
        )
        end = SAMPLERS[self.recipe.diffusion.sampler](predict, noise.to(like), self.chain, rng)
        tokens = centre.training(task, prompt)[:, -1].to(like) + centre.spread * end
        own = bench.plain_pool if about.prompt_in_context == 0 else bench.pool
        pools, share = [own(bench.suite[data.names[int(i)]]) for i in task], about.prompt_in_context
        drawn = [(pool, index) for pool in pools for index in pick_rows(pool, about.examples, share, rng)]
        rows, inputs = [pool.rows[i] for pool, i in drawn], [pool.inputs[i] for pool, i in drawn]
        return fit.losses(bench.adapted, rows, inputs, self.prepared.codec.decode_factors(tokens)).mean()

    def unit_loss(self, stage: str, rng: Rng) -> Float[Tensor, ""]:
        """What one unit of a stage minimises."""
        with self.accelerator.autocast(), self.dropout_from(rng):
            if stage == WEIGHT_SPACE:
                return self.weight_space_loss(rng)
            kept = self.recipe.train.task_loss.weight_space
            return self.task_loss(rng) + kept * self.weight_space_loss(rng)

    @contextmanager
    def dropout_from(self, rng: Rng) -> Iterator[None]:
        """Dropout draws from torch's global state: within the block that state comes from `rng`."""
        if self.recipe.denoiser.dropout == 0:
            yield
            return
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            yield

    # ---- steps

    def stage(self, index: int) -> str:
        """The stage that step `index` (from 1) belongs to."""
        return WEIGHT_SPACE if index <= self.recipe.train.steps else TASK_LOSS

    def backward(self, index: int) -> Float[Tensor, ""]:
        """Set every gradient for step `index`; returns this process's mean loss."""
        seed, stage, units = self.recipe.seed, self.stage(index), self.own_units()
        rngs = [unit_rng(seed, index, unit) for unit in units]
        if self.reptile and stage == WEIGHT_SPACE:
            meta = ReptileConfig(self.recipe.meta.inner_steps, self.recipe.meta.inner_learning_rate)
            inner = [lambda rng=rng: self.unit_loss(stage, rng) for rng in rngs]
            return torch.stack(reptile_step(self.network, inner, meta)).mean()
        losses = []
        for rng in rngs:
            # One all-reduce a step: forward and backward of all units but the last stay local.
            local = rng is not rngs[-1]
            with self.accelerator.no_sync(self.network) if local else nullcontext():
                loss = self.unit_loss(stage, rng)
                self.accelerator.backward(loss / len(rngs))
            losses.append(loss.detach())
        if self.reptile:
            self._average_gradients()
        return torch.stack(losses).mean()

    def _average_gradients(self) -> None:
        """What DDP does, for a network without its wrapper."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        joined = parameters_to_vector([p.grad for p in parameters])  # pyright: ignore[reportArgumentType]
        joined = cast(Tensor, self.accelerator.reduce(joined, reduction="mean"))
        for p, part in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def learning_rate(self, index: int) -> float:
        """Of step `index`; each stage has its own warm-up and schedule."""
        train = self.recipe.train
        about, place = (train, index) if index <= train.steps else (train.task_loss, index - train.steps)
        shape = {"warmup": train.warmup, "schedule": train.schedule}
        return fit.scheduled(about.learning_rate, place - 1, about.steps, **shape)

    def step(self) -> TrainStep:
        """One optimiser step: learning rate, gradients, clipping, averaged weights."""
        train, index = self.recipe.train, self.done + 1
        rate = self.learning_rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.backward(index)
        if train.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.network.parameters(), train.max_grad_norm)
        self.optimizer.step()
        # Early averages would be mostly the untrained network: the horizon grows with the steps.
        keep = min(train.ema, index / (index + 10))
        with torch.no_grad():
            for mean, now in zip(self.average, self.network.parameters(), strict=True):
                mean.lerp_(now.detach(), 1 - keep)
        self.done = index
        return TrainStep(index, self.stage(index), loss, rate)

    def steps(self) -> Iterator[TrainStep]:
        """What is left to do, one step a yield."""
        while self.done < self.total:
            began = time.perf_counter()
            step = self.step()
            self.seconds[step.stage] += time.perf_counter() - began
            yield step

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with its averaged weights, in evaluation mode; both come back bit for bit."""
        training = self.network.training
        self._swap_average()
        self.network.eval()
        try:
            yield self.plain_network
        finally:
            self._swap_average()
            self.network.train(training)

    @torch.no_grad()
    def _swap_average(self) -> None:
        for mean, now in zip(self.average, self.network.parameters(), strict=True):
            kept = now.detach().clone()
            now.copy_(mean)
            mean.copy_(kept)


def last_step_only(predict: Predict, steps: int) -> Predict:
    """`predict` with a gradient at the chain's last step alone: one evaluation to go back through."""

    def wrapped(x: Tensor, t: Tensor) -> Tensor:
        # The sampler lands at F of its last step, so the gradient of what it returns is exact up to the
        # dependence of x there on the network.
        with torch.set_grad_enabled(int(t[0]) == steps - 1):
            return predict(x, t)

    return wrapped


def pick_rows(pool: fit.Pool, count: int, share: float | None, rng: Rng) -> list[int]:
    """Row indices of a task: a `share` of them with the prompt in context, or any (None)."""
    if share is None:
        return torch.randint(len(pool.rows), (count,), generator=rng).tolist()
    coins = torch.rand(count, generator=rng).tolist()
    kinds = [pool.prompted if coin < share else pool.plain for coin in coins]
    return [kind[int(torch.randint(len(kind), (), generator=rng))] for kind in kinds]
