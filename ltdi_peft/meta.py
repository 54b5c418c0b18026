"""REPTILE: inner loops from shared weights φ; the mean difference is a gradient for any outer optimiser.

In: a network and units, each a function that draws afresh and returns a loss (one (i, j), or one task).
Out: φ bit for bit as it was, with `.grad` = −mean(φ_i − φ): plain SGD at ζ makes φ ← φ + ζ·mean(φ_i − φ).
Idea: each process runs its own units and one all-reduce a meta-step joins them, weighted by their counts.
Source: Nichol et al., arXiv 1803.02999; METHOD.md §4. Replicated weights only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

# At the top, before anyone can have begun a process group: first imported after that (the first step of an
# optimizer would), fsdp keeps the group in default arguments, and Gloo's threads, alive when the interpreter
# ends, may abort the process.
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector

InnerLoss = Callable[[], Tensor]  # draws noise and times anew at every call
INNER_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}  # state is fresh for every unit


@dataclass(frozen=True)
class ReptileConfig:
    """The published values are 3 steps of plain SGD at η = 0.005."""

    inner_steps: int = 3
    inner_learning_rate: float = 0.005
    inner_optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"meta.inner_steps must be at least 1, got {self.inner_steps}.")
        if not self.inner_learning_rate > 0:
            raise ValueError(f"meta.inner_learning_rate must be above 0, got {self.inner_learning_rate}.")
        if self.inner_optimizer not in INNER_OPTIMIZERS:
            raise ValueError(
                f"meta.inner_optimizer is {self.inner_optimizer!r}; known are {sorted(INNER_OPTIMIZERS)}."
            )


def refuse_sharded(network: nn.Module) -> None:
    """REPTILE needs whole, replicated weights and gradients that no wrapper averages; say which are not."""
    wrappers = (FullyShardedDataParallel, nn.parallel.DistributedDataParallel)
    found = [type(m).__name__ for m in network.modules() if isinstance(m, wrappers)]
    found += [f"{n} (DTensor)" for n, p in network.named_parameters() if isinstance(p, DTensor)]
    found += [f"{n} (DeepSpeed ZeRO-3)" for n, p in network.named_parameters() if "ds_id" in vars(p)]
    if found:
        raise ValueError(
            f"REPTILE needs a plain network with replicated weights, found {found[0]}. Use plain training "
            f"with FSDP or DeepSpeed sharding; with DDP pass the module inside it (network.module)."
        )


def inner_loop(parameters: list[nn.Parameter], unit: InnerLoss, config: ReptileConfig) -> list[Tensor]:
    """n_in steps on one unit, in place; the loss before each step, detached."""
    optimizer = INNER_OPTIMIZERS[config.inner_optimizer](parameters, lr=config.inner_learning_rate)
    losses = []
    for _ in range(config.inner_steps):
        optimizer.zero_grad()
        loss = unit()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def mean_over_processes(total: Float[Tensor, " parameter"], count: int) -> Float[Tensor, " parameter"]:
    """total / count, both summed over all processes by one all-reduce; counts may differ, even be zero."""
    joined = torch.cat([total, total.new_tensor([count])])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(joined)
    if joined[-1] == 0:
        raise ValueError("a REPTILE step needs at least one unit on one of the processes, got none.")
    return joined[:-1] / joined[-1]


def reptile_step(
    network: nn.Module, units: Iterable[InnerLoss], config: ReptileConfig
) -> list[Float[Tensor, " step"]]:
    """Set `.grad` of every trainable parameter to −mean(φ_i − φ) over the units of all processes.

    Old gradients are discarded; weights and buffers come back bit for bit, also after an error in a unit.
    Returns this process's losses, (inner step,) per unit. Every process must call it, with or without units.
    """
    refuse_sharded(network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    shared, buffers = (
        [p.detach().clone() for p in parameters],
        [b.detach().clone() for b in network.buffers()],
    )
    start, losses = parameters_to_vector(shared), []
    total = torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
    for unit in units:
        try:
            losses.append(torch.stack(inner_loop(parameters, unit, config)))
            total += parameters_to_vector(parameters).detach() - start
        finally:
            _restore(network, parameters, shared, buffers)
    gradient = -mean_over_processes(total, len(losses))
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return losses


@torch.no_grad()
def _restore(
    network: nn.Module, parameters: list[nn.Parameter], shared: list[Tensor], buffers: list[Tensor]
) -> None:
    for now, then in zip([*parameters, *network.buffers()], [*shared, *buffers], strict=True):
        now.copy_(then)
