"""Trajectories on disk: one folder a run, one safetensors file a snapshot, JSON beside them.

In: adapters with step, loss and learning rate, from any number of writing processes.  Out: `Trajectory`s,
readable up to the last finished snapshot whatever happened to the writer.
Layout: store.json {format_version} · starts/<hash>.safetensors, every θ_0 once · runs/<run_id>/run.json ·
runs/<run_id>/step-00000120.safetensors.
Idea: writers never share a run folder (mkdir is the lock), so a shared disk joins the stores of machines;
dates and hosts live only under "about" in run.json, everything else is the same bytes for the same run.
Files are not fsynced: a power cut (not a crash) may lose the last snapshots, never show half of one."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from ltdi_peft.adapter import Adapter, AdapterSpec, check_adapter, require_same_spec
from ltdi_peft.files import json_bytes, read_json, replace_file, replacing
from ltdi_peft.hub import download
from ltdi_peft.spec import all_finite, require_shape
from ltdi_peft.task import Task
from ltdi_peft.trajectory import (
    FINISHED,
    FORMAT_VERSION,
    factor_names,
    flat,
    read_factors,
    read_manifest,
    read_snapshot,
    require_version,
    run_row,
    snapshot_file,
    snapshot_header,
    step_of,
    task_table,
)
from ltdi_peft.trajectory import Snapshot as Snapshot
from ltdi_peft.trajectory import Trajectory as Trajectory

DTYPES = {"float32": torch.float32, "float16": torch.float16}
RECORDING, INTERRUPTED = "recording", "interrupted"


class RunWriter:
    """Writes one run. Made by `TrajectoryStore.start_run` and `resume_run`; owned by one process."""

    def __init__(self, store: "TrajectoryStore", manifest: dict[str, Any], last_step: int) -> None:
        self.run_id: str = manifest["run_id"]
        self.path = store.path / "runs" / self.run_id
        self.spec = AdapterSpec.from_dict(manifest["spec"])
        self.last_written = last_step  # step of the newest snapshot, 0 = none yet
        self._manifest = manifest
        self._frozen = read_factors(store.start_path(manifest), manifest["frozen"])
        self._write_manifest()

    @property
    def finished(self) -> bool:
        """Whether the run was closed at its last step."""
        return self._manifest["status"] == FINISHED

    def write(
        self, step: int, adapter: Adapter, loss: float | None = None, learning_rate: float | None = None
    ) -> Path:
        """Add a snapshot; steps must grow. ValueError names run, step and site of NaN or misfits."""
        where = f"run {self.run_id}, step {step}"
        if step <= self.last_written:
            raise ValueError(f"{where}: the last snapshot is at step {self.last_written}; steps must grow.")
        check_adapter(self.spec, adapter, where, require_shape)
        tensors = flat(adapter)
        for name, start in self._frozen.items():
            if not torch.equal(tensors.pop(name), start):
                check_adapter(self.spec, adapter, where)  # NaN differs from everything
                raise ValueError(
                    f"{where}: {name} is declared frozen but differs from the start. "
                    "Record without freezing it, or stop changing it."
                )
        dtype = DTYPES[self._manifest["dtype"]]
        tensors = {name: weight.to(dtype).contiguous() for name, weight in tensors.items()}
        for name, weight in tensors.items():
            if not all_finite(weight):
                check_adapter(self.spec, adapter, where)  # not finite before the cast: says so
                raise ValueError(f"{where}: {name} overflows {self._manifest['dtype']}; record in float32.")
        path = self.path / snapshot_file(step)
        with replacing(path) as partial:  # from the tensors' own memory: bytes would be two copies
            save_file(tensors, partial, metadata=snapshot_header(step, loss, learning_rate))
        self.last_written = step
        return path

    def finish(self, last_step: int, about: dict[str, Any] | None = None) -> None:
        """Close the run: progress is known from here on. Needs the snapshot of `last_step`."""
        if last_step < 1 or last_step != self.last_written:
            raise ValueError(
                f"run {self.run_id}: cannot finish at step {last_step}, the last snapshot is at step "
                f"{self.last_written}. Write the last step's snapshot first."
            )
        self._manifest["about"].update(about or {})
        self._manifest.update(status=FINISHED, last_step=last_step)
        self._write_manifest()

    def interrupt(self, reason: str) -> None:
        """Mark the run as ended before its last step, with the reason; what was written stays readable."""
        self._manifest["about"]["interrupted_by"] = reason
        self._manifest["status"] = INTERRUPTED
        self._write_manifest()

    def _write_manifest(self) -> None:
        replace_file(self.path / "run.json", json_bytes(self._manifest))


class TrajectoryStore:
    """A folder of runs. Many processes may write at once, each its own runs; readers need no lock."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Open the store at `path`, or begin one there.

        Raises FileNotFoundError with create=False where there is none, ValueError for a folder of other
        things or a store of an unknown format version.
        """
        self.path = Path(path)
        marker = self.path / "store.json"
        if not marker.is_file():
            if not create:
                raise FileNotFoundError(f"{self.path} is no trajectory store: {marker} does not exist.")
            self._refuse_other_folder(marker)
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(marker, json_bytes({"format_version": FORMAT_VERSION}))
        require_version(read_json(marker), marker)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> "TrajectoryStore":
        """The store of a dataset repository, in the Hub's cache: to be read; copy its folder to add runs."""
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        return cls(download(repo_id, repo_type="dataset", **options), create=False)

    def _refuse_other_folder(self, marker: Path) -> None:
        other = self.path.is_dir() and any(not p.name.endswith(".partial") for p in self.path.iterdir())
        if other and not marker.is_file():  # asked again: another writer may just have begun the store
            raise ValueError(
                f"{self.path} is not empty and has no store.json, so it is no trajectory store; "
                "choose another folder."
            )

    def start_run(
        self,
        spec: AdapterSpec,
        task: Task,
        *,
        seed: int,
        start: Adapter,
        planned_steps: int,
        frozen: tuple[str, ...] = (),
        dtype: str = "float32",
        about: dict[str, Any] | None = None,
        keep_examples: bool = False,
    ) -> RunWriter:
        """Begin a run from the adapter `start`: θ_0, float32, stored once for all runs that share it.

        `frozen` names factors ("<site>.lora_A") that stay what they are in θ_0 and are not stored again.
        """
        check_adapter(spec, start, f"start of a run for task {task.name!r}")
        if planned_steps < 1:
            raise ValueError(f"a run needs at least one planned step, got {planned_steps}.")
        if dtype not in DTYPES:
            raise ValueError(f"snapshot dtype is {dtype!r}; known are {sorted(DTYPES)}.")
        if unknown := sorted(set(frozen) - set(factor_names(spec))):
            raise ValueError(
                f"frozen factors {unknown} do not exist; names are like {factor_names(spec)[0]!r}."
            )
        data = save(flat(start))
        start_hash = hashlib.sha256(data).hexdigest()[:16]
        run_id = self._claim(f"{_slug(task.name)}-s{seed}")
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": run_id,
            "status": RECORDING,
            "task": task_table(task, keep_examples),
            "seed": seed,
            "start": start_hash,
            "frozen": sorted(frozen),
            "planned_steps": planned_steps,
            "last_step": None,
            "dtype": dtype,
            "spec": spec.to_dict(),
            "about": about or {},
        }
        if not self.start_path(manifest).exists():
            (self.path / "starts").mkdir(exist_ok=True)
            replace_file(self.start_path(manifest), data)
        return RunWriter(self, manifest, 0)

    def _claim(self, name: str) -> str:
        """A run folder that nobody else has: mkdir succeeds for one process only."""
        for number in range(1, 1_000_000):
            run_id = name if number == 1 else f"{name}-{number}"
            folder = self.path / "runs" / run_id
            folder.parent.mkdir(exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return run_id
        raise ValueError(f"{self.path} holds a million runs {name}.")

    def start_path(self, manifest: dict[str, Any]) -> Path:
        """Where the θ_0 of a run lies."""
        return self.path / "starts" / f"{manifest['start']}.safetensors"

    def resume_run(
        self,
        run_id: str,
        from_step: int,
        *,
        spec: AdapterSpec | None = None,
        planned_steps: int | None = None,
    ) -> RunWriter:
        """Go on with a run after optimiser step `from_step`.

        Snapshots of later steps belong to a future that will not happen: they are moved to superseded-<n>/
        inside the run, with a copy of the manifest, never deleted.
        """
        folder = self.path / "runs" / run_id
        manifest = read_manifest(folder)
        if spec is not None:
            require_same_spec(AdapterSpec.from_dict(manifest["spec"]), spec, str(folder))
        steps = {step_of(path): path for path in folder.glob("step-*.safetensors")}
        later = sorted(step for step in steps if step > from_step)
        if later:
            aside = _next_folder(folder)
            replace_file(aside / "run.json", json_bytes(manifest))
            for step in later:
                os.replace(steps[step], aside / steps[step].name)
        manifest.update(status=RECORDING, last_step=None)
        if planned_steps is not None:
            manifest["planned_steps"] = planned_steps
        return RunWriter(self, manifest, max((s for s in steps if s <= from_step), default=0))

    def trajectories(self, finished_only: bool = True) -> list[Trajectory]:
        """All runs, sorted by run id. Raises ValueError naming the file for one that cannot be read."""
        runs = [self.trajectory(run_id) for run_id in self._run_ids()]
        return [run for run in runs if run.finished or not finished_only]

    def _run_ids(self) -> list[str]:
        return sorted(path.parent.name for path in self.path.glob("runs/*/run.json"))

    def trajectory(self, run_id: str) -> Trajectory:
        """One run by its id, finished or not."""
        folder = self.path / "runs" / run_id
        manifest = read_manifest(folder)
        total = manifest["last_step"] or manifest["planned_steps"]
        paths = sorted(folder.glob("step-*.safetensors"), key=step_of)
        return Trajectory(
            run_id=run_id,
            spec=AdapterSpec.from_dict(manifest["spec"]),
            task=Task.from_dict(manifest["task"], str(folder / "run.json")),
            seed=manifest["seed"],
            status=manifest["status"],
            snapshots=tuple(read_snapshot(path, total) for path in paths),
            planned_steps=manifest["planned_steps"],
            frozen=tuple(manifest["frozen"]),
            about=manifest["about"],
            path=folder,
            start_path=self.start_path(manifest),
        )

    def find_runs(self, task_name: str, seed: int, **about: object) -> list[Trajectory]:
        """Runs of a task and seed, finished or not, whose `about` has these values; by run id."""
        return [
            self.trajectory(run_id)
            for run_id in self._run_ids()
            if _matches(read_manifest(self.path / "runs" / run_id), task_name, seed, about)
        ]

    def describe(self) -> list[dict[str, Any]]:
        """One row a run for `ltdi inspect`: run, task, seed, status, snapshots, last step and loss, bytes."""
        return [run_row(run) for run in self.trajectories(finished_only=False)]


def _matches(manifest: dict[str, Any], task_name: str, seed: int, about: dict[str, object]) -> bool:
    return (
        manifest["task"]["name"] == task_name
        and manifest["seed"] == seed
        and all(manifest["about"].get(key) == value for key, value in about.items())
    )


def _next_folder(folder: Path) -> Path:
    number = 1 + sum(1 for _ in folder.glob("superseded-*"))
    aside = folder / f"superseded-{number}"
    aside.mkdir()
    return aside


def _slug(name: str) -> str:
    """A name that is a folder name on every system; names without a Latin letter or digit become a hash."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-")
    return slug or "task-" + hashlib.sha256(name.encode()).hexdigest()[:8]
