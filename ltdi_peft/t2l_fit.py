"""Training of the T2L hypernetwork, on stored adapters or through the frozen base model.

In: an untrained `Hypernetwork`, the training tasks' conditions, runs and examples.
Out: the network at its best on the validation tasks, the curve of their accuracy, the losses.
Idea: both modes are one loop over draws of training tasks with a paraphrase each; they differ in the loss.
Source: Text-to-LoRA, arXiv:2506.06105, from its description; our own code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ltdi_peft.baselines import final_adapter
from ltdi_peft.collect import Bench, run_seed
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import T2LConfig, T2LTraining
from ltdi_peft.fit import Pool, draws, losses, make_pool, scheduled
from ltdi_peft.guidance import trials
from ltdi_peft.hypernetwork import Differences, Hypernetwork, guided, mean_difference
from ltdi_peft.multi_task import VALIDATION_EXAMPLES, validation_tasks
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.score import Sheet, make_sheet, score
from ltdi_peft.store import Trajectory

Loss = Callable[[Int[Tensor, " row"], Float[Tensor, "row condition"]], Tensor]
"""Training tasks and a condition of each → the scalar that a step minimises."""


def fit_t2l(
    bench: Bench,
    network: Hypernetwork,
    data: TrainingSet,
    runs: Sequence[Trajectory],
    encoder: PromptEncoder,
    *,
    mode: str,
    progress: bool,
) -> dict[str, Any]:
    """Train `network` and leave it at its best on the validation tasks (or the start); curve and losses.

    Without validation tasks the last weights stand.
    """
    config = bench.recipe.evaluate.t2l
    training: T2LTraining = vars(config)[mode]
    targets = mean_targets(network, data, runs)
    # Either mode writes numbers of the size that the stored runs have.
    network.set_units(targets)
    if mode == "sft":
        del targets
        loss = sft_loss(bench, network, sft_pools(bench, data, progress=progress), config)
    else:
        loss = reconstruction_loss(network, targets)
    validation = validation_set(bench, data, encoder)
    best = kept_state(network)
    curve = [{"step": 0, "accuracy": validation_accuracy(bench, network, validation)}]
    means: list[tuple[int, float]] = []  # (step, mean loss since the last)
    since: list[Tensor] = []
    steps = t2l_steps(network, loss, data.conditions, training, config, seed=bench.recipe.seed)
    bar = tqdm(steps, total=training.steps, desc=f"T2L {mode}", disable=not progress, unit="step")
    for index, value in bar:
        since.append(value)
        if index % training.validate_every == 0 or index == training.steps:
            means.append((index, torch.stack(since).mean().item()))
            since = []
            accuracy = validation_accuracy(bench, network, validation)
            if accuracy > max(point["accuracy"] for point in curve) or not validation.sheets:
                best = kept_state(network)
            curve.append({"step": index, "accuracy": accuracy})
            bar.set_postfix(loss=f"{means[-1][1]:.4f}", accuracy=f"{accuracy:.3f}")
    network.load_state_dict(best)
    return {"curve": curve, "losses": means}


def t2l_steps(
    network: Hypernetwork,
    loss: Loss,
    conditions: Float[Tensor, "task prompt condition"],
    training: T2LTraining,
    config: T2LConfig,
    *,
    seed: int,
) -> Iterator[tuple[int, Tensor]]:
    """One optimiser step a yield: its number from 1 and the loss before it; draws come from `seed`."""
    weights, rng = list(network.parameters()), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=config.weight_decay)
    shape = {"warmup": config.warmup, "schedule": "cosine"}
    for index in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(training.learning_rate, index, training.steps, **shape)
        task = torch.randperm(len(conditions), generator=rng)[: training.tasks]
        prompt = torch.randint(conditions.shape[1], (len(task),), generator=rng)
        optimizer.zero_grad()
        value = loss(task, conditions[task, prompt].to(network.scale))
        # The base weights of a model that is not frozen get no gradient.
        value.backward(inputs=weights)
        clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        yield index + 1, value.detach()


def mean_targets(network: Hypernetwork, data: TrainingSet, runs: Sequence[Trajectory]) -> Differences:
    """Differences of the final adapters from the start, mean over each task's runs; one row a task."""
    each: list[Differences] = []
    for name in data.names:
        own = [network.differences(final_adapter(run)) for run in runs if run.task.name == name]
        each.append({kind: torch.cat([one[kind] for one in own]).mean(0, keepdim=True) for kind in own[0]})
    return {kind: torch.cat([one[kind] for one in each]).to(network.scale) for kind in network.kinds}


