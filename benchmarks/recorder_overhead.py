"""What recording costs: the same training loop with and without the recorder, in interleaved legs.

    python benchmarks/recorder_overhead.py                  2 CPU cores, about 90 s
    Expect: a snapshot every 10 steps of about 150 ms costs less than 1 % of the time, writes included.

One model and optimiser serve all legs, so that legs differ in the recorder only. A leg with the recorder
includes θ_0, every snapshot, and the wait for the writing thread. Legs are paired (plain, recorded),
the order alternates, and the overhead is the median over pairs of recorded / plain − 1: slow drift cancels.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ltdi_peft.record import Schedule, record
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task

TASK = Task("overhead", ("Measure the recorder.",))


def build(arguments: argparse.Namespace) -> PeftModel:
    """A random Llama of a step's desired cost, with LoRA r=8 on q_proj and v_proj."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def train_steps(
    model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, count: int
) -> Iterator[torch.Tensor]:
    """A bare loop: one loss after each optimiser step."""
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def leg_seconds(
    model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, steps: int, recorder: object
) -> float:
    """Wall time of one leg, recorder opened and closed inside it."""
    begun = time.perf_counter()
    with recorder as run:
        for loss in train_steps(model, optimizer, ids, steps):
            if run is not None:
                run.step(loss, 1e-4)
    return time.perf_counter() - begun


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[list[tuple[float, float]], int, int]:
    """(plain, recorded) seconds of every pair, bytes of a snapshot, number of snapshots in a leg."""
    model = build(arguments)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 2048, (arguments.batch, arguments.length))
    store = TrajectoryStore(folder)
    for _ in train_steps(model, optimizer, ids, 3):  # allocators and caches warm up
        pass
    pairs = []
    for index in range(arguments.pairs):
        recorders = [nullcontext(None), None]
        schedule = Schedule.every(arguments.every)
        recorders[1] = record(model, store, TASK, total_steps=arguments.steps, seed=index, schedule=schedule)
        seconds = {}
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            seconds[which] = leg_seconds(model, optimizer, ids, arguments.steps, recorders[which])
        pairs.append((seconds[0], seconds[1]))
    snapshots = store.trajectories()[0].snapshots
    return pairs, snapshots[0].path.stat().st_size, len(snapshots)


def print_table(
    arguments: argparse.Namespace, pairs: list[tuple[float, float]], size: int, count: int
) -> None:
    """One table: step time, overhead, bytes."""
    overheads = [100 * (recorded / plain - 1) for plain, recorded in pairs]
    plain = statistics.median(1000 * plain / arguments.steps for plain, _ in pairs)
    recorded = statistics.median(1000 * recorded / arguments.steps for _, recorded in pairs)
    print(f"| {arguments.pairs} pairs of {arguments.steps} steps, a snapshot every {arguments.every} | |")
    print("|---|---|")
    print(f"| step, plain (median) | {plain:.1f} ms |")
    print(f"| step, recorded (median) | {recorded:.1f} ms |")
    print(
        f"| overhead: median (lowest … highest pair) | {statistics.median(overheads):+.2f} % "
        f"({min(overheads):+.2f} … {max(overheads):+.2f}) |"
    )
    print(f"| a snapshot, snapshots a leg | {size:,} bytes, {count} |")


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a leg")
    parser.add_argument("--every", type=int, default=10, help="steps from snapshot to snapshot")
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=48, help="tokens of a row")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_table(arguments, *measure(arguments, (arguments.folder or Path(folder)) / "store"))


if __name__ == "__main__":
    main()
