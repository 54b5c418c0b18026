"""What recording costs, in the kinds of training that people do: with and without, and inside the recorder.

    python benchmarks/recorder_overhead.py [--settings trainer sft accelerate …]
    Expect: less than 1 % of the time in its calls in each. 1 CPU core (two_processes: 2), about 15 minutes.

Two measures. Pairs: the same training plain and recorded, in turn, the order alternating; the median over
pairs of recorded / plain − 1, in processor time of all threads, which other load on the machine disturbs
less than wall time, and still by more than 1 %. Inside: the wall time spent in the recorder's own calls (θ_0
and the wait for the last write included) as a share of the recorded training's wall time, and the processor
time of the writing thread as a share of its processor time; no noise of the training enters. What is paid
once a run, θ_0 and the last wait, is some 40 ms: with `--steps 20` it is most of what is measured.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainingArguments

from ltdi_peft.base import SMOLLM2, Base, load_base
from ltdi_peft.record import LoopRecording, Schedule, TrajectoryRecorder, record
from ltdi_peft.store import RunWriter, TrajectoryStore
from ltdi_peft.task import Task

SETTINGS = ("trainer", "sft", "accelerate", "checkpointing", "4bit", "two_processes")
COLUMNS = (
    "setting",
    "step, processor ms",
    "pairs, % (lowest … highest)",
    "in its calls, %",
    "writing thread, %",
    "snapshots",
)
TASK = Task("overhead", ("Measure the recorder.",))


@dataclass
class Clock:
    """Seconds inside the recorder: of its calls (wall), and of its writing thread (processor)."""

    calls: float = 0.0
    writing: float = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Add the block's wall time."""
        began = time.perf_counter()
        yield
        self.calls += time.perf_counter() - began


@dataclass
class Measured:
    """One setting: of each pair processor seconds (plain, recorded), and the shares inside the recorder."""

    steps: int
    pairs: list[tuple[float, float]] = field(default_factory=list)
    inside: list[tuple[float, float]] = field(default_factory=list)  # calls, writing thread
    snapshots: int = 0
    size: int = 0  # bytes of a snapshot


# Made anew for each leg, outside of its time; with a store the leg is recorded.
Leg = Callable[[TrajectoryStore | None, Clock], Callable[[], object]]


class TimedRecorder(TrajectoryRecorder):
    """The recorder with each of its events timed."""

    def __init__(self, store: TrajectoryStore, schedule: Schedule, clock: Clock) -> None:
        super().__init__(store, task=TASK, schedule=schedule)
        self.clock = clock


def timed_event(event: Callable[..., None]) -> Callable[..., None]:
    """A method of `TimedRecorder` that adds what `event` takes."""

    def method(self: TimedRecorder, *everything: object, **named: object) -> None:
        with self.clock.call():
            event(self, *everything, **named)

    return method


for event_name, event in vars(TrajectoryRecorder).items():
    if event_name.startswith("on_"):
        setattr(TimedRecorder, event_name, timed_event(event))


@contextmanager
def timed_writes(clock: Clock) -> Iterator[None]:
    """Within the block every snapshot's write adds its thread's processor time."""
    write = RunWriter.write

    def timed(self: RunWriter, *arguments: object) -> Path:
        began = time.thread_time()
        path = write(self, *arguments)
        clock.writing += time.thread_time() - began
        return path

    RunWriter.write = timed
    try:
        yield
    finally:
        RunWriter.write = write


# ---- the kinds of training


def build(known: argparse.Namespace) -> tuple[PeftModel, Base]:
    """The real model with LoRA r=8 on q_proj and v_proj."""
    torch.manual_seed(0)
    base = load_base(known.model, load_in_4bit=known.setting == "4bit")
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base.model, config), base


