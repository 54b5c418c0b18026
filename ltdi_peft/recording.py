"""The engine of recording: which steps are kept, and one thread that writes them.

In: the live factors of a `PeftModel` under training.  Out: snapshots in a store.
Idea: the training thread only copies A and B; one other thread moves the copies off the device, checks and
writes them. Its errors are raised at the next step, or at the end; none is swallowed."""

import platform
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, no_type_check

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ltdi_peft.adapter import UnsupportedAdapterError, copy_of, live_factors, spec_of
from ltdi_peft.store import DTYPES, RunWriter, TrajectoryStore
from ltdi_peft.task import Task

# Snapshots waiting to be written. At the bound training waits, so a slow disk costs time and not memory.
MAX_WAITING = 4


KINDS = ("every", "log_spaced", "equal_parts")


@no_type_check  # what is passed is checked below, and refused by name
@dataclass(frozen=True)
class Schedule:
    """Which optimiser steps become snapshots. The last step always does, θ_0 is stored apart."""

    kind: Literal["every", "log_spaced", "equal_parts"]
    count: int
    first: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not all(isinstance(n, int) and n > 0 for n in (self.count, self.first)):
            raise ValueError(f"a schedule is of {list(KINDS)} and has positive whole numbers, got {self}.")

    @classmethod
    def every(cls, n: int) -> "Schedule":
        """Steps n, 2n, 3n, …"""
        return cls("every", n)

    @classmethod
    def log_spaced(cls, count: int, first: int = 1) -> "Schedule":
        """`count` steps from `first` to the last, each the same factor after the one before, rounded."""
        return cls("log_spaced", count, first)

    @classmethod
    def equal_parts(cls, k: int) -> "Schedule":
        """The ends of k equal parts of the planned steps: what k local targets want."""
        return cls("equal_parts", k)

    def keeps(self, step: int, planned_steps: int) -> bool:
        """Whether the snapshot after optimiser step `step` (1 = the first) is kept."""
        return step in kept_steps(self, planned_steps) or step == planned_steps


@lru_cache(maxsize=64)
def kept_steps(schedule: Schedule, planned_steps: int) -> frozenset[int]:
    """All steps that a schedule keeps in a run of `planned_steps`, the last included."""
    count, first, last = schedule.count, min(schedule.first, planned_steps), planned_steps
    if schedule.kind == "every":
        steps = set(range(count, last + 1, count))
    elif schedule.kind == "equal_parts":
        steps = {max(1, round(j * last / count)) for j in range(1, count + 1)}
    else:
        steps = {round(first * (last / first) ** (j / max(count - 1, 1))) for j in range(count)}
    return frozenset(steps | {last})


DEFAULT_SCHEDULE = Schedule.equal_parts(16)


@dataclass(frozen=True)
class AdapterCopy:
    """The factors after one step, still on the training device."""

    factors: dict[str, tuple[Tensor, Tensor]]
    ready: torch.cuda.Event | None  # the copy kernels may still be running when the next step begins


class Recording:
    """A run being recorded. Call `step` after every optimiser step."""

    def __init__(
        self,
        writer: RunWriter,
        live: dict[str, tuple[Tensor, Tensor]],
        schedule: Schedule,
        planned_steps: int,
    ) -> None:
        self.run_id = writer.run_id
        self.last_kept = writer.last_written  # step of the newest snapshot handed to the writing thread
        self._writer = writer
        self._live = live
        self._schedule = schedule
        self._planned_steps = planned_steps
        # Unlike a daemon thread, a pool finishes what it was given when the interpreter exits.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ltdi-snapshots")
        self._waiting: deque[Future[Path]] = deque()

    def wants(self, step: int) -> bool:
        """Whether the schedule keeps `step`. Raises here what went wrong while writing earlier ones."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        return self._schedule.keeps(step, self._planned_steps)

    def copy(self) -> AdapterCopy:
        """The weights of this moment. Copied on their own device, without waiting for it."""
        factors = {site: (a.detach().clone(), b.detach().clone()) for site, (a, b) in self._live.items()}
        ready = None
        if any(a.is_cuda for a, _ in factors.values()):
            ready = torch.cuda.Event()
            ready.record()
        return AdapterCopy(factors, ready)

    def keep(
        self, step: int, copy: AdapterCopy, loss: float | Tensor | None, learning_rate: float | None
    ) -> None:
        """Hand a copy to the writing thread; waits only if MAX_WAITING are already in line."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
        self._waiting.append(self._pool.submit(self._write, step, copy, loss, learning_rate))
        self.last_kept = step

    def _write(
        self, step: int, copy: AdapterCopy, loss: float | Tensor | None, learning_rate: float | None
    ) -> Path:
        if copy.ready is not None:
            copy.ready.synchronize()
        adapter = {
            site: (a.to("cpu", torch.float32).contiguous(), b.to("cpu", torch.float32).contiguous())
            for site, (a, b) in copy.factors.items()
        }
        return self._writer.write(step, adapter, None if loss is None else float(loss), learning_rate)

    def finish(self, last_step: int) -> None:
        """Wait for the writing thread and close the run at `last_step`; its snapshot must have been kept.

        Raises what went wrong while writing; the caller then calls `interrupt`.
        """
        self._pool.shutdown(wait=True)
        for future in self._waiting:
            future.result()
        if last_step:
            self._writer.finish(last_step, {"finished_at": now()})
        else:
            self._writer.interrupt("it ended before the first optimiser step")

    def interrupt(self, reason: str) -> list[str]:
        """Wait for the writing thread and mark the run as interrupted; what was finished stays readable.

        Returns what went wrong while writing, which `run.json` tells too.
        """
        self._pool.shutdown(wait=True)
        wait(self._waiting)
        failures = [str(error) for future in self._waiting if (error := future.exception())]
        self._writer.interrupt("; ".join([reason, *failures]))
        return failures

    def interrupt_for(self, error: BaseException) -> None:
        """`interrupt`, for an error that goes on: what else went wrong becomes notes of it."""
        try:
            lost = self.interrupt(f"{type(error).__name__}: {error}")
        except OSError as failed:
            error.add_note(f"run {self.run_id} could not be marked as interrupted: {failed}")
            return
        for text in lost:
            if text != str(error):
                error.add_note(f"a snapshot of run {self.run_id} was not written: {text}")


