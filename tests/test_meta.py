"""REPTILE: by hand on a quadratic, one all-reduce, and φ as it was."""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from ltdi_peft.meta import ReptileConfig, reptile_step

CENTRES = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0], [-1.0, 4.0, 2.0], [0.5, 0.5, -6.0]]).double()


class Point(nn.Module):
    """φ in R³, whose loss for a unit is ½‖φ − centre‖²; with a frozen parameter and a counting buffer."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([0.3, -0.1, 0.7], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def loss(self, centre):
        self.calls += 1
        return (self.phi - centre).square().sum() / 2


def units_of(point, centres):
    return [partial(point.loss, centre) for centre in centres]


def test_hand_computed_on_a_quadratic():
    point, config = Point(), ReptileConfig(inner_steps=3, inner_learning_rate=0.1)
    before = point.phi.detach().clone()
    point.phi.grad = torch.full((3,), 99.0, dtype=torch.float64)  # an old gradient must not leak in
    losses = reptile_step(point, units_of(point, CENTRES), config)
    # three steps of η = 0.1 leave (1 − η)³ of the distance to the centre
    difference = (1 - 0.9**3) * (CENTRES - before)
    assert_close(point.phi.grad, -difference.mean(0), rtol=1e-12, atol=0)
    assert point.phi.equal(before)
    assert point.frozen.grad is None
    assert_close(
        losses[1],
        (before - CENTRES[1]).square().sum() / 2 * 0.81 ** torch.arange(3).double(),
        rtol=1e-12,
        atol=0,
    )
    torch.optim.SGD([point.phi], lr=0.5).step()  # plain SGD at ζ is φ + ζ·mean(φ_i − φ)
    assert_close(point.phi.detach(), before + 0.5 * difference.mean(0), rtol=1e-12, atol=0)


def network_and_units(count, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    rng = torch.Generator().manual_seed(seed)
    data = [torch.randn(6, 6, generator=rng, dtype=torch.float64) for _ in range(count)]

    def unit(d):
        return (network(d[:, :4]) - d[:, 4:]).square().mean()

    return network, [partial(unit, d) for d in data]


def test_one_inner_step_is_the_averaged_gradient_times_eta():
    network, units = network_and_units(5)
    network.eval()
    reptile_step(network, units, ReptileConfig(inner_steps=1, inner_learning_rate=0.01))
    pseudo = [p.grad.clone() for p in network.parameters()]
    plain = torch.autograd.grad(sum(unit() for unit in units) / 5, list(network.parameters()))
    for ours, gradient in zip(pseudo, plain, strict=True):
        assert_close(ours, 0.01 * gradient, rtol=0, atol=1e-15)  # φ_i − φ cancels digits of φ


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_and_buffers_come_back_bit_for_bit(optimizer):
    network, units = network_and_units(3)  # in training mode batch norm writes its buffers
    before = {k: v.clone() for k, v in network.state_dict().items()}
    config = ReptileConfig(inner_steps=2, inner_learning_rate=0.37, inner_optimizer=optimizer)
    reptile_step(network, units, config)
    assert all(v.equal(before[k]) for k, v in network.state_dict().items())
    units[1]()  # negative control: a forward pass alone does move the buffers
    assert not all(v.equal(before[k]) for k, v in network.state_dict().items())


def test_an_error_in_a_unit_leaves_the_weights():
    network, units = network_and_units(2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    calls = []

    def fails_in_its_second_step():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of data")
        return units[0]()

    with pytest.raises(RuntimeError, match="out of data"):
        reptile_step(network, [units[1], fails_in_its_second_step], ReptileConfig())
    assert all(v.equal(before[k]) for k, v in network.state_dict().items())


def test_adam_starts_afresh_for_every_unit():
    """Adam's first step is η·sign(gradient), so one step from each unit shows no memory of the other."""
    point = Point()
    config = ReptileConfig(inner_steps=1, inner_learning_rate=0.01, inner_optimizer="adam")
    before = point.phi.detach().clone()
    reptile_step(point, units_of(point, CENTRES), config)
    assert_close(point.phi.grad, 0.01 * (before - CENTRES).sign().mean(0), rtol=0, atol=1e-9)  # Adam's ε


def test_no_units_is_refused():
    with pytest.raises(ValueError, match="at least one unit"):
        reptile_step(Point(), [], ReptileConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"inner_learning_rate": 0.0}, "inner_learning_rate must be above 0"),
        ({"inner_optimizer": "lion"}, r"known are \['adam', 'sgd'\]"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ReptileConfig(**change)


# --- several processes (spawned ones import this file anew, so what they run is at its top level)


def _join(rank, world, meeting):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)


def _worker(rank, folder, shares):
    torch.set_num_threads(1)
    _join(rank, len(shares), folder / "meeting")
    calls, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    network, units = network_and_units(sum(shares))
    mine = units[sum(shares[:rank]) : sum(shares[: rank + 1])]
    reptile_step(network, mine, ReptileConfig(inner_steps=3, inner_learning_rate=0.05))
    found = {name: p.grad for name, p in network.named_parameters()} | {"calls": torch.tensor(calls)}
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
    end = time.monotonic() + 10  # the kernel lists a thread for a moment after it was joined
    while (left := _threads_of_gloo()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left, left  # they may abort the interpreter's end


def _threads_of_gloo():
    """None where not Linux. A thread may end, and its file go, while the files are read."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):
            names.append(file.read_text().strip())
    return [name for name in names if "gloo" in name]


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(2, 2), (1, 3), (0, 2)])
def test_two_processes_with_half_each_are_one_with_all(shares, tmp_path):
    torch.multiprocessing.spawn(_worker, (tmp_path, shares), nprocs=2)
    network, units = network_and_units(sum(shares))
    reptile_step(network, units, ReptileConfig(inner_steps=3, inner_learning_rate=0.05))
    size = sum(p.numel() for p in network.parameters())
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found["calls"].tolist() == [size + 1]  # one collective: all differences and the count
        for name, parameter in network.named_parameters():
            assert_close(found[name], parameter.grad, rtol=0, atol=1e-12)


@pytest.fixture
def world_of_one(tmp_path):
    _join(0, 1, tmp_path / "meeting")
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_refused_by_name(world_of_one):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    network = nn.Linear(4, 4)
    reptile_step(network, [lambda: network(torch.ones(1, 4)).sum()], ReptileConfig())  # plain: accepted
    network.weight = nn.Parameter(distribute_tensor(network.weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match=r"found weight \(DTensor\).*plain training"):
        reptile_step(network, [], ReptileConfig())


def test_ddp_is_refused_by_name(world_of_one):
    network = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"found DistributedDataParallel.*network\.module"):
        reptile_step(network, [], ReptileConfig())


def test_deepspeed_parameters_are_refused_by_name():
    network = nn.Linear(4, 4)
    network.weight.ds_id = 0  # what ZeRO-3 marks its partitioned parameters with
    with pytest.raises(ValueError, match=r"found weight \(DeepSpeed ZeRO-3\)"):
        reptile_step(network, [], ReptileConfig())
