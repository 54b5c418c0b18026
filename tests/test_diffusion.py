"""METHOD.md §3 as tests: closed forms, the table of visits, diffusers as the independent reference."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from ltdi_peft.chain import LAWS, Chain, denoised, end_from_residual, gaussian, noised, residual_from_end
from ltdi_peft.diffusion import (
    LOSSES,
    SAMPLERS,
    WEIGHTS,
    chain_for,
    ddim,
    epsilon,
    guided,
    ideal_denoiser,
    local_consistency,
    mean_only,
    mean_step,
    min_snr,
    mix_tasks,
    mixing_weights,
    naive,
    path,
    path_loss,
    published,
    stochastic,
    stochastic_step,
    uniform,
    vanilla,
    weight_for,
)

SITES, WIDTH = 8, 16
VISITED = 1e-9  # of ‖θ_M‖; found 1e-17 in float64, and 2e-3 … 5e-2 for the negative control


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(*shape, rng):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def trajectory(rng, tasks=1):
    """Three local targets that approach the last, as an optimiser's path does; (tasks, 3, site, width)."""
    final, first, second = randn(3, tasks, SITES, WIDTH, rng=rng)
    return torch.stack([0.5 * final + 0.5 * first, 0.8 * final + 0.3 * second, final], dim=1)


# --- the chain


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [3, 20, 60, 1000])
def test_schedule_limits(law, steps):
    chain = Chain(law, 3, steps)
    assert chain.abar.shape == (steps + 1,)
    assert chain.abar[-1] == 1
    assert chain.abar[0].sqrt() < 0.01  # noise at the start: under 1 % signal even in amplitude
    assert (chain.alpha > 0).all()
    assert (chain.alpha < 1).all()
    assert_close(chain.alpha.flip(0).cumprod(0).flip(0), chain.abar[:-1], rtol=1e-9, atol=0)


def test_vp_integrates_beta():
    beta = torch.linspace(0.1, 20, 2_000_001, dtype=torch.float64)
    assert_close(Chain("vp", 1, 20).abar[0], torch.exp(-beta.mean()), rtol=1e-9, atol=0)


def test_segments_of_the_method():
    chain = Chain("cosine", 3, 20)
    assert chain.ends.tolist() == [7, 13, 20]
    assert chain.segment(torch.tensor([0, 6, 7, 12, 13, 19])).tolist() == [1, 1, 2, 2, 3, 3]
    j, t = torch.tensor([2]), torch.tensor([5])
    assert_close(chain.abar_of(j, t), chain.alpha[5:13].prod()[None])
    assert chain.abar_of(j, torch.tensor([13])) == 1


def test_segment_ends_rise_for_every_k_and_T():
    for T in range(1, 40):
        for k in range(1, T + 1):
            ends = [0, *Chain("cosine", k, T).ends.tolist()]
            assert all(a < b for a, b in pairwise(ends)), (k, T)
            assert ends[-1] == T


def test_fewer_sampling_steps_keep_the_segment_ends():
    chain = Chain("cosine", 3, 20)
    assert chain.times() == list(range(21))
    for steps in range(3, 21):
        times = chain.times(steps)
        assert len(times) <= steps + 1
        assert {0, *chain.ends.tolist()} <= set(times)
    assert Chain("cosine", 1, 20).times(5) == [0, 4, 8, 12, 16, 20]
    with pytest.raises(ValueError, match="= 3 … 20, got 2"):
        chain.times(2)


def test_bad_chains_are_refused():
    with pytest.raises(ValueError, match=r"known laws are .*cosine"):
        Chain("linear", 3, 20)
    with pytest.raises(ValueError, match="k = 5, T = 4"):
        Chain("cosine", 5, 4)
    with pytest.raises(ValueError, match="k = 0"):
        Chain("cosine", 0, 4)
    with pytest.raises(ValueError, match="known losses"):
        chain_for("mse")
    with pytest.raises(ValueError, match="known weights"):
        weight_for("vanilla", "snr")


def test_only_local_consistency_has_segments():
    assert {name: chain_for(name, "vp", 4, 30).k for name in LOSSES} == {
        "vanilla": 1,
        "naive": 1,
        "local_consistency": 4,
    }


# --- parameterisation


