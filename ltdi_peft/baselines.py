"""What a generator has to beat, made from the same stored runs, prompts, examples and validation trials.

In: a bench with collected runs.  Out: adapters (the mean, alone or with noise, the nearest task's, a ridge
regression's), and the seconds that fine-tuning takes. LoRAs for all tasks together are made in `multi_task`.
Idea: a rival is only worth beating at its best, so each has its choices made on validation tasks, as ours.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ltdi_peft.batched import Stacked, stack_adapters
from ltdi_peft.centre import Ridge, choose_strength, fit_task_ridge
from ltdi_peft.collect import Bench, run_seed
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.distance import truncated_mean
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.files import read_json
from ltdi_peft.fit import fit_steps, make_pool
from ltdi_peft.generator import Generator, nearest_conditions
from ltdi_peft.guidance import SCALE_EXAMPLES, Accuracies, Guidance, guidance_accuracies
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.score import Sheet, make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.store import Trajectory
from ltdi_peft.task import Task

ENOUGH = 0.95  # share of the oracle's gain at which a fine-tune counts as done


def final_adapter(run: Trajectory) -> Adapter:
    """The adapter at the last step of a run."""
    return run.adapter(run.snapshots[-1])


def mean_adapter(runs: Sequence[Trajectory], gauge: str) -> Adapter:
    """Mean of the final adapters: of the factors where they share a frame, else of ΔW, cut to the rank."""
    if gauge == "canonical":
        return truncated_mean((final_adapter(run) for run in runs), runs[0].spec)
    total: dict[str, list[Tensor]] = {}
    for run in runs:
        for site, factors in final_adapter(run).items():
            held = total.setdefault(
                site, [torch.zeros_like(factor, dtype=torch.float64) for factor in factors]
            )
            for sum_, factor in zip(held, factors, strict=True):
                sum_ += factor
    return {
        s: ((a / len(runs)).float().contiguous(), (b / len(runs)).float().contiguous())
        for s, (a, b) in total.items()
    }


def with_noise_like(codec: AdapterCodec, mean: Adapter, like: Adapter, seed: str) -> Adapter:
    """The mean adapter plus Gaussian noise as far from it, at every site, as `like` is.

    Distances are those of the codec's tokens. The control of a method: what lies as far from the mean, in no
    direction in particular. The same seed gives the same bytes.
    """
    origin = codec.encode(mean)
    distance = (codec.encode(like) - origin).norm(dim=-1, keepdim=True)
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    noise = torch.randn(origin.shape, generator=torch.Generator().manual_seed(number)) * codec.mask
    return codec.decode(origin + noise * distance / noise.norm(dim=-1, keepdim=True).clamp_min(1e-12))


class NearestTask:
    """The stored adapter of the training task whose prompts are nearest to the one asked for."""

    def __init__(
        self, data: TrainingSet, runs: Sequence[Trajectory], move: Callable[[Adapter], Adapter] | None = None
    ) -> None:
        """move: what is done to an adapter before it answers; None: nothing."""
        self.move = move or (lambda adapter: adapter)
        self.conditions = functional.normalize(data.prompt_conditions.mean(1), dim=-1)
        by_task: dict[str, Trajectory] = {}
        for run in sorted(runs, key=lambda run: run.seed):
            by_task.setdefault(run.task.name, run)
        self.runs = [by_task[name] for name in data.names]

    def adapters(self, conditions: Float[Tensor, "prompt condition"]) -> list[Adapter]:
        """One a prompt; equal answers are one object."""
        index = nearest_conditions(conditions, self.conditions).tolist()
        made = {i: self.move(final_adapter(self.runs[i])) for i in set(index)}
        return [made[i] for i in index]


@dataclass(frozen=True)
class RidgeRival:
    """Ridge regression from condition to the final adapter's tokens, guided as a generator is."""

    codec: AdapterCodec
    ridge: Ridge
    mean: Float[Tensor, "site width"]
    strength: float
    clamp: Generator  # whose limits of ‖ΔW‖ apply, so that both play by one rule
    guidance: Guidance = field(default_factory=Guidance)

    def tokens(self, conditions: Float[Tensor, "prompt condition"]) -> Float[Tensor, "prompt site width"]:
        """Predicted tokens, float32."""
        predicted = self.ridge(conditions).view(-1, *self.mean.shape).float()
        return self.guidance.mean_share * self.mean + self.guidance.scale * (predicted - self.mean)

    def adapters(self, conditions: Float[Tensor, "prompt condition"]) -> list[Adapter]:
        """One a prompt."""
        return [self.clamp.clamp(self.codec.decode(tokens))[0] for tokens in self.tokens(conditions)]


