"""One recorded run: its snapshots, and the file format that the store writes and reads.

In: files of a run folder.  Out: `Trajectory`, whose adapters are memory-mapped and read one at a time.
Idea: a reader sees a finished file or no file (written beside, then renamed), and equal content gives equal
bytes. A snapshot holds "<site>.lora_A", "<site>.lora_B" and one metadata entry: step, loss, learning rate."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltdi_peft.adapter import Adapter, AdapterSpec, SpecMismatchError, check_adapter
from ltdi_peft.files import read_header, read_json
from ltdi_peft.spec import Factors, require_fit
from ltdi_peft.task import Task

FORMAT_VERSION = 1
FINISHED = "finished"
HEADER = "ltdi"  # one metadata entry: safetensors writes several in random order


@dataclass(frozen=True)
class Snapshot:
    """One recorded optimiser step. `loss` and `learning_rate` are those of that step, None if unknown."""

    step: int
    progress: float  # step / last step, in (0, 1]; of an unfinished run step / planned steps
    loss: float | None
    learning_rate: float | None
    path: Path


@dataclass(frozen=True)
class Trajectory:
    """One run: its start θ_0 and its snapshots in step order (θ_0 is not among them)."""

    run_id: str
    spec: AdapterSpec
    task: Task  # name, prompts, domain, family; examples only where the writer was asked to keep them
    seed: int
    status: str  # "recording", "finished" or "interrupted"
    snapshots: tuple[Snapshot, ...]
    planned_steps: int
    frozen: tuple[str, ...]  # factors that never move ("<site>.lora_A"): stored in θ_0 only
    about: dict[str, Any]  # what may differ between equal runs: date, host, folder
    path: Path
    start_path: Path

    @property
    def finished(self) -> bool:
        """Whether the run reached its end, so that progress is known."""
        return self.status == FINISHED

    def start(self) -> Adapter:
        """θ_0, the adapter before the first optimiser step."""
        return _pairs(read_factors(self.start_path, factor_names(self.spec)), self.spec, self.start_path)

    def adapter(self, snapshot: Snapshot) -> Adapter:
        """The adapter at a snapshot; frozen factors come from θ_0."""
        moving = read_factors(
            snapshot.path, [name for name in factor_names(self.spec) if name not in self.frozen]
        )
        frozen = read_factors(self.start_path, list(self.frozen)) if self.frozen else {}
        return _pairs({**moving, **frozen}, self.spec, snapshot.path)

    def mapped(self, snapshot: Snapshot) -> "StoredAdapter":
        """`adapter`, of which a site is read and checked when it is asked for."""
        return StoredAdapter(self, snapshot)

    def local_targets(self, k: int) -> tuple[Snapshot, ...]:
        """The k snapshots nearest to progress 1/k, 2/k, …, 1 (METHOD.md §2); of two as near, the earlier.

        Raises ValueError where two targets would fall on one snapshot: recorded too coarsely for this k.
        """
        if k < 1:
            raise ValueError(f"the number of local targets must be at least 1, got {k}.")
        targets = [
            min(self.snapshots, key=lambda s: (abs(s.progress - j / k), s.step), default=None)
            for j in range(1, k + 1)
        ]
        found = tuple(t for t in targets if t is not None)
        if len({t.step for t in found}) != k:
            raise ValueError(
                f"{self.path}: {len(self.snapshots)} snapshots at progress "
                f"{[round(s.progress, 3) for s in self.snapshots]} do not give {k} different local targets. "
                f"Record with Schedule.equal_parts({k}) or finer, or use fewer local targets."
            )
        return found


class StoredAdapter(Mapping[str, Factors]):
    """The adapter of a snapshot in its file: a pass that needs some sites reads those alone.

    Nothing is held but the open files. Raises ValueError that names the file: at once for one that is missing
    or truncated; for a factor that is missing, mis-shaped or not finite when its site is asked for.
    """

    def __init__(self, run: Trajectory, snapshot: Snapshot) -> None:
        moving = snapshot.path, _opened(snapshot.path)
        start = (run.start_path, _opened(run.start_path)) if run.frozen else moving
        self._files = {name: start if name in run.frozen else moving for name in factor_names(run.spec)}
        self._sites = {site.name: site for site in run.spec.sites}

    def __getitem__(self, name: str) -> Factors:
        site = self._sites[name]
        return self._factor(name, "A", (site.rank, site.fan_in)), self._factor(
            name, "B", (site.fan_out, site.rank)
        )

    def _factor(self, site: str, kind: str, shape: tuple[int, int]) -> Tensor:
        name = f"{site}.lora_{kind}"
        path, reader = self._files[name]
        try:
            weight = reader.get_tensor(name).to(torch.float32)
        except SafetensorError as error:
            raise ValueError(f"{path}: {name} is missing ({error}).") from error
        require_fit(weight, shape, f"{path}: site {site}, lora_{kind}")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def run_row(run: Trajectory) -> dict[str, Any]:
    """A run in one line of a table."""
    last = run.snapshots[-1] if run.snapshots else None
    return {
        "run": run.run_id,
        "task": run.task.name,
        "seed": run.seed,
        "status": run.status,
        "snapshots": len(run.snapshots),
        "last_step": last.step if last else 0,
        "last_loss": last.loss if last else None,
        "bytes": sum(snapshot.path.stat().st_size for snapshot in run.snapshots),
    }


def recorded_adapter(runs: Sequence[Trajectory], base_model: str) -> tuple[AdapterSpec, Adapter]:
    """What the runs sit on, and an adapter without effect: A of the first run's θ_0, B = 0.

    ValueError for no run, SpecMismatchError for runs on another model than `base_model`.
    """
    if not runs:
        raise ValueError("collect.start 'recorded' takes the LoRA of finished runs, and there are none.")
    first = runs[0]
    if first.spec.base_model != base_model:
        raise SpecMismatchError(
            f"{first.path} was recorded on base model {first.spec.base_model!r}, the recipe names "
            f"{base_model!r}. Set base.model to the first."
        )
    return first.spec, {site: (a, torch.zeros_like(b)) for site, (a, b) in first.start().items()}


def factor_names(spec: AdapterSpec) -> list[str]:
    """The "<site>.lora_A", "<site>.lora_B" of every site, in token order."""
    return [f"{site.name}.lora_{kind}" for site in spec.sites for kind in "AB"]


def flat(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter under its factor names."""
    return {
        f"{site}.lora_{kind}": weight.contiguous()
        for site, pair in sorted(adapter.items())
        for kind, weight in zip("AB", pair, strict=True)
    }