@dataclass(frozen=True)
class Recordable:
    """A model that can be recorded, and its factors, so that its modules are walked for them only once."""

    model: PeftModel
    live: dict[str, tuple[Tensor, Tensor]]  # of `live_factors`


@no_type_check  # what is passed is checked here, and refused by name
def require_plan(task: Task, schedule: Schedule, snapshot_dtype: str) -> None:
    """ValueError, before anything is trained, for what a recorder cannot use."""
    if not isinstance(task, Task):
        raise ValueError(f"task is {task!r}; expected ltdi_peft.Task(name, prompts=[…]).")
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is {schedule!r}; expected ltdi_peft.Schedule.equal_parts(16), or another."
        )
    if snapshot_dtype not in DTYPES:
        raise ValueError(f"snapshot_dtype is {snapshot_dtype!r}; known are {sorted(DTYPES)}.")


@dataclass(frozen=True)
class RunPlan:
    """What a recorder is told before the run: where to write what, about which task."""

    store: TrajectoryStore
    task: Task
    schedule: Schedule
    snapshot_dtype: str
    adapter_name: str
    keep_examples: bool

    def begin(self, found: Recordable, seed: int, planned_steps: int, about: dict[str, Any]) -> Recording:
        """Start a run; its θ_0 is the adapter as it is now."""
        writer = self.store.start_run(
            spec_of(found.model, self.adapter_name),
            self.task,
            seed=seed,
            start=copy_of(found.live),
            planned_steps=planned_steps,
            frozen=_untrained(found.live),
            dtype=self.snapshot_dtype,
            about={**about, "started_at": now(), "host": platform.node()},
            keep_examples=self.keep_examples,
        )
        return Recording(writer, found.live, self.schedule, planned_steps)

    def resume(
        self, found: Recordable, seed: int, planned_steps: int, from_step: int, about: dict[str, Any]
    ) -> Recording:
        """Go on after step `from_step` with the newest run of this task and seed and these `about` values."""
        runs = self.store.find_runs(self.task.name, seed, **about)
        if not runs:
            raise ValueError(
                f"training resumes at step {from_step}, but {self.store.path} holds no run of task "
                f"{self.task.name!r}, seed {seed}, {about}, so its start is unknown. Train from step 0, or "
                "without the recorder."
            )
        newest = max(runs, key=lambda run: run.about.get("started_at", ""))
        spec = spec_of(found.model, self.adapter_name)
        writer = self.store.resume_run(newest.run_id, from_step, spec=spec, planned_steps=planned_steps)
        return Recording(writer, found.live, self.schedule, planned_steps)


def _untrained(live: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    return tuple(
        f"{site}.lora_{kind}"
        for site, pair in live.items()
        for kind, weight in zip("AB", pair, strict=True)
        if not weight.requires_grad
    )


def require_recordable(model: nn.Module, adapter_name: str = "default") -> Recordable:
    """The `PeftModel` inside DDP and torch.compile, or UnsupportedAdapterError. Call it on every process.

    Refuses what `live_factors` refuses, and sharded training by name.
    """
    # Asked of the model: AcceleratorState forgets FSDP whenever it is constructed again (accelerate 1.15).
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedAdapterError(
            "recording under FSDP is not supported: every process holds only a shard of the adapter. "
            "Train with DDP, or DeepSpeed ZeRO-2 at most."
        )
    if not isinstance(model, PeftModel):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, PeftModel):
        raise UnsupportedAdapterError(
            f"only a PeftModel can be recorded, got {type(model).__name__}. Wrap the base model with "
            "peft.get_peft_model, or give the trainer a peft_config."
        )
    return Recordable(model, live_factors(model, adapter_name))


def now() -> str:
    """The time for `about`, in UTC; sorts as text."""
    return datetime.now(UTC).isoformat()