def rows(known: argparse.Namespace, base: Base) -> Dataset:
    """Random token ids, a batch a step for each process."""
    count = 2 * known.batch * known.steps
    ids = torch.randint(3, base.model.config.vocab_size, (count, known.length)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


def settings_of(known: argparse.Namespace, folder: Path) -> dict[str, object]:
    """What Trainer and SFTTrainer are told alike."""
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {
        "output_dir": str(folder / "out"),
        "max_steps": known.steps,
        "per_device_train_batch_size": known.batch,
        "logging_steps": known.every,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": False,  # else it prints its logs
        "gradient_checkpointing": known.setting == "checkpointing",
    } | (reentrant if known.setting == "checkpointing" else {})


def trainer_leg(known: argparse.Namespace, folder: Path) -> Leg:
    """Trainer or SFTTrainer; a new one for each leg, on one model."""
    model, base = build(known)
    data = rows(known, base)

    def make(callbacks: list[TrajectoryRecorder]) -> Trainer:
        about = settings_of(known, folder)
        if known.setting != "sft":
            more = {"ddp_backend": "gloo"} if known.setting == "two_processes" else {}
            arguments = TrainingArguments(**about, **more)
            return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        from trl import SFTConfig, SFTTrainer  # an optional dependency

        arguments = SFTConfig(**about, max_length=None)
        tokens = {"train_dataset": data, "processing_class": base.tokenizer}
        return SFTTrainer(model=model, args=arguments, callbacks=callbacks, **tokens)

    def leg(store: TrajectoryStore | None, clock: Clock) -> Callable[[], object]:
        schedule = Schedule.every(known.every)
        trainer = make([TimedRecorder(store, schedule, clock)] if store else [])
        trainer.remove_callback(ProgressCallback)
        return trainer.train

    return leg


def accelerate_leg(known: argparse.Namespace, folder: Path) -> Leg:
    """A bare loop on Accelerate."""
    accelerator = Accelerator(cpu=True)
    model, base = build(known)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = DataLoader(rows(known, base), batch_size=known.batch)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

    def loop(run: LoopRecording | None, clock: Clock) -> None:
        for _, batch in zip(range(known.steps), loader, strict=False):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if run is not None:
                with clock.call():
                    run.step(loss, 1e-4)

    def recorded(store: TrajectoryStore, clock: Clock) -> None:
        opened = record(model, store, TASK, total_steps=known.steps, schedule=Schedule.every(known.every))
        with clock.call():
            run = opened.__enter__()
        loop(run, clock)
        with clock.call():
            opened.__exit__(None, None, None)

    def leg(store: TrajectoryStore | None, clock: Clock) -> Callable[[], object]:
        return lambda: recorded(store, clock) if store else loop(None, clock)

    return leg


# ---- measuring


def measure(known: argparse.Namespace, folder: Path) -> Measured:
    """Pairs of legs of one setting in this process; in two processes each measures, the first reports."""
    make = accelerate_leg if known.setting == "accelerate" else trainer_leg
    leg, found = make(known, folder), Measured(known.steps)
    seconds(leg, None, f"{known.setting} warms up")
    for index in range(known.pairs):
        store, clock, taken = TrajectoryStore(folder / f"store-{index}"), Clock(), {}
        for with_it in (False, True) if index % 2 == 0 else (True, False):
            with timed_writes(clock):
                taken[with_it] = seconds(leg, store if with_it else None, known.setting, clock)
        (_, plain), (wall, recorded) = taken[False], taken[True]
        found.pairs.append((plain, recorded))
        found.inside.append((clock.calls / wall, clock.writing / recorded))
    if is_first():
        (run,) = store.trajectories()
        found.snapshots, found.size = len(run.snapshots), run.snapshots[0].path.stat().st_size
    return found


def seconds(
    leg: Leg, store: TrajectoryStore | None, name: str, clock: Clock | None = None
) -> tuple[float, float]:
    """Wall and processor time of one leg; said on stderr, so that a long benchmark shows where it is."""
    train = leg(store, clock or Clock())
    began = time.perf_counter(), time.process_time()
    train()
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    if is_first():
        kind = "recorded" if store else "plain"
        print(f"{name}: {kind} {wall:.1f} s, processor {processor:.1f} s", file=sys.stderr)
    return wall, processor


def is_first() -> bool:
    """Whether this is process zero, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def in_two_processes(known: argparse.Namespace, folder: Path) -> Measured:
    """`measure` under torchrun, one thread a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / "measured.json"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    options = [
        f"--{key}={vars(known)[key]}" for key in ("pairs", "steps", "every", "batch", "length", "model")
    ]
    worker = ["--settings", known.setting, "--worker", str(out), *options]
    subprocess.run([sys.executable, *launcher, __file__, *worker], check=True)
    return Measured(**json.loads(out.read_text()))


def table_row(name: str, found: Measured) -> str:
    """Step times, the pairs, and the two shares inside the recorder."""
    overheads = [100 * (recorded / plain - 1) for plain, recorded in found.pairs]
    step = statistics.median(1000 * plain / found.steps for plain, _ in found.pairs)
    shares = [statistics.median(100 * one[place] for one in found.inside) for place in (0, 1)]
    cells = [
        name,
        f"{step:.0f}",
        f"{statistics.median(overheads):+.2f} ({min(overheads):+.1f} … {max(overheads):+.1f})",
        f"{shares[0]:.2f}",
        f"{shares[1]:.2f}",
        f"{found.snapshots} × {found.size / 1e6:.1f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--model", default=SMOLLM2, help="Hub id or folder")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of a leg")
    parser.add_argument("--every", type=int, default=10, help="steps from snapshot to snapshot")
    parser.add_argument("--batch", type=int, default=1, help="rows a step and process")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if not known.worker:
        threads, tokens = torch.get_num_threads(), f"{known.batch} × {known.length} tokens"
        print(f"{known.model}, {threads} thread(s), {tokens} a step and process,")
        print(f"{known.pairs} pairs of {known.steps} steps, a snapshot every {known.every}\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for setting in known.settings:
        known.setting = setting
        with tempfile.TemporaryDirectory() as folder:
            alone = setting != "two_processes" or known.worker
            found = (measure if alone else in_two_processes)(known, Path(folder))
        if not known.worker:
            print(table_row(setting, found), flush=True)
        elif is_first():
            known.worker.write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