def reconstruction_loss(network: Hypernetwork, targets: Differences) -> Loss:
    """Squared error a number, in units of `network.units`, to the mean of the task's final adapters.

    The mean over the runs of the error to each run is this and a constant.
    """
    numbers = sum(target[0].numel() for target in targets.values())

    def loss(task: Int[Tensor, " row"], conditions: Float[Tensor, "row condition"]) -> Tensor:
        off = {kind: one - targets[kind][task] for kind, one in network(conditions).items()}
        squares = [(one / network.units(kind)).square().sum() for kind, one in off.items()]
        return torch.stack(squares).sum() / (len(task) * numbers)

    return loss


def sft_pools(bench: Bench, data: TrainingSet, *, progress: bool) -> list[Pool]:
    """A pool of rows a training task, kept during the training alone; no more rows than it can draw."""
    collect, config = bench.recipe.collect, bench.recipe.evaluate.t2l
    drawn = config.sft.steps * min(config.sft.tasks, len(data.names)) * config.examples
    rows = min(collect.rows, math.ceil(drawn / len(data.names)))
    plain = collect.single.prompt_in_context < 1
    bar = tqdm(data.names, desc="lower layers", disable=not progress, unit="task")
    return [make_pool(bench.adapted, bench.suite[name], rows, plain=plain) for name in bar]


def sft_loss(bench: Bench, network: Hypernetwork, pools: Sequence[Pool], config: T2LConfig) -> Loss:
    """Mean cross-entropy of generated adapters on their own tasks' answers, through the frozen base model."""
    batch = replace(bench.recipe.collect.single, batch_size=config.examples)
    seeds = [run_seed(bench.recipe.seed, index) for index in range(len(pools))]
    streams = [draws(pool, batch, seed) for pool, seed in zip(pools, seeds, strict=True)]

    def loss(task: Int[Tensor, " row"], conditions: Float[Tensor, "row condition"]) -> Tensor:
        drawn = [(pools[i], index) for i in task.tolist() for index in next(streams[i])]
        rows, inputs = [pool.rows[i] for pool, i in drawn], [pool.inputs[i] for pool, i in drawn]
        return losses(bench.adapted, rows, inputs, network.factors(network(conditions))).mean()

    return loss


# ---- validation


@dataclass(frozen=True)
class Validation:
    """Validation tasks as every score meets them; there may be none."""

    conditions: Float[Tensor, "task condition"]  # of a held-out paraphrase
    sheets: tuple[Sheet, ...]  # the same paraphrase in context
    training: Float[Tensor, "train prompt condition"]  # of the training tasks, for the mean
    mean_shares: tuple[float, ...]


def validation_set(bench: Bench, data: TrainingSet, encoder: PromptEncoder) -> Validation:
    """The first examples of every validation task that has any."""
    tasks = validation_tasks(bench)
    shares = dict.fromkeys(one.mean_share for one in trials(bench.recipe.collect.gauge))
    conditions = encoder([task.held_out_prompts[0] for task in tasks]) if tasks else data.conditions[:0, 0]
    sheets = [
        make_sheet(bench.adapted, task.evaluation[:VALIDATION_EXAMPLES], task.held_out_prompts[:1])
        for task in tasks
    ]
    return Validation(conditions, tuple(sheets), data.conditions, tuple(shares))


@torch.no_grad()
def validation_accuracy(bench: Bench, network: Hypernetwork, validation: Validation) -> float:
    """Mean over the tasks, each with its own adapter, with or without the mean: whichever is better.

    0 without tasks. Guidance may leave out the mean later; a network must not be passed over for its mean.
    """
    if not validation.sheets:
        return 0.0
    mean, found = mean_difference(network, validation.training), []
    for condition, sheet in zip(validation.conditions.to(network.scale), validation.sheets, strict=True):
        one = network(condition[None])
        each = [guided(one, mean, scale=1.0, mean_share=share) for share in validation.mean_shares]
        stacked = network.factors({kind: torch.cat([tried[kind] for tried in each]) for kind in one})
        found.append(score(bench.adapted, sheet, stacked).accuracy)
    return torch.stack(found).mean(0).max().item()


def kept_state(network: Hypernetwork) -> dict[str, Tensor]:
    """Copies of weights and units, on the CPU."""
    return {k: w.detach().to("cpu", copy=True).contiguous() for k, w in network.state_dict().items()}
