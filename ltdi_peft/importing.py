"""Adapters that exist already → store: PEFT folders, Trainer checkpoints, a manifest, the Hub.

In: a source (sources.py).  Out: a finished run a trajectory in the store, a row a candidate in the report.
Idea: everything is checked before anything is written, and a run is written whole or not at all. An adapter
that brings no θ_0 starts at B = 0 with the A of its first snapshot: ΔW = 0, as PEFT starts. So adapters that
never shared a start do not seem to (gauge `canonical` takes them), and those with one frozen A do share it.
A run is known again by its task and the digests of its snapshots, wherever it came from."""

import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.recording import now
from ltdi_peft.sources import Candidate, Hub, Line, find_candidates, logged
from ltdi_peft.spec import (
    Adapter,
    AdapterSpec,
    BrokenAdapterError,
    SpecMismatchError,
    require_same_spec,
    site_norms,
)
from ltdi_peft.store import RunWriter, Trajectory, TrajectoryStore
from ltdi_peft.task import Task
from ltdi_peft.trajectory import flat

FITS, IMPORTED, THERE, UNFIT = "fits", "imported", "already there", "does not fit"
DIGESTS = "imported"  # the key of `about` in run.json: step → digest of its snapshot


@dataclass(frozen=True)
class Checked:
    """A candidate that was read, with what its files hold or why they are of no use."""

    candidate: Candidate
    spec: AdapterSpec | None = None
    digest: str = ""
    trouble: str = ""

    @property
    def step(self) -> int:
        """Optimiser step; 0 is the start."""
        return self.candidate.step or 0


@dataclass(frozen=True)
class Plan:
    """A run that can be written: its snapshots' folders by step, ascending."""

    task: Task
    spec: AdapterSpec
    folders: dict[int, Path]
    digests: dict[str, str]  # step, as JSON has it → digest
    path: str  # of the first snapshot, as it was named


@dataclass(frozen=True)
class Outcome:
    """What becomes of the candidates of one run."""

    status: str
    reason: str = ""
    run_id: str = ""  # in the store
    plan: Plan | None = None


