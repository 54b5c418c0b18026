"""The denoiser: order, null condition, linearity, and the zero start."""

import pytest
import torch
from torch.testing import assert_close

from ltdi_peft.chain import Chain
from ltdi_peft.denoiser import Denoiser, DenoiserConfig, conditioned
from ltdi_peft.diffusion import SAMPLERS, guided, local_consistency

SIZES = {"sites": 5, "width": 6, "condition_width": 7, "hidden": 16}
BATCH = 4


def moved(config, seed=0):
    """A network whose every parameter has left its zero start, in float64."""
    torch.manual_seed(seed)
    network = Denoiser(config).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 5, 6, generator=rng, dtype=torch.float64)
    c = torch.randn(BATCH, 7, generator=rng, dtype=torch.float64)
    return x, torch.tensor([0, 3, 7, 19]), c


PATHS = pytest.mark.parametrize("paths", [(True, True), (True, False), (False, True)])


def config_of(paths, **more):
    return DenoiserConfig(**SIZES, linear=paths[0], nonlinear=paths[1], **more)


@PATHS
def test_untrained_is_exactly_zero(paths, inputs):
    torch.manual_seed(0)
    assert Denoiser(config_of(paths)).double()(*inputs).abs().max() == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_untrained_chain_ends_at_the_centre_exactly(name, inputs):
    network = Denoiser(config_of((True, True)))
    x, _, c = (v.float() if v.is_floating_point() else v for v in inputs)
    with torch.no_grad():
        z = SAMPLERS[name](conditioned(network, c), x, Chain(), torch.Generator().manual_seed(0))
    assert z.abs().max() == 0


@PATHS
def test_batch_order_in_is_batch_order_out(paths, inputs):
    network, order = moved(config_of(paths)), torch.tensor([2, 0, 3, 1])
    whole = network(*inputs)
    assert_close(network(*(v[order] for v in inputs)), whole[order], rtol=0, atol=1e-12)
    for row in range(BATCH):
        assert_close(network(*(v[row : row + 1] for v in inputs))[0], whole[row], rtol=0, atol=1e-12)


@PATHS
def test_dropped_is_the_null_condition(paths, inputs):
    network, (x, t, c) = moved(config_of(paths)), inputs
    dropped = torch.tensor([True, False, True, False])
    nulls = torch.where(dropped[:, None], network.null, c)
    assert network(x, t, c, dropped).equal(network(x, t, nulls))
    assert network(x, t, c, torch.zeros(BATCH, dtype=torch.bool)).equal(network(x, t, c))
    # and a dropped row knows nothing of its condition
    assert network(x, t, c, dropped)[dropped].equal(network(x, t, c + 1, dropped)[dropped])
    assert not torch.allclose(network(x, t, c, dropped)[~dropped], network(x, t, c + 1, dropped)[~dropped])


def test_guidance_joins_condition_and_null(inputs):
    network, (x, t, c) = moved(config_of((True, True))), inputs
    everyone = torch.ones(BATCH, dtype=torch.bool)
    both = guided(conditioned(network, c), conditioned(network, c, everyone), 2.5)
    null = network(x, t, c, everyone)
    assert_close(both(x, t), null + 2.5 * (network(x, t, c) - null))


@pytest.mark.parametrize("paths", [(True, False), (False, True), (True, True)])
def test_a_predictor_is_the_network_at_every_time(inputs, paths):
    network, (x, t, c) = moved(config_of(paths)), inputs
    dropped = torch.arange(BATCH) % 2 == 0
    predict = network.predictor(c, dropped)
    for step in range(3):
        assert predict(x + step, t + step).equal(network(x + step, t + step, c, dropped))


def affinity_error(network, x, t, c):
    """How far F(½(c + c')) is from the mean of F(c) and F(c')."""
    other = c.flip(0)
    middle = network(x, t, (c + other) / 2)
    return float((middle - (network(x, t, c) + network(x, t, other)) / 2).abs().max().detach())


def test_without_the_transformer_it_is_affine_in_the_condition(inputs):
    assert affinity_error(moved(config_of((True, False))), *inputs) < 1e-12
    assert affinity_error(moved(config_of((True, True))), *inputs) > 1e-3  # the negative control


def test_time_site_and_x_matter(inputs):
    network, (x, t, c) = moved(config_of((True, True))), inputs
    base = network(x, t, c)
    assert not torch.allclose(network(x, t + 1, c), base)
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.allclose(network(changed, t, c)[:, 4], base[:, 4])  # attention carries it over
    swapped = network(x.flip(1), t, c).flip(1)
    assert not torch.allclose(swapped, base)  # sites have their own bases


@PATHS
def test_every_parameter_learns(paths):
    """Overfits three plain tasks with a linear law, and leaves no parameter without a gradient."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    c, law = torch.randn(3, 7, generator=rng), torch.randn(7, 3, 5, 6, generator=rng) / 7**0.5
    z = torch.einsum("bc,cksw->bksw", c, law)
    network, chain = Denoiser(config_of(paths)), Chain("cosine", 3, 12)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-2)
    values = []
    for _ in range(150):
        dropped = torch.rand(24, generator=rng) < 0.2
        predict = conditioned(network, c.repeat(8, 1), dropped)
        loss = local_consistency(predict, z.repeat(8, 1, 1, 1), chain, rng).value.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) < 0.7 * sum(values[:10])
    assert [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0] == []


def test_dropout_is_off_in_eval(inputs):
    network = moved(config_of((True, True), dropout=0.5))
    assert not network(*inputs).equal(network(*inputs))
    network.eval()
    assert network(*inputs).equal(network(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 10}, r"hidden = 10 must be a multiple of heads = 4"),
        ({"linear": False, "nonlinear": False}, "turn one of them on"),
        ({"sites": 0}, r"denoiser\.sites must be at least 1, got 0"),
        ({"dropout": 1.0}, r"denoiser\.dropout must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**{**SIZES, **change})
