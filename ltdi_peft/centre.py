"""What the diffusion is centred on: ridge regression from condition to tokens, honest on training tasks too.

In: conditions (row, condition), targets (row, feature), the task of each row.  Out: predictions.
Idea: from one shared start adapters are close to linear in their task, so a linear prediction carries most
of what the prompt tells and the chain has to learn only the rest. A training task is predicted by the fit
that leaves it out: residuals then look as they will on unseen tasks. All left-out fits come from one
decomposition.
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


def choose_strength(
    conditions: Float[Tensor, "row condition"],
    targets: Float[Tensor, "row feature"],
    task: Int[Tensor, " row"],
    strengths: Sequence[float] = STRENGTHS,
) -> float:
    """The strength with the least leave-one-task-out squared error."""
    errors = [(cross_fitted(conditions, targets, task, s) - targets).pow(2).mean().item() for s in strengths]
    return strengths[errors.index(min(errors))]