@pytest.mark.parametrize("k", [1, 3])
def test_round_trips(k, rng):
    chain, t = Chain("cosine", k, 20), torch.arange(20)
    x, end, noise = randn(3, 20, SITES, WIDTH, rng=rng)
    back = end_from_residual(x, t, residual_from_end(x, t, end, chain), chain)
    assert_close(back, end, rtol=0, atol=1e-10)  # 1/√abar(0) = 400 times float64 rounding
    abar = chain.abar[t]
    assert_close(denoised(noised(end, noise, abar), noise, abar), end, rtol=0, atol=1e-10)


def test_mean_step_is_the_published_sampler(rng):
    chain = Chain("cosine", 3, 20)
    for t in range(20):
        x, end = randn(2, 4, SITES, WIDTH, rng=rng)
        f = residual_from_end(x, torch.full((4,), t), end, chain)
        alpha, abar = chain.alpha[t], chain.abar[t]
        literal = (x - (1 - alpha) / (1 - abar).sqrt() * f) / alpha.sqrt()
        # the literal form cancels at t = 0, where 1/√α = 32
        assert_close(mean_step(x, end, chain, t, t + 1), literal, rtol=0, atol=1e-11)


# --- losses


def literal_loss(predict, z, chain, drawn, rng_state, *, both_global=False):
    """METHOD.md's formula in ε, with the draws of `local_consistency` repeated from the same rng."""
    rng = torch.Generator()
    rng.set_state(rng_state)
    for _ in range(3):  # j, t and the noise factor come first
        torch.rand(len(z), generator=rng)
    z_j = z[torch.arange(len(z)), drawn.j - 1]
    noise = gaussian(tuple(z_j.shape), rng, z_j)
    abar_j, abar = (v.view(-1, 1, 1) for v in (chain.abar_of(drawn.j, drawn.t), chain.abar[drawn.t]))
    x = abar_j.sqrt() * z_j + (1 - abar_j).sqrt() * noise
    f = residual_from_end(x, drawn.t, predict(x, drawn.t), chain)
    scale = torch.ones_like(abar) if both_global else (1 - abar).sqrt()
    factor = torch.ones_like(abar) if both_global else (1 - abar_j).sqrt()
    return (factor * f - scale * noise).square().mean((1, 2))


def wobbly(x, t):
    return torch.sin(x) + 0.01 * t.view(-1, 1, 1)


def test_local_consistency_equals_its_formula(rng):
    chain, z = Chain("cosine", 3, 20), randn(500, 3, SITES, WIDTH, rng=rng)
    state = rng.get_state()
    drawn = local_consistency(wobbly, z, chain, rng, published)
    assert (chain.segment(drawn.t) < drawn.j).any()  # also the rows whose chain runs through earlier segments
    assert (drawn.t < chain.ends[drawn.j - 1]).all()
    expected = literal_loss(wobbly, z, chain, drawn, state)
    assert_close(drawn.value, expected, rtol=1e-8, atol=0)  # the ε form cancels √abar(0) = 1/400
    wrong = literal_loss(wobbly, z, chain, drawn, state, both_global=True)
    assert not torch.allclose(drawn.value, wrong, rtol=0.01)


def test_k_1_is_vanilla_up_to_one_minus_abar():
    chain, z = Chain("cosine", 1, 20), randn(200, 1, SITES, WIDTH, rng=torch.Generator().manual_seed(1))
    ours = local_consistency(wobbly, z, chain, torch.Generator().manual_seed(2), published)
    published_vanilla = weight_for("vanilla", "published")
    theirs = vanilla(wobbly, z, chain, torch.Generator().manual_seed(2), published_vanilla)
    assert ours.t.equal(theirs.t)
    assert_close(ours.value, (1 - chain.abar[ours.t]) * theirs.value, rtol=1e-12, atol=0)
    # and ours is vanilla's ‖f − ε‖² by the formula
    state = torch.Generator().manual_seed(2).get_state()
    assert_close(
        theirs.value, literal_loss(wobbly, z, chain, theirs, state, both_global=True), rtol=1e-8, atol=0
    )


def test_vanilla_sees_only_the_last_target_and_naive_all(rng):
    z = torch.arange(1.0, 4).view(1, 3, 1, 1).expand(3000, 3, 2, 2)
    chain = chain_for("vanilla")
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
    assert vanilla(zero, z, chain, rng).value.unique().tolist() == [9.0]
    drawn = naive(zero, z, chain, rng)
    assert drawn.value.equal(drawn.j.float() ** 2)
    counts = drawn.j.bincount()[1:]
    assert (counts - 1000).abs().max() < 150  # 6 standard deviations
    for loss in (vanilla, naive):
        with pytest.raises(ValueError, match=r"full chain, got k = 3"):
            loss(zero, z, Chain(), rng)
    with pytest.raises(ValueError, match="2 local targets, the chain k = 3"):
        local_consistency(zero, z[:, :2], Chain(), rng)


