"""Where adapters are found: folders, trees of Trainer checkpoints, manifests, the Hub.

In: a folder, a JSONL manifest, a Hub repository id or collection slug.  Out: `Candidate`s, one an adapter.
Idea: every source becomes manifest lines, and a line becomes candidates in one place. What is wrong with one
line or one repository is that candidate's `trouble`; only a source that is nothing at all raises.
From the Hub come adapter weights in safetensors and their JSON, no other file."""

import filecmp
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CollectionItem, get_collection, snapshot_download
from huggingface_hub.errors import HFValidationError

from ltdi_peft.adapter import CONFIG_FILE, WEIGHTS_FILE
from ltdi_peft.base import hub_reachable
from ltdi_peft.files import read_json
from ltdi_peft.strict import as_number, build
from ltdi_peft.suite.splits import json_object
from ltdi_peft.task import Task

STATE_FILE = "trainer_state.json"  # Trainer's, beside the adapter of a checkpoint
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # owner/name, or owner/name@revision
COLLECTION = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Line:
    """One line of a manifest. Lines of one task and run are one trajectory, in step order."""

    path: str = ""  # a folder, relative to the manifest, or a Hub repository id
    task: str = ""
    prompts: tuple[str, ...] = ()
    domain: str = "general"
    step: int | None = None  # optimiser steps; 0 = the adapter before the first
    run: str = ""


@dataclass(frozen=True)
class Hub:
    """How to ask the Hub."""

    token: str | None = None
    cache_dir: str | Path | None = None


@dataclass(frozen=True)
class Candidate:
    """An adapter that might become the snapshot of a run, or why it cannot."""

    path: str  # to show: the folder as it was named, the repository at its commit, or the manifest's line
    run: str = ""
    step: int | None = None
    task: Task | None = None  # None: see the trouble
    folder: Path | None = None
    trouble: str = ""  # with a folder: what else is missing, if its files are sound


def find_candidates(source: str, own: Line, hub: Hub) -> list[Candidate]:
    """All adapters of a source; `own` has the task and prompts of a source that is no manifest.

    Raises FileNotFoundError for a source that does not exist, ValueError for one without any adapter, or
    with prompts that would be those of several tasks.
    """
    if Path(source).is_file():
        if Path(source).suffix != ".jsonl":
            raise ValueError(f"{source} is no .jsonl manifest; of a single adapter, name its folder.")
        if own.task or own.prompts:
            raise ValueError(f"{source} is a manifest: its lines name task and prompts, so give neither.")
        return from_manifest(Path(source), hub)
    if COLLECTION.fullmatch(source) and not Path(source).is_dir():
        return from_collection(source, own, hub)
    folder, shown = located(source, Path(), hub)
    named = Path(source).resolve() if Path(source).is_dir() else Path(source.partition("@")[0])
    return from_folder(folder, shown, named.name, own)


def from_manifest(file: Path, hub: Hub) -> list[Candidate]:
    """The candidates of every line; blank lines are skipped."""
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            where = f"{file.name}:{number}"
            try:
                found += from_line(build(Line, json_object(text, where), where), file.parent, hub)
            except ValueError as error:
                found.append(Candidate(where, trouble=str(error)))
    if not found:
        raise ValueError(f'{file} is empty; a line is {{"path": …, "task": …, "prompts": […]}}.')
    return found


def from_line(line: Line, root: Path, hub: Hub) -> list[Candidate]:
    """The candidates of one line; of a path that cannot be had, one with the reason."""
    try:
        folder, shown = located(line.path, root, hub)
    except OSError as error:
        return [Candidate(line.path, line.run, line.step, trouble=str(error))]
    return snapshots(line, folder, shown)


def from_folder(folder: Path, shown: str, name: str, own: Line) -> list[Candidate]:
    """The runs in or below the folder `name`: of `own`'s task, or each of one named after its folder."""
    places = run_folders(folder)
    if not places:
        raise ValueError(f"{shown} holds no adapter: neither in it nor below it is any {CONFIG_FILE}.")
    require_one_task(own, len(places), shown)
    found = []
    for place in places:
        below = place.relative_to(folder).as_posix()
        label = shown if place == folder else f"{shown}/{below}"
        task = own.task or (name if place == folder else place.name)
        found += snapshots(replace(own, task=task, run=label), place, label)
    return found


def run_folders(root: Path) -> list[Path]:
    """Folders that hold an adapter, or checkpoint-* folders of one; sorted."""
    holders = {file.parent for name in (CONFIG_FILE, "adapter_model.*") for file in root.rglob(name)}
    inner = {folder for folder in holders if folder != root and CHECKPOINT.fullmatch(folder.name)}
    return sorted((holders - inner) | {folder.parent for folder in inner})


def from_collection(slug: str, own: Line, hub: Hub) -> list[Candidate]:
    """One run for each item of a Hub collection; its note is the task prompt, unless `own` has prompts."""
    if not hub_reachable():
        raise OSError(f"collection {slug!r} can only be read from the Hub, which does not answer or is off.")
    try:
        items = get_collection(slug, token=hub.token).items
    except OSError as error:
        raise FileNotFoundError(f"no collection {slug!r} on the Hub: {error}") from error
    if not items:
        raise ValueError(f"collection {slug!r} is empty.")
    require_one_task(own, len(items), slug)
    return [candidate for item in items for candidate in from_item(item, own, hub)]


