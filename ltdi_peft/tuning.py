"""The sentence encoder, tuned on the training tasks: other wordings of a task come to one place.

In: prompts of the training tasks, and the tokens of each task's own adapter.
Out: what is added to the weights of the encoder's last layers, in `<output>/encoder.safetensors`; made once.
Idea: a condition is good if a linear map predicts adapters from it, on tasks that the map was not fitted to.
So a step takes one wording of many tasks, predicts every task by the ridge regression on all the others, and
lowers the error of that. The regression has a closed form, so none of it is learnt by heart: what is trained
can only be of use to tasks that were left out.
Source: ridge regression as a differentiable learner, arXiv:1805.08136; its left-out residuals, as in
centre.py; LoRA, arXiv:2106.09685.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from ltdi_peft.baselines import tensor_digest
from ltdi_peft.centre import coordinates, with_intercept
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder, added
from ltdi_peft.config import Recipe, TuningConfig, to_dict
from ltdi_peft.encoded import Encoded
from ltdi_peft.files import read_header, replace_file
from ltdi_peft.fit import FitState, scheduled
from ltdi_peft.fit_point import EVERY, FitPoint
from ltdi_peft.multi_task import require_same_plan
from ltdi_peft.prepare import encoded_of
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task
from ltdi_peft.trajectory import flat, paired

FILE, POINT_FILE = "encoder.safetensors", "encoder.unfinished.safetensors"
HEADER = "tuning"
STRENGTH = 3e-3  # of the regression in a step; the centre's own is chosen later, on all wordings
WARMUP = 0.05  # share of the steps


def recipe_tuning(recipe: Recipe) -> Adapter | None:
    """What `tune` wrote for this recipe; None for one without. FileNotFoundError before it was trained."""
    if not recipe.condition.tuning.steps:
        return None
    file = recipe.folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: this recipe tunes its encoder. Run `ltdi train` with it first."
        )
    return paired(load_file(file))


def tune(bench: Bench, *, progress: bool = True) -> None:
    """Tune the recipe's encoder and write `<output>/encoder.safetensors`, unless it is there.

    Goes on from its resume point. ValueError with fewer than three training tasks, and for a file or a resume
    point that was made by another plan.
    """
    recipe = bench.recipe
    if not recipe.condition.tuning.steps:
        return
    encoded = encoded_of(recipe, bench.suite, progress=progress)
    tasks = [bench.suite[name] for name in sorted(set(encoded.runs.tasks))]
    if len(tasks) < 3:
        raise ValueError(
            f"condition.tuning predicts each task from the others and needs at least 3 training tasks, there "
            f"are {len(tasks)}: collect more, or set condition.tuning.steps: 0."
        )
    targets = deviations(encoded, tasks)
    plan, file = plan_of(recipe, tasks, targets), recipe.folder / FILE
    if file.is_file():
        require_same_plan(file, read_header(file, HEADER)["plan"], plan)
        return
    encoder = PromptEncoder(recipe.condition.encoder, base=bench.base)
    point = FitPoint(recipe.folder / POINT_FILE, plan)
    factors, errors = tuned(encoder, tasks, targets, recipe, point, progress=progress)
    header = {HEADER: json.dumps({"plan": plan, "left_out_errors": errors})}
    replace_file(file, save(flat(factors), metadata=header))
    point.remove()


def plan_of(recipe: Recipe, tasks: Sequence[Task], targets: Tensor) -> dict[str, Any]:
    """What the result depends on, as JSON."""
    prompts = json.dumps([[task.name, list(task.prompts)] for task in tasks])
    return {
        "tuning": to_dict(recipe.condition.tuning),
        "encoder": recipe.condition.encoder,
        "seed": recipe.seed,
        "adapters": tensor_digest([targets]),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
    }


def deviations(encoded: Encoded, tasks: Sequence[Task]) -> Float[Tensor, "task direction"]:
    """Of each task's adapter (mean over seeds) from the mean of all, as `coordinates`: tokens are longer."""
    runs = encoded.runs
    own = [[index for index, name in enumerate(runs.tasks) if name == task.name] for task in tasks]
    final = torch.stack([runs.tokens[indices, -1].double().mean(0).flatten() for indices in own])
    return coordinates(final - final.mean(0)).float()


