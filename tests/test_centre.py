"""The centre: ridge as documented, left-out predictions equal to brute-force refits."""

import pytest
import torch
from torch.testing import assert_close

from ltdi_peft.centre import (
    INTERCEPT,
    STRENGTHS,
    Ridge,
    choose_strength,
    cross_fitted,
    fit_ridge,
    fit_task_ridge,
    left_out_mixture,
    task_rows,
    with_intercept,
)

ROWS, WIDTH, FEATURES = 18, 5, 7
CLOSE = {"rtol": 0, "atol": 1e-9}  # float64, condition numbers up to 1e4


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def data(rng):
    """Conditions, noisy linear targets, and six tasks of unequal numbers of rows, not in order."""
    x = torch.randn(ROWS, WIDTH, generator=rng, dtype=torch.float64)
    w = torch.randn(WIDTH, FEATURES, generator=rng, dtype=torch.float64)
    y = x @ w + 3.0 + 0.3 * torch.randn(ROWS, FEATURES, generator=rng, dtype=torch.float64)
    task = torch.tensor([0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0, 5, 5, 5, 2, 2, 0])
    return x, y, task


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 1.0])
def test_ridge_minimises_its_objective(data, strength):
    """The gradient of mean‖y − xW‖² + strength·‖W‖² vanishes at the fit, and nowhere near it."""
    x, y, _ = data

    def gradient(weight):
        weight = weight.clone().requires_grad_(True)
        miss = (y - with_intercept(x) @ weight).square().sum(1).mean()
        (miss + strength * weight.square().sum()).backward()
        return weight.grad

    weight = fit_ridge(x, y, strength).weight
    assert gradient(weight).abs().max() < 1e-10
    assert gradient(weight + 0.01).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_left_out_predictions_equal_refits(data, strength):
    """fit_ridge without the task's rows, at n/(n − n_g) times the strength, as the docstring says."""
    x, y, task = data
    got = cross_fitted(x, y, task, strength)
    for group in task.unique():
        kept = task != group
        refit = fit_ridge(x[kept], y[kept], strength * len(x) / int(kept.sum()))
        assert_close(got[~kept], refit(x[~kept]), **CLOSE)
        plain = fit_ridge(x[kept], y[kept], strength)
        if strength == 1.0:  # negative control: the factor on the penalty shows where the penalty does
            assert (got[~kept] - plain(x[~kept])).abs().max() > 1e-4


def test_left_out_predictions_never_see_their_task(data):
    x, y, task = data
    before = cross_fitted(x, y, task, 1e-2)
    y = torch.where((task == 3)[:, None], y + 100.0, y)
    after = cross_fitted(x, y, task, 1e-2)
    assert_close(after[task == 3], before[task == 3], **CLOSE)
    assert (after[task != 3] - before[task != 3]).abs().max() > 0.1


def test_ridge_recovers_a_linear_map(rng):
    x = torch.randn(40, WIDTH, generator=rng, dtype=torch.float64)
    w = torch.randn(WIDTH, FEATURES, generator=rng, dtype=torch.float64)
    fitted = fit_ridge(x, x @ w + 2.0, 1e-10)
    assert_close(
        fitted.weight[:-1], w, rtol=0, atol=1e-7
    )  # the penalty moves W by about 1e-10 · ‖W‖/eigenvalue
    assert_close(fitted.weight[-1] * INTERCEPT, torch.full((FEATURES,), 2.0).double(), rtol=0, atol=1e-7)
    assert_close(fitted(x.float()), x.float().double() @ fitted.weight[:-1] + 2.0, rtol=0, atol=1e-6)


def test_no_information_gives_the_mean(rng):
    """A ridge whose strength swamps the conditions predicts the mean; its last row is the intercept."""
    x = 1e-6 * torch.randn(30, WIDTH, generator=rng, dtype=torch.float64)
    y = torch.randn(30, FEATURES, generator=rng, dtype=torch.float64) + 1.0
    assert_close(fit_ridge(x, y, 1e-3)(x), y.mean(0).expand_as(y), rtol=0, atol=1e-4)
    assert isinstance(fit_ridge(x, y, 1e-3), Ridge)


def by_task(rng, tasks, prompts=2, width=WIDTH):
    """Conditions of some paraphrases around each task's own point."""
    own = torch.randn(tasks, 1, width, generator=rng, dtype=torch.float64)
    return own + 0.1 * torch.randn(tasks, prompts, width, generator=rng, dtype=torch.float64)


def test_the_mixture_is_the_left_out_fit_of_any_targets(rng):
    x, y = by_task(rng, 7), torch.randn(7, 50, generator=rng, dtype=torch.float64)
    mixture = left_out_mixture(x, 1e-2)
    rows, task = task_rows(x)
    wanted = cross_fitted(rows, y[task], task, 1e-2).view(7, 2, 50)
    assert_close(mixture.double() @ y, wanted, rtol=0, atol=1e-5)  # the mixture is float32
    assert mixture.diagonal(dim1=0, dim2=2).abs().max() < 1e-6


def test_task_ridge_is_the_ridge_of_its_rows(rng):
    x, y = by_task(rng, 7), torch.randn(7, 50, generator=rng, dtype=torch.float64)
    rows, task = task_rows(x)
    assert_close(
        fit_task_ridge(x, y, 1e-2).weight.double(), fit_ridge(rows, y[task], 1e-2).weight, rtol=0, atol=1e-5
    )


def test_strength_has_the_least_left_out_error(rng):
    """Also where features outnumber tasks, and errors are taken in the span of the targets."""
    x, y = by_task(rng, 9), torch.randn(9, 50, generator=rng, dtype=torch.float64)
    chosen, (rows, task) = choose_strength(x, y), task_rows(x)
    errors = {s: (cross_fitted(rows, y[task], task, s) - y[task]).square().mean().item() for s in STRENGTHS}
    assert errors[chosen] == min(errors.values())
    assert len(set(errors.values())) == len(STRENGTHS)


def test_strength_grows_with_noise(rng):
    x = by_task(rng, 24, prompts=1, width=20)
    w = torch.randn(20, FEATURES, generator=rng, dtype=torch.float64)
    noise = torch.randn(24, FEATURES, generator=rng, dtype=torch.float64)
    assert choose_strength(x, x[:, 0] @ w) == min(STRENGTHS)
    assert choose_strength(x, 0.01 * x[:, 0] @ w + 10 * noise) > 0.1


def test_one_task_is_refused(data):
    x, y, task = data
    with pytest.raises(ValueError, match=r"at least 2 training tasks; use diffusion\.centre: mean"):
        cross_fitted(x, y, torch.zeros_like(task), 1e-2)
    with pytest.raises(ValueError, match="at least 2 training tasks"):
        choose_strength(x[None], y[:1])