def fit_ridge_rival(data: TrainingSet, codec: AdapterCodec, clamp: Generator) -> RidgeRival:
    """Fitted on the final adapters (mean over seeds); strength by leave-one-task-out error."""
    final = data.task_means[:, -1]
    strength = choose_strength(data.conditions, final.flatten(1))
    ridge = fit_task_ridge(data.conditions, final.flatten(1), strength)
    return RidgeRival(codec, ridge, final.mean(0), strength, clamp)


def with_best_guidance(
    rival: RidgeRival,
    bench: Bench,
    tasks: Sequence[Task],
    encoder: PromptEncoder,
    examples: int = SCALE_EXAMPLES,
    *,
    context: str = "prompt",
) -> tuple[RidgeRival, Accuracies]:
    """The rival with the guidance that is best on the validation tasks, and each trial's accuracy.

    Grid, tasks, prompts and examples are those of `guidance.choose_guidance`: as many trials as ours had.
    """

    def predicted(prompt: Sequence[str], tried: Guidance) -> Adapter:
        return replace(rival, guidance=tried).adapters(encoder(prompt))[0]

    found = guidance_accuracies(bench, tasks, predicted, rival.codec.gauge, examples, context)
    return replace(rival, guidance=found.best()), found.table()


# ---- accuracy and identity of an adapter


def mean_accuracy(bench: Bench, sheets: Sequence[Sheet], stacked: Stacked) -> float:
    """Of the one adapter in `stacked`, over the sheets; 0 without any."""
    found = [score(bench.adapted, sheet, stacked).accuracy.item() for sheet in sheets]
    return statistics.fmean(found) if found else 0.0


def adapter_digest(adapter: Adapter) -> str:
    """16 hex digits of an adapter's bytes."""
    return tensor_digest(factor for site in sorted(adapter) for factor in adapter[site])


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """16 hex digits of the bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- what fine-tuning costs


@dataclass(frozen=True)
class FineTune:
    """A task's own LoRA, trained alone until it has 95 % of the oracle's gain (`reached`), or to its end."""

    task: str
    seconds: float
    steps: int
    accuracy: float
    reached: bool


def seconds_to_fine_tune(
    bench: Bench, task: Task, start: Adapter, *, base: float, oracle: float, examples: int
) -> FineTune:
    """Train the oracle's own run again, alone, from `start`, to 95 % of oracle − base (prompt in context).

    Seconds of the optimiser steps, and of the lower layers for the rows that were drawn; scoring, eight times
    a run, and loading are not counted.
    """
    collect = bench.recipe.collect
    config, wanted = collect.single, base + ENOUGH * (oracle - base)
    stacked = stack_adapters([start], bench.adapted.device)
    sheet = make_sheet(bench.adapted, task.evaluation[:examples], task.held_out_prompts)
    began = time.perf_counter()
    pool = make_pool(bench.adapted, task, collect.rows)
    lower, upper, every, accuracy = time.perf_counter() - began, 0.0, max(1, config.steps // 8), base
    seeds = [run_seed(bench.recipe.seed, 0)]
    steps = fit_steps(
        bench.adapted, stacked, [pool], config, seeds=seeds, train_a=collect.gauge != "shared_a"
    )
    index = 0
    while index < config.steps:
        began = time.perf_counter()
        step = next(steps)
        step.loss.cpu()  # waits for the device
        upper += time.perf_counter() - began
        index = step.index
        if index % every == 0 or index == config.steps:
            accuracy = mean_accuracy(bench, [sheet], stacked)
            if accuracy >= wanted:
                break
    drawn = min(1.0, index * config.batch_size / len(pool.rows))
    return FineTune(task.name, upper + drawn * lower, index, accuracy, accuracy >= wanted)


def timings(folder: Path) -> dict[str, float]:
    """Seconds of the stages that have written them to `timings.json`."""
    file = folder / "timings.json"
    return {stage: float(seconds) for stage, seconds in read_json(file).items()} if file.is_file() else {}