def import_adapters(
    source: str | Path,
    store: TrajectoryStore | str | Path,
    *,
    task: str | None = None,
    prompts: str | Sequence[str] = (),
    domain: str = "general",
    base_model: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Import every plain LoRA of `source` that fits into the store; report on all of them.

    `source`: a PEFT folder; a folder of Trainer's checkpoint-* folders (one trajectory, in step order); a
    folder of such folders; a JSONL manifest of lines {"path", "task", "prompts", "domain", "step", "run"}; a
    Hub repository id (owner/name, or owner/name@revision) or collection slug. `task`, `prompts`, `domain`: of
    what is no manifest; the task is the folder's or repository's name unless given. `base_model`: the one
    model that all of them are for, where their configurations name it differently (a local path). `dry_run`:
    write nothing.

    Returns one row a candidate: path, task, step, run (its name in the store), status ("imported", in a dry
    run "fits"; "already there"; "does not fit") and reason. All runs of a store have one base model, the same
    sites and ranks: the store's own, or in an empty store those of the first adapter that can be read. A run
    is written whole or not at all. Raises FileNotFoundError or ValueError for a source without any adapter.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    own = Line(task=task or "", prompts=prompts, domain=domain)
    candidates = find_candidates(str(source), own, Hub(token, cache_dir))
    store = store.path if isinstance(store, TrajectoryStore) else store
    opened = TrajectoryStore(store) if (Path(store) / "store.json").is_file() else None
    known = opened.trajectories(finished_only=False) if opened else []
    groups = grouped(checked(candidates, known, base_model))
    outcomes = settled(groups, known)
    if not dry_run and any(one.plan for one in outcomes):
        opened = opened or TrajectoryStore(store)
        outcomes = [written(one, opened, known, base_model) for one in outcomes]
    pairs = zip(groups, outcomes, strict=True)
    rows = {id(one.candidate): row(one, outcome) for group, outcome in pairs for one in group}
    return [rows[id(candidate)] for candidate in candidates]


def row(one: Checked, outcome: Outcome) -> dict[str, Any]:
    """One candidate's line of the report."""
    candidate = one.candidate
    return {
        "path": candidate.path,
        "task": candidate.task.name if candidate.task else "",
        "step": candidate.step,
        "run": outcome.run_id,
        "status": outcome.status,
        "reason": " ".join((one.trouble or outcome.reason).split()),  # the Hub's errors have several lines
    }


# ---- reading, before anything is written


def checked(
    candidates: Sequence[Candidate], known: Sequence[Trajectory], base_model: str | None
) -> Iterator[Checked]:
    """Every candidate, read and compared with the store's runs, or with the first that can be read."""
    expected, which = (known[0].spec, f"run {known[0].run_id} of the store") if known else (None, "")
    for candidate in candidates:
        one = check(candidate, base_model)
        if one.spec and expected:
            try:
                require_same_spec(expected, one.spec, f"compared with {which}")
            except SpecMismatchError as error:
                one = replace(one, trouble=str(error))
        elif one.spec:
            expected, which = one.spec, candidate.path
        yield one


def check(candidate: Candidate, base_model: str | None) -> Checked:
    """Read an adapter and what Trainer logged; whatever is wrong with them comes before a missing prompt."""
    if candidate.folder is None:
        return Checked(candidate, trouble=candidate.trouble)
    try:
        spec, adapter = read(candidate.folder, base_model)
        logged(candidate.folder, candidate.step or 0)
        if candidate.step and not any(site_norms(spec, adapter).values()):
            raise BrokenAdapterError(f"{candidate.folder}: ΔW is zero at every site: it was never trained.")
    except (TypeError, AttributeError) as error:  # how LoraConfig meets a value that it did not write
        return Checked(candidate, trouble=f"its JSON has a value of another type than PEFT writes: {error}.")
    except (ValueError, OSError) as error:
        where = str(candidate.folder)  # the report has a column for it
        return Checked(candidate, trouble=str(error).removeprefix(where).lstrip("/: "))
    digest = hashlib.sha256(save(flat(adapter))).hexdigest()[:16]
    return Checked(candidate, spec, digest, candidate.trouble)


def read(folder: Path, base_model: str | None) -> tuple[AdapterSpec, Adapter]:
    """`load_adapter_folder` of an adapter that says which base model it is for, or is told."""
    spec, adapter = load_adapter_folder(folder)
    if not (base_model or spec.base_model):
        raise ValueError(f"{folder}: base_model_name_or_path is empty. Name the base model (base_model=).")
    return replace(spec, base_model=base_model or spec.base_model), adapter


# ---- runs


def grouped(found: Iterable[Checked]) -> list[list[Checked]]:
    """Candidates of one task and run together, by step; one whose task is unknown stands alone."""
    groups: dict[object, list[Checked]] = {}
    for one in found:
        task = one.candidate.task
        groups.setdefault((task.name, one.candidate.run) if task else id(one.candidate), []).append(one)
    return [sorted(group, key=lambda one: one.step) for group in groups.values()]


def settled(groups: Sequence[Sequence[Checked]], known: Sequence[Trajectory]) -> list[Outcome]:
    """What fits, and what the store, or an earlier run of the source, holds already."""
    # A run that a killed import left unfinished is not there yet: it is taken up again.
    there = [(run.run_id, run.task, run.about.get(DIGESTS, {})) for run in known if run.finished]
    outcomes = []
    for group in groups:
        try:
            plan = planned(group)
            name = held(plan, there)
        except ValueError as error:
            outcomes.append(Outcome(UNFIT, str(error)))
            continue
        if name:
            in_store = any(run.run_id == name for run in known)
            outcomes.append(
                Outcome(THERE, run_id=name) if in_store else Outcome(THERE, f"the same as {name}")
            )
        else:
            outcomes.append(Outcome(FITS, plan=plan))
            there.append((plan.path, plan.task, plan.digests))
    return outcomes


def planned(group: Sequence[Checked]) -> Plan:
    """The run of a group. ValueError unless every snapshot fits, has its own step, and one follows step 0."""
    for one in group:
        if one.trouble:
            raise ValueError(
                f"{one.candidate.path} of the same run does not fit; repair it, or move it away to import "
                f"the others."
            )
    steps = [one.step for one in group]
    if twice := [step for step in steps if steps.count(step) > 1]:
        raise ValueError(
            f"{steps.count(twice[0])} adapters of one run have step {twice[0]}: give each its `step`, or its "
            f"own `run` if they are not of one training."
        )
    if steps == [0]:
        raise ValueError("step 0 is the start of a run, and the run has no later step.")
    task, spec = group[0].candidate.task, group[0].spec
    if task is None or spec is None or any(one.candidate.task != task for one in group):
        raise ValueError("the snapshots of one run must have one task: the same prompts and domain.")
    folders = {one.step: one.candidate.folder for one in group if one.candidate.folder}
    digests = {str(one.step): one.digest for one in group}
    return Plan(task, spec, folders, digests, group[0].candidate.path)


def held(plan: Plan, there: Sequence[tuple[str, Task, dict[str, str]]]) -> str:
    """The run that is the same already, or "". ValueError for one that is so in part."""
    for name, task, digests in there:
        shared = digests.items() & plan.digests.items()
        if task.name != plan.task.name or not any(step != "0" for step, _ in shared):  # a start may be shared
            continue
        if digests != plan.digests:
            raise ValueError(
                f"run {name} has steps {', '.join(digests)} of it already, which are not all of its steps "
                f"now; move that run out of the store to import it anew."
            )
        if (task.prompts, task.domain) != (plan.task.prompts, plan.task.domain):
            raise ValueError(
                f"run {name} is the same with other prompts or another domain; move that run out of the "
                f"store to import it with these."
            )
        return name
    return ""


# ---- writing


def written(
    outcome: Outcome, store: TrajectoryStore, known: list[Trajectory], base_model: str | None
) -> Outcome:
    """Write the run if it fits, and add it to `known`. An error here (a full disk) leaves no run behind."""
    plan = outcome.plan
    if plan is None:
        return outcome
    writer = begun(plan, store, known, base_model)
    try:
        for step, place in plan.folders.items():
            if step > writer.last_written:  # θ_0 is no snapshot; what a killed import wrote is there
                writer.write(step, read(place, base_model)[1], *logged(place, step))
        writer.finish(max(plan.folders))
    except BaseException:
        shutil.rmtree(writer.path)
        raise
    known.append(store.trajectory(writer.run_id))
    return Outcome(IMPORTED, run_id=writer.run_id)


def begun(
    plan: Plan, store: TrajectoryStore, known: Sequence[Trajectory], base_model: str | None
) -> RunWriter:
    """A new run, or the one that a killed import of the same adapters left."""
    same_task = [run for run in known if run.task.name == plan.task.name]
    for run in same_task:
        if not run.finished and run.about.get(DIGESTS) == plan.digests:
            return store.resume_run(run.run_id, max((s.step for s in run.snapshots), default=0))
    taken = {run.seed for run in same_task}
    step, place = next(iter(plan.folders.items()))
    first = read(place, base_model)[1]
    return store.start_run(
        plan.spec,
        plan.task,
        seed=next(seed for seed in itertools.count() if seed not in taken),  # the training's own is unknown
        start=without_b(first) if step else first,
        planned_steps=max(plan.folders),
        about={DIGESTS: plan.digests, "imported_from": plan.path, "imported_at": now()},
    )


def without_b(adapter: Adapter) -> Adapter:
    """θ_0 of an adapter whose own is lost: B = 0, as PEFT starts, and the A that is known."""
    return {site: (a, torch.zeros_like(b)) for site, (a, b) in adapter.items()}
