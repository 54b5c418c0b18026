"""What a generator has to beat, made from the same stored runs, prompts, examples and validation trials.

In: a bench with collected runs.  Out: adapters (the mean, the nearest task's, a ridge regression's, one
multi-task LoRA), and the seconds that fine-tuning takes.
Idea: a rival is only worth beating at its best, so each has its choices made on validation tasks, as ours.
"""

import hashlib
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ltdi_peft.adapter import load_adapter_folder, save_adapter_folder
from ltdi_peft.batched import Stacked, stack_adapters, unstack_adapter
from ltdi_peft.centre import Ridge, choose_strength, fit_task_ridge
from ltdi_peft.collect import Bench, run_seed, shared_start
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import FitConfig, to_dict
from ltdi_peft.distance import truncated_mean
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.fit import Pool, fit_steps, joined, make_pool
from ltdi_peft.generator import Generator, nearest_conditions
from ltdi_peft.guidance import SCALE_EXAMPLES, Accuracies, Guidance, best_guidance, guidance_accuracies
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.score import Sheet, make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.store import Trajectory
from ltdi_peft.task import Task
from ltdi_peft.trajectory import json_bytes, read_json, replace_file

EVERY = 100  # steps between two validation scores of the multi-task LoRA
VALIDATION_EXAMPLES = 24  # of each validation task, at each of these scores
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


class NearestTask:
    """The stored adapter of the training task whose prompts are nearest to the one asked for."""

    def __init__(self, data: TrainingSet, runs: Sequence[Trajectory]) -> None:
        self.conditions = functional.normalize(data.conditions.mean(1), dim=-1)
        by_task: dict[str, Trajectory] = {}
        for run in sorted(runs, key=lambda run: run.seed):
            by_task.setdefault(run.task.name, run)
        self.runs = [by_task[name] for name in data.names]

    def adapters(self, conditions: Float[Tensor, "prompt condition"]) -> list[Adapter]:
        """One a prompt; equal answers are one object."""
        index = nearest_conditions(conditions, self.conditions).tolist()
        made = {i: final_adapter(self.runs[i]) for i in set(index)}
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
) -> tuple[RidgeRival, Accuracies]:
    """The rival with the guidance that is best on the validation tasks, and each trial's accuracy.

    Grid, tasks, prompts and examples are those of `guidance.choose_guidance`: as many trials as ours had.
    """

    def predicted(prompt: Sequence[str], tried: Guidance) -> Adapter:
        return replace(rival, guidance=tried).adapters(encoder(prompt))[0]

    found = guidance_accuracies(bench, tasks, predicted, rival.codec.gauge, examples)
    return replace(rival, guidance=best_guidance(found, scored=examples * len(tasks))), found


# ---- one LoRA for all tasks


def multi_task_plan(bench: Bench, start: Adapter) -> dict[str, Any]:
    """What the rival is trained on, as JSON: from the shared start on, with every prompt in context.

    `rule` is the number of further steps after which it has seen as many examples as the start and all single
    runs together; evaluate.multi_task_steps may say another.
    """
    recipe, tasks = bench.recipe, bench.suite.split("train")
    single, multi = recipe.collect.single, recipe.collect.multi_task
    seen = len(tasks) * recipe.collect.seeds * single.steps * single.batch_size
    rule = math.ceil(seen / multi.batch_size)
    steps = recipe.evaluate.multi_task_steps or rule
    before = multi.steps * multi.batch_size if recipe.collect.start == "multi_task" else 0
    return {
        "fit": to_dict(replace(multi, steps=steps, prompt_in_context=1.0)),
        "start": adapter_digest(start),
        "tasks": [task.name for task in tasks],
        "seed": recipe.seed,
        "rule": rule,
        "shortened": steps < rule,
        "examples": before + steps * multi.batch_size,
    }


def train_multi_task_lora(bench: Bench, *, progress: bool = True) -> tuple[Adapter, dict[str, Any]]:
    """The multi-task LoRA at its best validation accuracy, with steps, examples and curve; made once.

    Raises ValueError when the folder holds one that was made by another plan.
    """
    folder = bench.recipe.folder / "multi_task_lora"
    start = shared_start(bench, progress=progress)
    plan = multi_task_plan(bench, start)
    if not (folder / "curve.json").is_file():
        adapter, curve = fit_multi_task(bench, start, FitConfig(**plan["fit"]), progress=progress)
        save_adapter_folder(folder, bench.spec, adapter, overwrite=True)
        replace_file(folder / "curve.json", json_bytes({"plan": plan, "curve": curve}))
    report = read_json(folder / "curve.json")
    if changed := sorted(key for key in plan if report["plan"].get(key) != plan[key]):
        raise ValueError(
            f"{folder} was trained with another {changed}. Remove the folder to train it again, or give the "
            f"run another `output`."
        )
    about = {key: plan[key] for key in ("rule", "shortened", "examples")} | {"steps": plan["fit"]["steps"]}
    return load_adapter_folder(folder, expected=bench.spec)[1], about | {"curve": report["curve"]}


def fit_multi_task(
    bench: Bench, start: Adapter, config: FitConfig, *, progress: bool
) -> tuple[Adapter, list[dict[str, int | float]]]:
    """Train on all training tasks; the best adapter on validation tasks (or the start) and the curve."""
    sheets = [
        make_sheet(bench.adapted, task.evaluation[:VALIDATION_EXAMPLES], task.held_out_prompts)
        for task in bench.suite.split("validation")
        if task.evaluation
    ]
    pool = prompted_pool(bench, config, progress=progress)
    stacked = stack_adapters([start], bench.adapted.device)
    best, curve = start, [{"step": 0, "accuracy": mean_accuracy(bench, sheets, stacked)}]
    # A and B are both trained, whatever the gauge: the rival need not stay in the frame of the stored runs.
    steps = fit_steps(bench.adapted, stacked, [pool], config, seeds=[bench.recipe.seed], train_a=True)
    for step in tqdm(steps, total=config.steps, desc="multi-task rival", disable=not progress, unit="step"):
        if step.index % EVERY == 0 or step.index == config.steps:
            accuracy = mean_accuracy(bench, sheets, stacked)
            # Without validation tasks every accuracy is 0, and the last adapter stands.
            if accuracy > max(point["accuracy"] for point in curve) or not sheets:
                best = unstack_adapter(stacked, 0)
            curve.append({"step": step.index, "accuracy": accuracy})
    return best, curve


def prompted_pool(bench: Bench, config: FitConfig, *, progress: bool) -> Pool:
    """Training rows of all tasks, prompt in context; no more a task than the steps can draw."""
    tasks = bench.suite.split("train")
    rows = min(bench.recipe.collect.rows, math.ceil(config.steps * config.batch_size / len(tasks)))
    bar = tqdm(tasks, desc="lower layers", disable=not progress, unit="task")
    return joined([make_pool(bench.adapted, task, rows, plain=False) for task in bar])


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


def seconds_to_fine_tune(bench: Bench, task: Task, *, base: float, oracle: float, examples: int) -> FineTune:
    """Train the oracle's own run again, alone, and stop at 95 % of oracle − base (prompt in context).

    Seconds of the optimiser steps, and of the lower layers for the rows that were drawn; scoring, eight times
    a run, and loading are not counted.
    """
    collect = bench.recipe.collect
    config, wanted = collect.single, base + ENOUGH * (oracle - base)
    stacked = stack_adapters([shared_start(bench, progress=False)], bench.adapted.device)
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
