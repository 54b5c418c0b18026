"""Bytes on the wire of a gradient step: DDP and FSDP against REPTILE's one all-reduce a meta-step.

    python benchmarks/wire.py [--inner-steps 3] [--units 4]
    Expect: REPTILE sends 1/(inner steps · units a process) of DDP's bytes. 2 CPU processes, under a minute.

Measured with two gloo processes: what the loopback device counted, TCP's headers included, in a network
namespace of its own where that is allowed (else other programs' bytes are in it). On paper: a ring all-reduce
of n numbers over P processes sends 2 (P − 1) · 4 n bytes in all, in float32, and an all-gather or a
reduce-scatter half of that. FSDP gathers weights for the forward and again for the backward pass and scatters
gradients; gloo makes its reduce-scatter of an all-reduce, which the measured bytes show.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Result, parser_of, publish
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ltdi_peft.meta import ReptileConfig, reptile_step

WIDTH, LAYERS, STEPS = 256, 4, 10
PAPER = (2, 8, 64, 512)


def network() -> nn.Sequential:
    """A network of 263 thousand numbers; bytes do not depend on what it is."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def sharded() -> nn.Sequential:
    """The network under FSDP, each layer a unit of its own."""
    model, mesh = network(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sent() -> int:
    """Bytes that went over the loopback device since it is up."""
    (line,) = [x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def bytes_of(step: Callable[[], object]) -> float:
    """Of one call by all processes, mean of several; the first one sets connections up and is not counted."""
    step()
    dist.barrier()
    before = sent()
    for _ in range(STEPS):
        step()
    dist.barrier()
    return (sent() - before) / STEPS


def worker(rank: int, file: str, inner_steps: int, units: int, out: Path) -> None:
    """One of two processes; the first writes what both counted."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    plain, x = network(), torch.randn(4, WIDTH)
    wrapped, shards = nn.parallel.DistributedDataParallel(network()), sharded()
    config = ReptileConfig(inner_steps=inner_steps)

    def loss() -> torch.Tensor:
        return plain(x).square().mean()

    found = {
        "ddp": bytes_of(lambda: wrapped(x).square().mean().backward()),
        "fsdp": bytes_of(lambda: shards(x).square().mean().backward()),
        "reptile": bytes_of(lambda: reptile_step(plain, [loss] * units, config)),
        "nothing": bytes_of(lambda: None),
        "numbers": sum(p.numel() for p in plain.parameters()),
    }
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def counted(options: argparse.Namespace) -> dict[str, float]:
    """Start the two processes, in a namespace of their own if that is possible."""
    alone = os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        program = [sys.executable, __file__, "--worker", folder]
        program += ["--inner-steps", str(options.inner_steps), "--units", str(options.units)]
        if alone:
            program = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *program]
        # Gloo would look for the machine's address by its name, which a new namespace does not have.
        subprocess.run(program, check=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        return json.loads(out.read_text())


def measured(options: argparse.Namespace) -> Result:
    """Two processes measured, more on paper."""
    found, each = counted(options), options.inner_steps * options.units
    ddp, fsdp, reptile = (found[way] - found["nothing"] for way in ("ddp", "fsdp", "reptile"))
    reptile /= each
    rows = []
    for processes in PAPER:
        paper = 2 * (processes - 1) * 4 * found["numbers"]
        cells = [paper / 1e6, 1.5 * paper / 1e6, paper / each / 1e6]
        seen = [f"{size / 1e6:.3f}" if processes == 2 else "" for size in (ddp, fsdp, reptile)]
        ratio = f"{ddp / reptile:.2f} (paper {each})" if processes == 2 else f"{each}"
        rows.append((str(processes), *seen, *(f"{cell:.3f}" for cell in cells), ratio))
    title = (
        f"MB of all processes a gradient step and process, {found['numbers'] / 1e6:.2f} M float32 numbers, "
        f"{options.inner_steps} inner steps, {options.units} units a process"
    )
    ways = ("DDP", "FSDP", "REPTILE")
    columns = ("processes", *ways, *(f"{way}, paper" for way in ways), "DDP / REPTILE")
    return Result(title, columns, rows, found)


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure, print; with --worker be the two processes."""
    parser = parser_of(__doc__)
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--units", type=int, default=4, help="tasks that a process takes in a meta-step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        about = f"{options.worker}/meeting", options.inner_steps, options.units
        torch.multiprocessing.spawn(worker, (*about, Path(options.worker) / "bytes.json"), nprocs=2)
    else:
        publish(measured(options), options)


if __name__ == "__main__":
    main()
