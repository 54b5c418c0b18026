"""What the diffusion is centred on: ridge regression from condition to tokens, honest on training tasks too.

In: conditions (task, paraphrase, condition), targets (task, feature).  Out: predictions.
Idea: from one shared start adapters are close to linear in their task, so a linear prediction carries most
of what the prompt tells and the chain has to learn only the rest. A training task is predicted by the fit
that leaves it out: residuals then look as they will on unseen tasks. All left-out fits come from one
decomposition. Ridge is linear in its targets, so a prediction is a mixture of the tasks' targets: nothing
larger than (paraphrases, tasks) is solved for, however long the targets are.
Source: leave-group-out residuals of a linear smoother, r_g = (I − H_gg)⁻¹ (y − H y)_g (e.g. Cook & Weisberg
1982).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# The intercept is one more feature; at this size its own penalty is a hundredth of the others'.
INTERCEPT = 10.0


@dataclass(frozen=True)
class Ridge:
    """A fitted linear map; `weight` is (condition + 1, feature), its last row the intercept."""

    weight: Float[Tensor, "input feature"]

    def __call__(self, conditions: Float[Tensor, "row condition"]) -> Float[Tensor, "row feature"]:
        """Predictions in the weight's dtype."""
        return with_intercept(conditions.to(self.weight)) @ self.weight


def with_intercept(conditions: Float[Tensor, "row condition"]) -> Float[Tensor, "row input"]:
    """The constant feature appended."""
    return torch.cat([conditions, torch.full_like(conditions[:, :1], INTERCEPT)], 1)


def fit_ridge(
    conditions: Float[Tensor, "row condition"], targets: Float[Tensor, "row feature"], strength: float
) -> Ridge:
    """argmin_W mean‖y − xW‖² + strength·‖W‖², in float64."""
    x, y = with_intercept(conditions.double()), targets.double()
    gram = x.mT @ x / len(x) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    return Ridge(torch.linalg.solve(gram, x.mT @ y / len(x)))


def cross_fitted(
    conditions: Float[Tensor, "row condition"],
    targets: Float[Tensor, "row feature"],
    task: Int[Tensor, " row"],
    strength: float,
) -> Float[Tensor, "row feature"]:
    """For each row the prediction of the ridge fitted without that row's task (float64).

    A left-out fit minimises the remaining part of the whole fit's sum, with the whole penalty: it equals
    `fit_ridge` on the other n − n_g rows at n/(n − n_g) times the strength. ValueError for a single task.
    """
    x, y = with_intercept(conditions.double()), targets.double()
    if len(task.unique()) < 2:
        raise ValueError("a cross-fitted centre needs at least 2 training tasks; use diffusion.centre: mean.")
    gram = x.mT @ x / len(x) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    solver = torch.linalg.solve(gram, x.mT / len(x))  # W = solver y, and the hat matrix H = x solver
    residual = y - x @ (solver @ y)
    out = torch.empty_like(y)
    for group in task.unique():
        rows = (task == group).nonzero().flatten()
        left = torch.eye(len(rows), dtype=x.dtype) - x[rows] @ solver[:, rows]
        out[rows] = y[rows] - torch.linalg.solve(left, residual[rows])
    return out


def task_rows(
    conditions: Float[Tensor, "task prompt condition"],
) -> tuple[Float[Tensor, "row condition"], Int[Tensor, " row"]]:
    """Every paraphrase as a row of its own, and the task of each."""
    tasks, prompts, _ = conditions.shape
    return conditions.flatten(0, 1), torch.arange(tasks).repeat_interleave(prompts)


def fit_task_ridge(
    conditions: Float[Tensor, "task prompt condition"],
    targets: Float[Tensor, "task feature"],
    strength: float,
) -> Ridge:
    """`fit_ridge` with a task's target for each of its paraphrases, in float32."""
    rows, task = task_rows(conditions)
    weight = fit_ridge(rows, torch.eye(len(targets), dtype=torch.float64)[task], strength).weight
    return Ridge(weight.float() @ targets.float())


def left_out_mixture(
    conditions: Float[Tensor, "task prompt condition"], strength: float
) -> Float[Tensor, "task prompt task"]:
    """`cross_fitted` for any targets: left-out prediction = mixture @ targets. Its diagonal is zero."""
    rows, task = task_rows(conditions)
    unit = torch.eye(len(conditions), dtype=torch.float64)[task]
    return cross_fitted(rows, unit, task, strength).float().view(*conditions.shape[:2], -1)


def choose_strength(
    conditions: Float[Tensor, "task prompt condition"],
    targets: Float[Tensor, "task feature"],
    strengths: Sequence[float] = STRENGTHS,
) -> float:
    """The strength with the least leave-one-task-out squared error."""
    rows, task = task_rows(conditions)
    wanted = coordinates(targets)[task]
    errors = [(cross_fitted(rows, wanted, task, s) - wanted).pow(2).mean().item() for s in strengths]
    return strengths[errors.index(min(errors))]


def coordinates(targets: Float[Tensor, "task feature"]) -> Float[Tensor, "task direction"]:
    """The targets in the span of all of them: where distances alone matter, these do (float64)."""
    energy, vectors = torch.linalg.eigh(targets.double() @ targets.double().mT)
    return vectors * energy.clamp_min(0).sqrt()