def unflat(tensors: Mapping[str, Tensor], spec: AdapterSpec) -> Adapter:
    """The inverse of `flat`."""
    return {s.name: (tensors[f"{s.name}.lora_A"], tensors[f"{s.name}.lora_B"]) for s in spec.sites}


def paired(tensors: Mapping[str, Tensor]) -> Adapter:
    """The inverse of `flat` where no spec says which sites there are. KeyError for half a pair."""
    sites = sorted({name.rsplit(".", 1)[0] for name in tensors})
    return {site: (tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"]) for site in sites}


def _pairs(tensors: dict[str, Tensor], spec: AdapterSpec, path: Path) -> Adapter:
    adapter = unflat(tensors, spec)
    check_adapter(spec, adapter, str(path))
    return adapter


def read_factors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, memory-mapped, as float32."""
    with _opened(path) as reader:
        if missing := sorted(set(names) - set(reader.keys())):
            raise ValueError(f"{path}: {len(missing)} factors are missing, first {missing[0]}.")
        return {name: reader.get_tensor(name).to(torch.float32) for name in names}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing or truncated ({error}). Move it away; the others stay readable."
        ) from error


def read_snapshot(path: Path, total_steps: int) -> Snapshot:
    """The header of a snapshot file, without its weights."""
    try:
        header = read_header(path, HEADER)
        step = header["step"]
        return Snapshot(step, step / total_steps, header["loss"], header["learning_rate"], path)
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or no snapshot ({error}). Move it away; the others stay readable."
        ) from error


def snapshot_header(step: int, loss: float | None, learning_rate: float | None) -> dict[str, str]:
    """The metadata of a snapshot file."""
    return {HEADER: json.dumps({"step": step, "loss": loss, "learning_rate": learning_rate})}


def snapshot_file(step: int) -> str:
    """The file of a snapshot; names sort by step."""
    return f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The inverse of `snapshot_file`."""
    return int(path.stem.removeprefix("step-"))


def require_version(table: dict[str, Any], path: Path) -> None:
    """Refuse a file of a format that this version does not know."""
    version = table.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this ltdi_peft reads {FORMAT_VERSION}. "
            "Upgrade ltdi_peft, or read the store with the version that wrote it."
        )


def task_table(task: Task, keep_examples: bool) -> dict[str, Any]:
    """The entry `task` of a manifest."""
    table = task.to_dict()
    kept = set(table) if keep_examples else {"name", "prompts", "domain", "family", "evaluation_prompts"}
    return {key: value for key, value in table.items() if key in kept}


def read_manifest(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder; ValueError where there is none, or one of another format version."""
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: no run {folder.name!r} in this store.")
    manifest = read_json(path)
    require_version(manifest, path)
    return manifest
