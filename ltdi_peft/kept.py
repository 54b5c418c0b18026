"""What was measured on a task, kept a line a task, so that a killed evaluation goes on.

In: tasks and a function that measures a group of them.  Out: task → its line, made now or read.
Idea: the file's name is a digest of what all lines depend on, a line's key of what only its task does; so
more tasks add lines, and a changed task is measured anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ltdi_peft.files import replace_file
from ltdi_peft.task import Task

Line = dict[str, dict[str, Any]]  # what was measured → context → accuracy, or a list of them


def kept_lines(
    file: Path,
    tasks: Sequence[Task],
    keys: Mapping[str, str],
    make: Callable[[list[Task]], list[Line]],
    *,
    together: int,
    desc: str,
    progress: bool,
) -> dict[str, Line]:
    """Task → its line; those not in the file under the task's key are made, `together` tasks at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {one["task"]: one["line"] for one in whole_lines(file) if keys.get(one["task"]) == one["key"]}
    missing = [task for task in tasks if task.name not in known]
    with tqdm(total=len(tasks), desc=desc, disable=not progress, unit="task") as bar:
        bar.update(len(tasks) - len(missing))
        for place in range(0, len(missing), together):
            group = missing[place : place + together]
            for task, line in zip(group, make(group), strict=True):
                known[task.name] = line
                with file.open("a") as out:
                    record = {"task": task.name, "key": keys[task.name], "line": line}
                    out.write(json.dumps(record) + "\n")
            bar.update(len(group))
    return {task.name: known[task.name] for task in tasks}


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines; a last one that a killed process left unfinished is cut off."""
    if not file.is_file():
        return []
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        replace_file(file, kept)
    return [json.loads(line) for line in kept.splitlines()]


def task_keys(tasks: Sequence[Task], examples: int) -> dict[str, str]:
    """Task → the key of a line about so many of its evaluation examples."""
    return {task.name: hashed({**task.to_dict(), "examples": examples}) for task in tasks}


def hashed(table: Mapping[str, Any]) -> str:
    """16 hex digits of a JSON table."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
