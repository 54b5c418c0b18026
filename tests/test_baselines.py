"""The rivals: closed forms, fair numbers of trials, noise of a given size, and what fine-tuning costs."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, collected, prepared_of, untrained_generator
from torch.testing import assert_close

from ltdi_peft.baselines import (
    NearestTask,
    adapter_digest,
    final_adapter,
    fit_ridge_rival,
    mean_accuracy,
    mean_adapter,
    seconds_to_fine_tune,
    with_best_guidance,
    with_noise_like,
)
from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import INTERCEPT
from ltdi_peft.collect import shared_start
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.guidance import GUIDANCE, MEAN_SHARES, Guidance
from ltdi_peft.prepare import TrainingSet, training_trajectories
from ltdi_peft.score import make_sheet
from ltdi_peft.spec import delta_w
from ltdi_peft.store import TrajectoryStore


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("baselines"))


@pytest.fixture(scope="module")
def runs(bench):
    return training_trajectories(bench.recipe, SPLITS["train"])


@pytest.fixture(scope="module")
def prepared(bench):
    return prepared_of(bench)


@pytest.fixture(scope="module")
def generator(bench):
    return untrained_generator(bench)


def assert_same_adapter(got, expected):
    for site, (a, b) in expected.items():
        assert torch.equal(got[site][0], a)
        assert torch.equal(got[site][1], b)


def test_mean_of_a_shared_frame_is_the_mean_of_delta_w(bench, runs):
    got = mean_adapter(runs, "shared_a")
    for site in bench.spec.sites:
        want = torch.stack([delta_w(*final_adapter(run)[site.name], site.scaling) for run in runs]).mean(0)
        assert_close(delta_w(*got[site.name], site.scaling), want, rtol=1e-5, atol=1e-7)  # float32 sums


def test_canonical_mean_is_that_of_delta_w_where_the_rank_allows(bench, runs):
    same = mean_adapter([runs[0], runs[0]], "canonical")
    for site in bench.spec.sites:
        want = delta_w(*final_adapter(runs[0])[site.name], site.scaling)
        assert_close(delta_w(*same[site.name], site.scaling), want, rtol=1e-4, atol=1e-6)  # float32 SVD


def test_nearest_task_answers_with_the_first_seed(bench, runs, prepared):
    nearest = NearestTask(prepared.data, runs)
    names = prepared.data.names
    for index, adapter in enumerate(nearest.adapters(nearest.conditions)):
        (run,) = [run for run in runs if run.task.name == names[index] and run.seed == 0]
        assert_same_adapter(adapter, final_adapter(run))
    twice = nearest.adapters(nearest.conditions[[1, 1]])
    assert twice[0] is twice[1]


def random_data(prepared, tasks=7, prompts=3):
    rng = torch.Generator().manual_seed(0)
    shape = prepared.data.tokens.shape[1:]
    conditions = torch.randn(tasks, prompts, 5, generator=rng)
    tokens = torch.randn(tasks, *shape, generator=rng)
    return TrainingSet(tuple("abcdefg"), tokens, torch.arange(tasks), conditions)


def test_ridge_is_the_closed_form_on_the_final_targets(prepared, generator):
    data = random_data(prepared)
    rival = fit_ridge_rival(data, prepared.codec, generator)
    x = torch.cat([data.conditions.flatten(0, 1), torch.full((21, 1), INTERCEPT)], 1).double()
    y = data.tokens[:, -1].flatten(1).double().repeat_interleave(3, 0)
    # an independent route: least squares on rows extended by √(n·λ)·I
    penalty = (21 * rival.strength) ** 0.5 * torch.eye(6, dtype=torch.float64)
    zeros = torch.zeros(6, y.shape[1], dtype=torch.float64)
    weight = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, zeros])).solution
    new = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    want = torch.cat([new.double(), torch.full((2, 1), INTERCEPT).double()], 1) @ weight
    assert_close(rival.tokens(new).flatten(1).double(), want, rtol=1e-5, atol=1e-5)  # tokens are float32


def test_guidance_stretches_from_the_mean_and_leaves_it_out(prepared, generator):
    data = random_data(prepared)
    rival = fit_ridge_rival(data, prepared.codec, generator)
    new = data.conditions[0]
    none, one, two = (replace(rival, guidance=Guidance(s, 1.0)).tokens(new) for s in (0.0, 1.0, 2.0))
    assert_close(none, rival.mean.expand_as(none))
    assert_close(two - one, one - none)
    assert_close(replace(rival, guidance=Guidance(2.0, 0.0)).tokens(new), two - rival.mean)


def test_ridge_has_as_many_trials_as_ours(bench, prepared, generator):
    rival = fit_ridge_rival(prepared.data, prepared.codec, generator)
    encoder = PromptEncoder("base", base=bench.base)
    chosen, tried = with_best_guidance(rival, bench, bench.suite.split("validation"), encoder)
    assert list(tried) == [str(share) for share in MEAN_SHARES]
    assert all(list(found) == [str(scale) for scale in GUIDANCE] for found in tried.values())
    best = tried[str(chosen.guidance.mean_share)]
    assert max(best.values()) == max(max(found.values()) for found in tried.values())
    assert with_best_guidance(rival, bench, (), encoder)[0].guidance == Guidance(1.0, 1.0)


def test_noise_is_as_far_from_the_mean_as_what_it_controls(prepared, runs):
    codec, mean, like = prepared.codec, mean_adapter(runs, "shared_a"), final_adapter(runs[3])
    origin, wanted = codec.encode(mean), codec.encode(like) - codec.encode(mean)
    one, again, other = (codec.encode(with_noise_like(codec, mean, like, s)) - origin for s in "xxy")
    assert_close(one.norm(dim=-1), wanted.norm(dim=-1), rtol=1e-4, atol=1e-5)  # float32 round trip
    assert torch.equal(one, again)
    for a, b in ((one, wanted), (one, other)):  # in no direction of its own
        assert abs(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) < 0.9
    none = codec.encode(with_noise_like(codec, mean, mean, "x")) - origin
    assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-5)


def test_fine_tune_is_the_oracles_own_run(bench):
    task = bench.suite.split("unseen_tasks")[0]
    (run,) = [
        r for r in TrajectoryStore(bench.recipe.held_out_folder).trajectories() if r.task.name == task.name
    ]
    sheet = make_sheet(bench.adapted, task.evaluation, task.held_out_prompts)
    oracle = mean_accuracy(bench, [sheet], stack_adapters([final_adapter(run)]))
    start = shared_start(bench, progress=False)
    known = {"base": 0.0, "examples": len(task.evaluation)}
    out_of_reach = seconds_to_fine_tune(bench, task, start, oracle=2.0, **known)
    assert not out_of_reach.reached
    assert out_of_reach.steps == bench.recipe.collect.single.steps
    assert out_of_reach.accuracy == pytest.approx(oracle)
    at_once = seconds_to_fine_tune(bench, task, start, base=0.0, oracle=0.0, examples=4)
    assert at_once.reached
    assert at_once.steps == 1
    assert 0 < at_once.seconds < 60


def test_digest_changes_with_one_number(bench):
    other = {site: (a.clone(), b.clone()) for site, (a, b) in bench.fresh.items()}
    assert adapter_digest(other) == adapter_digest(bench.fresh)
    next(iter(other.values()))[1][0, 0] = 1e-30
    assert adapter_digest(other) != adapter_digest(bench.fresh)