def test_draws_are_uniform_over_targets_and_times(rng):
    chain, z = Chain("cosine", 3, 6), torch.zeros(60_000, 3, 1, 1)
    drawn = local_consistency(lambda x, t: x, z, chain, rng)
    counts = torch.zeros(4, 6).index_put((drawn.j, drawn.t), torch.ones(60_000), accumulate=True)
    expected = torch.tensor([[0] * 6, [10_000] * 2 + [0] * 4, [5000] * 4 + [0] * 2, [20_000 / 6] * 6])
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_hand_computed_loss():
    """T = 2, k = 2, z = 2, F = 0: every row costs 4, but for those of chain 2 at t = 0."""
    chain, z = Chain("cosine", 2, 2), torch.full((400, 2, 1, 1), 2.0, dtype=torch.float64)
    seen = {}

    def predict(x, t):
        seen["x"] = x
        return torch.zeros_like(x)

    drawn = local_consistency(predict, z, chain, torch.Generator().manual_seed(0), uniform)
    middle = math.cos(math.acos(1 / 400) / 2) ** 2  # abar(1)
    here, whole = (1 / 400) ** 2 / middle, (1 / 400) ** 2  # abar_1(0), abar_2(0)
    for j, t, x, value in zip(drawn.j, drawn.t, seen["x"].flatten(), drawn.value, strict=True):
        if (int(j), int(t)) == (2, 0):  # the only row that crosses a segment
            noise = (x - math.sqrt(whole) * 2) / math.sqrt(1 - whole)
            f_star = (
                math.sqrt(1 - whole) / math.sqrt(1 - whole) * noise
            )  # √(1−abar)/√(1−abar_2), abar_2 = abar
            end = (x - (1 - here) / math.sqrt(1 - whole) * f_star) / math.sqrt(here)
            expected = (1 - whole) / (1 - here) * end**2
        else:
            expected = torch.tensor(4.0, dtype=torch.float64)
        assert_close(value, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_has_the_documented_weight(name, rng):
    chain, z = Chain("cosine", 3, 20), randn(300, 3, 2, 3, rng=rng)
    F = randn(300, 2, 3, rng=rng).requires_grad_()
    drawn = local_consistency(lambda x, t: F, z, chain, rng, WEIGHTS[name])
    (gradient,) = torch.autograd.grad(drawn.value.sum(), F)
    own = drawn.j == chain.segment(drawn.t)  # j = J(t): the weighted ‖z − F‖²
    abar, abar_j = chain.abar[drawn.t], chain.abar_of(drawn.j, drawn.t)
    expected = {
        "published": (1 - abar) * abar_j / (1 - abar_j),
        "uniform": torch.ones_like(abar),
        "min_snr": (abar_j / (1 - abar_j)).clamp(max=5),
        "epsilon": abar_j / (1 - abar_j),
    }[name]
    z_j = z[torch.arange(300), drawn.j - 1]
    by_hand = 2 / 6 * expected.view(-1, 1, 1) * (F - z_j)
    assert own.sum() > 100
    assert_close(gradient[own], by_hand[own], rtol=1e-9, atol=1e-12)


def test_weight_at_the_start_is_the_documented_one():
    chain = Chain("cosine", 3, 20)
    t = torch.tensor([0])
    weight = published(chain.abar[t], chain.abar_here(t))
    assert 5e-6 < weight < 5e-5  # METHOD.md: about 1e-5
    assert uniform(chain.abar[t], chain.abar_here(t)) == 1
    late = torch.tensor([19])
    assert min_snr(chain.abar[late], chain.abar_here(late)) == 5
    assert epsilon(chain.abar[late], chain.abar_here(late)) > 100


def test_lowered_noise(rng):
    chain, z, seen = Chain("cosine", 1, 20), torch.zeros(4000, 1, 8, 16), {}

    def predict(x, t):
        seen["deviation"] = x.flatten(1).std(1)
        return x

    t = local_consistency(predict, z, chain, rng, noise_floor=0.25).t
    factor = seen["deviation"] / (1 - chain.abar[t]).sqrt()
    assert 0.2 < factor.min() < 0.3
    assert 0.95 < factor.max() < 1.3  # a standard deviation over 128 numbers is known to 6 %
    assert abs(factor.mean() - 0.625) < 0.02
    local_consistency(predict, z, chain, rng)
    assert abs(float((seen["deviation"] / (1 - chain.abar[t]).sqrt()).median()) - 1) < 0.5


# --- the ideal denoiser, and the table


def literal_ideal(targets, chain, x, t, *, both_local=False):
    """METHOD.md's f*, one row, in ε; `both_local` is the negative control with abar_j in both places."""
    js = [j for j in range(1, chain.k + 1) if chain.ends[j - 1] > t]
    top, bottom, logits = [], [], []
    for j in js:
        abar_j = chain.abar_of(torch.tensor([j]), torch.tensor([t]))
        for z in targets[:, j - 1]:
            noise = (x - abar_j.sqrt() * z) / (1 - abar_j).sqrt()
            logits.append(
                -chain.ends[j - 1].log() - x.numel() / 2 * (1 - abar_j).log() - noise.square().sum() / 2
            )
            top.append((1 - abar_j if both_local else (1 - abar_j).sqrt()) * noise)
            bottom.append(1 - abar_j)
    p = torch.cat(logits).softmax(0).view(-1, 1, 1)
    scale = 1 if both_local else (1 - chain.abar[t]).sqrt()
    return scale * (p * torch.stack(top)).sum(0) / (p * torch.stack(bottom).view(-1, 1, 1)).sum(0)


def test_ideal_denoiser_is_the_closed_form(rng):
    chain, targets = Chain("cosine", 3, 20), 0.3 * trajectory(rng, tasks=4)
    predict = ideal_denoiser(targets, chain)
    t = torch.arange(20)
    x = noised(targets[:1, 0].expand(20, -1, -1), randn(20, SITES, WIDTH, rng=rng), chain.abar[t])
    f = residual_from_end(x, t, predict(x, t), chain)
    for row in range(20):
        assert_close(f[row], literal_ideal(targets, chain, x[row], row), rtol=0, atol=1e-9)


def test_the_ideal_denoiser_minimises_the_loss(rng):
    chain, targets = Chain("cosine", 3, 12), 0.4 * trajectory(rng, tasks=3)[..., :2, :2]
    ideal = ideal_denoiser(targets, chain)
    z = targets.repeat(20_000, 1, 1, 1)
    shift = randn(2, 2, rng=rng)

    def total(predict, weight):
        return local_consistency(predict, z, chain, torch.Generator().manual_seed(3), weight).value.mean()

    for weight in (published, uniform):  # a weight in t alone does not move the minimum
        best = total(ideal, weight)
        assert total(lambda x, t: ideal(x, t) + 0.05 * shift, weight) > best
        assert total(lambda x, t: ideal(x, t) - 0.05 * shift, weight) > best
        assert total(lambda x, t: 1.05 * ideal(x, t), weight) > best
        assert total(lambda x, t: 0.95 * ideal(x, t), weight) > best
        assert total(lambda x, t: ideal(x, t) + 0.02 * x, weight) > best
        assert total(lambda x, t: ideal(x, t) - 0.02 * x, weight) > best


def visits(states, z, chain):
    """Distance to local target j at its segment end, and of the last state to every target; unit ‖θ_M‖."""
    size = z[0, -1].norm()
    at_ends = [float((states[e][0] - z[0, j]).norm() / size) for j, e in enumerate(chain.ends.tolist())]
    return at_ends, [float((states[-1][0] - z[0, j]).norm() / size) for j in range(3)]


@pytest.mark.parametrize("T", [20, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_table_of_visits(T, seed):
    rng = torch.Generator().manual_seed(seed)
    z, start = trajectory(rng), randn(1, SITES, WIDTH, rng=rng)
    segments, full = Chain("cosine", 3, T), Chain("cosine", 1, T)
    ours = ideal_denoiser(z, segments)

    at_ends, at_last = visits(list(path(mean_step, ours, start, segments)), z, segments)
    assert max(at_ends) < VISITED

    at_ends, at_last = visits(
        list(path(mean_step, ideal_denoiser(z.flatten(0, 1)[:, None], full), start, full)), z, segments
    )
    assert min(at_ends) > 0.05  # naive misses every one
    assert min(at_last[:2]) < VISITED  # and ends at an earlier target

    at_ends, at_last = visits(
        list(path(mean_step, ideal_denoiser(z[:, -1:], full), start, full)), z, segments
    )
    assert at_last[2] < VISITED
    assert min(at_ends[:2]) > 0.15  # vanilla ends right, but not by way of the others

    noisy = list(path(stochastic_step, ours, start, segments, rng))
    at_ends, at_last = visits(noisy, z, segments)
    assert at_ends[2] < VISITED
    assert max(at_ends[:2]) > 0.05


@pytest.mark.parametrize("T", [20, 60])
def test_abar_j_in_both_places_does_not_visit(T, rng):
    z, start, chain = trajectory(rng), randn(1, SITES, WIDTH, rng=rng), Chain("cosine", 3, T)

    def states(both_local):
        x = start
        yield x
        for t in range(T):
            f = literal_ideal(z, chain, x[0], t, both_local=both_local)[None]
            x = (x - (1 - chain.alpha[t]) / (1 - chain.abar[t]).sqrt() * f) / chain.alpha[t].sqrt()
            yield x

    assert max(visits(list(states(False)), z, chain)[0]) < VISITED
    assert max(visits(list(states(True)), z, chain)[0][:2]) > 0.02


# --- samplers against diffusers


@pytest.fixture(params=LAWS)
def reference(request):
    """(our k = 1 chain, make(scheduler class)); diffusers counts its time down, so its τ is our T − 1 − t."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own imports
        import diffusers
    chain = Chain(request.param, 1, 20)

    def make(name, **options):
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=20,
            trained_betas=(1 - chain.alpha).flip(0).tolist(),
            prediction_type="sample",
            clip_sample=False,
            **options,
        )
        assert_close(scheduler.alphas_cumprod, chain.abar[:-1].flip(0).float(), rtol=1e-3, atol=0)
        scheduler.alphas_cumprod = chain.abar[:-1].flip(0)  # its float32 product is off by 1e-4 at α = 0.001
        return scheduler

    return chain, make


@pytest.mark.parametrize("steps", [20, 5])
def test_ddim_is_diffusers_ddim(reference, steps, rng):
    chain, make = reference
    scheduler = make("DDIMScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = start = randn(2, SITES, WIDTH, rng=rng)
    for tau in scheduler.timesteps:
        F = wobbly(x, torch.full((2,), 19 - int(tau)))
        x = scheduler.step(F, int(tau), x, eta=0.0).prev_sample
    assert_close(ddim(wobbly, start, chain, steps=steps), x, rtol=0, atol=1e-10)


def test_stochastic_is_diffusers_ddpm_step_for_step(reference, rng):
    chain, make = reference
    scheduler = make("DDPMScheduler", variance_type="fixed_small")
    start = randn(2, SITES, WIDTH, rng=rng)
    theirs, ours = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    states = list(path(stochastic_step, wobbly, start, chain, ours))
    x = start
    for t in range(20):
        F = wobbly(x, torch.full((2,), t))
        x = scheduler.step(F, 19 - t, x, generator=theirs).prev_sample
        assert_close(states[t + 1], x, rtol=0, atol=1e-9)  # diffusers clamps variances at 1e-20
    assert stochastic(wobbly, start, chain, torch.Generator().manual_seed(5)).equal(states[-1])


def test_mean_only_is_diffusers_ddpm_mean(reference, rng):
    chain, make = reference
    scheduler = make("DDPMScheduler", variance_type="fixed_small")
    x = randn(2, SITES, WIDTH, rng=rng)
    for t in range(20):
        F = wobbly(x, torch.full((2,), t))
        theirs = torch.Generator().manual_seed(t)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        variance = scheduler._get_variance(19 - t) if t < 19 else torch.zeros(())
        mean = scheduler.step(F, 19 - t, x, generator=theirs).prev_sample - variance.sqrt() * noise
        x = mean_step(x, F, chain, t, t + 1)
        assert_close(x, mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 3, 7])
def test_every_sampler_ends_at_the_networks_last_word(name, steps, rng):
    chain, start, words = Chain("vp", 3, 20), randn(2, SITES, WIDTH, rng=rng), []

    def predict(x, t):
        words.append(wobbly(x, t))
        return words[-1]

    assert_close(SAMPLERS[name](predict, start, chain, rng, steps=steps), words[-1], rtol=0, atol=1e-12)


def test_a_zero_network_generates_zero_exactly(rng):
    start = torch.randn(2, SITES, WIDTH, generator=rng)
    assert mean_only(lambda x, t: torch.zeros_like(x), start, Chain()).abs().max() == 0


def test_stochastic_without_rng_is_refused(rng):
    with pytest.raises(ValueError, match="pass rng"):
        stochastic(wobbly, randn(1, 2, 2, rng=rng), Chain())


# --- path loss, guidance, mixing


def test_path_loss_is_zero_for_the_truth_and_weighted(rng):
    z, start = trajectory(rng).expand(2, -1, -1, -1), randn(2, SITES, WIDTH, rng=rng)
    chain = Chain("cosine", 3, 20)

    def truth(x, t):
        return z[torch.arange(2), chain.segment(t) - 1]

    assert path_loss(truth, z, start, chain).abs().max() == 0
    losses = path_loss(lambda x, t: truth(x, t) + 1, z, start, chain, published)
    assert losses.shape == (2, 20)
    t = torch.arange(20)
    assert_close(losses[0], published(chain.abar[t], chain.abar_here(t)))  # the error is 1 everywhere


def test_path_loss_walks_the_mean_only_path_detached(rng):
    z, start, chain = randn(2, 3, SITES, WIDTH, rng=rng), randn(2, SITES, WIDTH, rng=rng), Chain("vp", 3, 9)
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def predict(x, t):
        return gain * x

    losses = path_loss(predict, z, start, chain)
    states = [x.detach() for x in path(mean_step, predict, start, chain)]
    by_hand = torch.zeros((), dtype=torch.float64)
    for t in range(9):  # every x_t a constant
        error = gain * states[t] - z[:, int(chain.segment(torch.tensor([t]))) - 1]
        assert_close(losses[:, t], error.square().mean((1, 2)))
        by_hand = by_hand + error.square().mean((1, 2)).sum()
    assert_close(*(torch.autograd.grad(v, gain)[0] for v in (losses.sum(), by_hand)))


def test_path_loss_of_the_full_chain_uses_the_last_target(rng):
    z, start = randn(2, 3, SITES, WIDTH, rng=rng), randn(2, SITES, WIDTH, rng=rng)
    assert path_loss(lambda x, t: z[:, -1], z, start, Chain("cosine", 1, 5)).abs().max() == 0


def test_guidance(rng):
    x, t = randn(2, SITES, WIDTH, rng=rng), torch.zeros(2, dtype=torch.long)
    c, n = (lambda x, t: 2 * x), (lambda x, t: -x)
    assert guided(c, n, 1.0)(x, t).equal(2 * x)
    assert guided(c, n, 0.0)(x, t).equal(-x)
    assert_close(guided(c, n, 2.0)(x, t), 5 * x)


def test_mixing_weights(rng):
    w = mixing_weights(6, rng, share=0.5, most=4)
    plain = (w == torch.eye(6)).all(1)
    assert_close(w.sum(1), torch.ones(6))
    joined = torch.cat([(mixing_weights(6, rng, 1.0, 4) != 0).sum(1) for _ in range(200)])
    assert set(joined.tolist()) == {2, 3, 4}
    energy = torch.cat([mixing_weights(6, rng, 1.0, 4).square().sum(1) for _ in range(2000)])
    assert abs(energy.mean() - 1) < 0.03
    shares = torch.cat([(mixing_weights(6, rng, 0.25).diagonal() == 1) for _ in range(1000)])
    assert abs(shares.float().mean() - 0.75) < 0.03
    assert plain.dtype == torch.bool
    assert mixing_weights(1, rng).tolist() == [[1.0]]
    assert mixing_weights(5, rng, share=0.0).equal(torch.eye(5))


def test_mixing_commutes_with_a_linear_law(rng):
    """Same weights on condition and adapter: if z is affine in c before, it is after."""
    c, law, offset = randn(8, 5, rng=rng), randn(5, 3, 2, 4, rng=rng), randn(3, 2, 4, rng=rng)
    z = torch.einsum("bc,cksw->bksw", c, law) + offset
    mixed_z, mixed_c = mix_tasks(z, c, rng, share=1.0)
    assert not torch.allclose(mixed_c, c)
    # the weights are drawn in float32, so they sum to 1 within 1e-7 and the offset shows that
    assert_close(mixed_z, torch.einsum("bc,cksw->bksw", mixed_c, law) + offset, rtol=0, atol=1e-5)


def test_same_seed_same_losses():
    z = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b, c = (
        local_consistency(wobbly, z, Chain(), torch.Generator().manual_seed(s)).value for s in (7, 7, 8)
    )
    assert a.equal(b)
    assert not a.equal(c)
