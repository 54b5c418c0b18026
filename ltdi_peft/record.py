"""Record a fine-tune as it runs: a callback for Trainer and SFTTrainer, a context manager for bare loops.

In: a training run of a `PeftModel`.  Out: a trajectory in a store: θ_0, scheduled snapshots, the last step.
Idea: a snapshot is taken where the weights and the step number agree (`on_step_end`), and handed on when the
loss of its step is known. Steps are optimiser steps. Process zero writes, the others do nothing.
Source: the event order of transformers 5.23 `Trainer._run_epoch`, tried with gradient accumulation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ltdi_peft.recording import (
    DEFAULT_SCHEDULE,
    AdapterCopy,
    Recording,
    RunPlan,
    require_plan,
    require_recordable,
)
from ltdi_peft.recording import Schedule as Schedule
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task


class LoopRecording:
    """What `record` gives a bare loop. Only process zero holds a `Recording`."""

    def __init__(self, recording: Recording | None, first_step: int) -> None:
        self.steps = self._first = first_step  # optimiser steps so far
        self.recording = recording
        self._latest: tuple[float | Tensor | None, float | None] = (None, None)

    @property
    def run_id(self) -> str | None:
        """The run's name in the store; None on processes that do not write."""
        return self.recording.run_id if self.recording else None

    def step(self, loss: float | Tensor | None = None, learning_rate: float | None = None) -> None:
        """Call after every `optimizer.step()`, once per optimiser step under gradient accumulation.

        A tensor `loss` is only waited for by the writing thread, and only where a snapshot is kept.
        ValueError for one of several numbers.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"run {self.run_id}, step {self.steps + 1}: loss has shape {tuple(loss.shape)}; expected one "
                f"number, e.g. loss.mean()."
            )
        self.steps += 1
        self._latest = loss, learning_rate
        if self.recording is not None and self.recording.wants(self.steps):
            self.recording.keep(self.steps, self.recording.copy(), loss, learning_rate)

    def finish(self) -> None:
        """Keep the step that the loop really ended at, and close the run."""
        if self.recording is None:
            return
        if self.steps == self._first:
            warnings.warn(
                f"run {self.run_id}: run.step() was never called, so no step was recorded; call it after "
                f"every optimizer.step().",
                stacklevel=4,
            )
        if self.recording.last_kept != self.steps:
            self.recording.keep(self.steps, self.recording.copy(), *self._latest)
        self.recording.finish(self.steps)


@contextmanager
def record(
    model: nn.Module,
    store: TrajectoryStore | str | Path,
    task: Task,
    *,
    total_steps: int,
    seed: int = 0,
    schedule: Schedule = DEFAULT_SCHEDULE,
    snapshot_dtype: str = "float32",
    adapter_name: str = "default",
    keep_examples: bool = False,
    start_step: int = 0,
    about: dict[str, Any] | None = None,
) -> Iterator[LoopRecording]:
    """Record a bare PyTorch or Accelerate loop: `with record(…) as run: … optimizer.step(); run.step(loss)`.

    Call `run.step(loss, learning_rate)` after every optimiser step; both are optional, and a tensor `loss` is
    waited for only where a snapshot is kept. `run.run_id` is the run's name in the store. `store`, `task`,
    `schedule`, `snapshot_dtype` and `keep_examples` are those of `TrajectoryRecorder`.

    `total_steps` are the planned optimiser steps; a loop that leaves earlier ends the run there. With
    `start_step` > 0 the newest run of this task, seed and `about` goes on after that step. On an exception
    what was recorded is flushed and the run is marked "interrupted". `model` may be wrapped in DDP.
    """
    require_plan(task, schedule, snapshot_dtype)
    found = require_recordable(model, adapter_name)
    recording = None
    if _is_writer():
        opened = store if isinstance(store, TrajectoryStore) else TrajectoryStore(store)
        plan = RunPlan(opened, task, schedule, snapshot_dtype, adapter_name, keep_examples)
        if start_step:
            recording = plan.resume(found, seed, total_steps, start_step, about or {})
        else:
            recording = plan.begin(found, seed, total_steps, about or {})
    run = LoopRecording(recording, start_step)
    try:
        yield run
        run.finish()
    except BaseException as error:  # KeyboardInterrupt too: the run must not look as if it were still going
        if recording is not None:
            recording.interrupt_for(error)
        raise


def _is_writer() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


@dataclass(frozen=True)
class _Held:
    """A copy that waits: for the loss of its step, or for the run to end there."""

    step: int
    copy: AdapterCopy
    learning_rate: float | None


class TrajectoryRecorder(TrainerCallback):
    """Records every `train()` of a `transformers.Trainer` or TRL trainer into `store`.

    A snapshot's learning rate is that of the first parameter group in its step. Its loss is what Trainer
    logged last, at or before that step: the mean over `logging_steps` steps, None before the first log (more
    would mean to wait for the device in every step); with logging_steps=1 it is the loss of that very step.
    A `train()` from step 0 begins a new run, a resumed one goes on with its own: the newest of this task,
    seed and `output_dir`. A crashed run stays "recording" until this process trains again.
    """

    def __init__(
        self,
        store: TrajectoryStore | str | Path,
        *,
        task: Task,
        seed: int | None = None,
        schedule: Schedule = DEFAULT_SCHEDULE,
        snapshot_dtype: str = "float32",
        adapter_name: str = "default",
        keep_examples: bool = False,
    ) -> None:
        """`store`: a folder, begun on process zero where there is none. `task`: what is trained.

        `seed`: that of TrainingArguments unless given. `schedule`: which steps are kept, 16 equal parts
        unless given. `snapshot_dtype`: float32 (exact) or float16 (lossy). `keep_examples`: write the
        task's examples into the run, too. Raises ValueError for what is no task, no schedule or no such
        dtype; UnsupportedAdapterError, when training begins, for a model without adapters, sharded training
        (FSDP) and anything but plain LoRA.
        """
        require_plan(task, schedule, snapshot_dtype)
        self._store = store
        self._task = task
        self._seed = seed
        self._settings = (schedule, snapshot_dtype, adapter_name, keep_examples)
        self._forget_run()

    def _forget_run(self) -> None:
        self._recording: Recording | None = None
        self._held: _Held | None = None
        self._epoch_end: _Held | None = None
        self._loss: float | None = None
        self._learning_rate: float | None = None

    @property
    def run_id(self) -> str | None:
        """The run being recorded; None before, after, and on processes that do not write."""
        return self._recording.run_id if self._recording else None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Store θ_0, or go on with the run that this training resumes."""
        if self._recording is not None:
            self._recording.interrupt("train() was called again before it ended")
        self._forget_run()
        found = require_recordable(model, self._settings[2])
        if not state.is_world_process_zero:
            return
        store = self._store if isinstance(self._store, TrajectoryStore) else TrajectoryStore(self._store)
        plan = RunPlan(store, self._task, *self._settings)
        seed = args.seed if self._seed is None else self._seed
        about = {"output_dir": str(Path(args.output_dir or ".").resolve())}
        if state.global_step:
            self._recording = plan.resume(found, seed, state.max_steps, state.global_step, about)
        else:
            self._recording = plan.begin(found, seed, state.max_steps, about)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **kwargs: object,
    ) -> None:
        """Note the learning rate of this step, before the schedule moves on."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Copy the weights if the schedule keeps this step; they and `global_step` agree here."""
        self._release()
        if self._recording is None or not self._recording.wants(state.global_step):
            return
        self._held = self._hold(self._recording, state.global_step)
        if not control.should_log:
            self._release()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: object,
    ) -> None:
        """The loss of a held step comes right after it, if at all."""
        if "loss" in logs:
            self._loss = float(logs["loss"])
        self._release()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Every training ends with an epoch's end; later Trainer may put the best weights over the last."""
        self._release()
        if self._recording is not None and self._recording.last_kept < state.global_step:
            self._epoch_end = self._hold(self._recording, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep the last step, wherever training stopped, and close the run."""
        self._release()
        recording, last = self._recording, state.global_step
        if recording is None:
            return
        if recording.last_kept != last:
            ended = self._epoch_end
            self._held = ended if ended and ended.step == last else self._hold(recording, last)
            self._release()
        self._recording = None
        try:
            recording.finish(last)
        except BaseException as error:
            recording.interrupt_for(error)
            raise

    def _hold(self, recording: Recording, step: int) -> _Held:
        return _Held(step, recording.copy(), self._learning_rate)

    def _release(self) -> None:
        """Hand the held copy to the writing thread with the newest known loss."""
        if self._held is not None and self._recording is not None:
            rate = self._held.learning_rate
            rate = None if rate is None else float(rate)
            self._recording.keep(self._held.step, self._held.copy, self._loss, rate)
        self._held = None