def left_out_error(
    conditions: Float[Tensor, "task condition"], targets: Float[Tensor, "task direction"]
) -> Float[Tensor, ""]:
    """Squared error of predicting each row by the ridge regression fitted on the others; 1: as good as 0."""
    x = with_intercept(conditions)
    gram = x @ x.mT + STRENGTH * len(x) * torch.eye(len(x))
    inverse = torch.linalg.inv(gram)
    residual = (inverse @ targets) / inverse.diagonal()[:, None]
    return residual.square().sum() / targets.square().sum()


# ---- training


def fresh_factors(encoder: PromptEncoder, config: TuningConfig, seed: int) -> Adapter:
    """A random and B = 0, as PEFT begins, for every linear layer of the encoder's last layers."""
    stack = list(encoder.model.get_submodule("encoder.layer").children())
    rng = torch.Generator().manual_seed(seed)
    found: Adapter = {}
    for index in range(len(stack))[-config.layers :]:
        prefix = f"encoder.layer.{index}"
        for name, module in stack[index].named_modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                a = (torch.rand(config.rank, module.in_features, generator=rng) * 2 - 1) * bound
                found[f"{prefix}.{name}"] = (a, torch.zeros(module.out_features, config.rank))
    device = encoder.model.device
    return {site: (a.to(device), b.to(device)) for site, (a, b) in sorted(found.items())}


def tuned(
    encoder: PromptEncoder,
    tasks: Sequence[Task],
    targets: Float[Tensor, "task direction"],
    recipe: Recipe,
    point: FitPoint,
    *,
    progress: bool,
) -> tuple[Adapter, list[float]]:
    """What is to be added to the encoder's weights, and the left-out error of every step."""
    config, state = recipe.condition.tuning, FitState()
    factors = fresh_factors(encoder, config, recipe.seed)
    found = point.load(state, factors)
    errors: list[float] = list(found[1]) if found else []
    steps = tuning_steps(encoder, factors, tasks, targets, config, recipe.seed, state)
    bar = tqdm(
        steps, initial=state.step, total=config.steps, desc="encoder", disable=not progress, unit="step"
    )
    for error in bar:
        errors.append(error)
        bar.set_postfix(left_out_error=f"{error:.3f}")
        if state.step % EVERY == 0:
            point.save(state, factors, {}, errors)
    return {site: (a.detach().cpu(), b.detach().cpu()) for site, (a, b) in factors.items()}, errors


def tuning_steps(
    encoder: PromptEncoder,
    factors: Adapter,
    tasks: Sequence[Task],
    targets: Float[Tensor, "task direction"],
    config: TuningConfig,
    seed: int,
    state: FitState,
) -> Iterator[float]:
    """Train `factors` in place, the left-out error before each step a yield; `state` is kept up to date."""
    encoder.model.requires_grad_(False)
    leaves = [factor.requires_grad_(True) for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(leaves, lr=config.learning_rate, weight_decay=0.0)
    if state.step:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state.moments})
    for step in range(state.step, config.steps):
        rng = random.Random(f"{seed}/{step}")
        drawn = rng.sample(range(len(tasks)), min(config.tasks, len(tasks)))
        prompts = [rng.choice(tasks[index].prompts) for index in drawn]
        error = left_out_error(encoder.said(prompts, added(encoder.model, factors)), targets[drawn])
        rate = scheduled(config.learning_rate, step, config.steps, warmup=WARMUP, schedule="linear")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        state.step, state.moments = step + 1, optimizer.state_dict()["state"]
        yield error.item()