def from_item(item: CollectionItem, own: Line, hub: Hub) -> list[Candidate]:
    """The candidates of one item of a collection."""
    name, run = item.item_id.rpartition("/")[2], item.item_id
    if item.item_type != "model":
        return [Candidate(run, run, trouble=f"{run} is a {item.item_type}, not an adapter.")]
    prompts = own.prompts or ((item.note,) if item.note else ())
    return from_line(replace(own, path=run, task=own.task or name, prompts=prompts, run=run), Path(), hub)


def require_one_task(own: Line, runs: int, shown: str) -> None:
    """ValueError when prompts would be given to several tasks."""
    if own.prompts and not own.task and runs > 1:
        raise ValueError(
            f"{shown} holds {runs} runs, and prompts belong to one task: name it if all are of one task, "
            f"else list them in a JSONL manifest, each line with its own task and prompts."
        )


def snapshots(line: Line, folder: Path, shown: str) -> list[Candidate]:
    """The adapter in a folder, or the checkpoints of a run by step, with what the line leaves open."""
    checkpoints = numbered(folder)
    task, step, trouble = None, line.step, ""
    try:
        step = own_step(line, folder, checkpoints)
        task = task_of(line)
    except ValueError as error:
        trouble = str(error)
    if not checkpoints:
        return [Candidate(shown, line.run, step, task, folder, trouble)]
    found = [
        Candidate(f"{shown}/{place.name}", line.run, number, task, place, trouble)
        for number, place in sorted(checkpoints.items())
    ]
    return [*found, *beside(folder, shown, max(checkpoints.items())[1])]


def task_of(line: Line) -> Task:
    """The line's task. ValueError for one without a name or a prompt."""
    if not line.prompts:
        raise ValueError("no task prompt says what it is for; give one, or list it in a JSONL manifest.")
    return Task(line.task, line.prompts, line.domain)


def own_step(line: Line, folder: Path, checkpoints: dict[int, Path]) -> int:
    """The line's step, else the number of a checkpoint's folder, else 1."""
    if line.step is None:
        match = CHECKPOINT.fullmatch(folder.name)
        return int(match[1]) if match else 1
    if checkpoints:
        raise ValueError(
            f"the {len(checkpoints)} checkpoints in it have steps of their own, but step {line.step} was "
            f"given: leave it out, or name one checkpoint."
        )
    if line.step < 0:
        raise ValueError(f"step is {line.step}; optimiser steps count from 1, and 0 is the start.")
    return line.step


def numbered(folder: Path) -> dict[int, Path]:
    """Trainer's checkpoint-<step> folders."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    return {int(match[1]): path for path, match in found.items() if match}


def beside(folder: Path, shown: str, last: Path) -> list[Candidate]:
    """An adapter that was saved beside its checkpoints, unless it is the last of them.

    Its step is unknown: Trainer may have put the best checkpoint there, or gone on after the last.
    """
    own, other = folder / WEIGHTS_FILE, last / WEIGHTS_FILE
    if not own.is_file() or (other.is_file() and filecmp.cmp(own, other, shallow=False)):
        return []
    trouble = (
        f"{own} differs from {last.name}, and its step is unknown. The checkpoints are the run; to import it "
        f"too, move it to a folder checkpoint-<step>."
    )
    return [Candidate(shown, f"{shown}, beside its checkpoints", trouble=trouble)]


def located(path: str, root: Path, hub: Hub) -> tuple[Path, str]:
    """The folder of a path or Hub repository, and its name to show. FileNotFoundError where there is none."""
    if path.strip() and (root / path).is_dir():
        return root / path, path
    match = REPOSITORY.fullmatch(path)
    if not match:
        raise FileNotFoundError(f"{path!r} is neither a folder nor a Hub repository id (owner/name).")
    try:
        folder = Path(
            snapshot_download(
                match[1],
                revision=match[2],
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=not hub_reachable(),
                allow_patterns=[f"*{name}" for name in (CONFIG_FILE, WEIGHTS_FILE, STATE_FILE)],
            )
        )
    except (OSError, HFValidationError) as error:
        why = error if hub_reachable() else "the Hub does not answer, or is off by HF_HUB_OFFLINE."
        raise FileNotFoundError(
            f"{path!r} is no folder, and no repository on the Hub or in its cache: {why}"
        ) from error
    if not folder.is_dir():  # the client makes none where no file was asked for
        raise FileNotFoundError(f"{path!r} holds no adapter: the repository has no {CONFIG_FILE}.")
    return folder, f"{match[1]}@{folder.name[:12]}"


def logged(folder: Path, step: int) -> tuple[float | None, float | None]:
    """Loss and learning rate that Trainer logged last, at or before `step`; None where it logged none."""
    file = folder / STATE_FILE
    history = read_json(file).get("log_history", []) if file.is_file() else []
    entries = [entry for entry in history if "loss" in entry and entry.get("step", 0) <= step]
    last = entries[-1] if entries else {}
    return as_number(last.get("loss")), as_number(last.get("learning_rate"))
