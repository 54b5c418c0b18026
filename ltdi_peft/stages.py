"""How much of what task loss changed is kept: the network between the two stages.

In: averaged weights after each stage, validation tasks.  Out: the share of the way that scores best there.
Idea: task loss fits its training tasks and forgets part of what the stored runs said of others, so a network
between both may do better on new tasks than either (of a linear network: the mixture of both adapters).
Source: weight-space ensembles of a model before and after fine-tuning, arXiv 2109.01903.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ltdi_peft.collect import Bench
from ltdi_peft.files import replace_file
from ltdi_peft.generator import Generator
from ltdi_peft.guidance import SCALE_EXAMPLES, mean_over, task_accuracies, validation_prompts
from ltdi_peft.session import Session
from ltdi_peft.spec import Adapter

FIRST_STAGE = "first_stage.safetensors"  # beside the resume points
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

Weights = Mapping[str, Tensor]


def averaged_weights(session: Session) -> dict[str, Tensor]:
    """The averaged network, float32 on the CPU. Every process must call it: shards are gathered."""
    with session.averaged():
        state = cast(dict[str, Tensor], session.accelerator.get_state_dict(session.network))
        return {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in state.items()}


def keep_first_stage(session: Session, folder: Path) -> None:
    """Write the averaged weights as they are now. Every process must call it."""
    weights = averaged_weights(session)
    if session.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FIRST_STAGE, save(weights))


def first_stage(folder: Path) -> Weights | None:
    """What `keep_first_stage` wrote there; None without a first stage."""
    file = folder / FIRST_STAGE
    return load_file(file) if file.is_file() else None


def between(first: Weights, second: Weights, share: float) -> dict[str, Tensor]:
    """The weights at a share of the way from the first stage to the second."""
    return {key: torch.lerp(weight, second[key], share) for key, weight in first.items()}


@torch.no_grad()
def share_accuracies(
    generator: Generator,
    first: Weights,
    bench: Bench,
    names: Sequence[str],
    examples: int = SCALE_EXAMPLES,
    *,
    context: str = "prompt",
) -> dict[str, float]:
    """Share → mean accuracy on the validation tasks that have evaluation examples, in one context.

    The generator has the weights of the second stage, and has them again afterwards.
    """
    tasks = [bench.suite[name] for name in names if bench.suite[name].evaluation]
    second = {key: weight.clone() for key, weight in generator.denoiser.state_dict().items()}
    prompts = validation_prompts(tasks)
    made: dict[str, list[Adapter]] = {task.name: [] for task in tasks}  # one adapter a share
    for share in SHARES:
        generator.denoiser.load_state_dict(between(first, second, share))
        # One prompt at a time, as guidance is chosen: the bytes of an adapter depend on its batch.
        for task in tasks:
            (one,) = generator.generate(prompts[task.name], base=bench.base)
            made[task.name].append(one.adapter)
    generator.denoiser.load_state_dict(second)
    found = task_accuracies(bench, tasks, lambda task: made[task.name], len(SHARES), examples, context)
    return dict(zip(map(str, SHARES), mean_over(found), strict=True))


def best_share(accuracy: Mapping[str, float]) -> float:
    """The share with the best accuracy; of equal ones the largest."""
    return float(max(accuracy, key=lambda share: (accuracy[share], float(share))))
