"""BIG-bench `task.json` files → plain task records.

In: a folder, searched recursively, or the names of some tasks in it.
Out: records for `Task.from_dict`, and the reason for each task left out.
Idea: a task is called like its folder ("unit_conversion/si_conversion"), and a family is a top-level folder,
      so neither depends on which other files are there. The answer is the first `target`, or the best of
      `target_scores` (on a tie the first listed). Examples are parted and ordered by the hash of their
      input: no input is on both sides, and the first hundred are no one class of a sorted file.
Source: the JSON schema in github.com/google/BIG-bench, docs/doc.md; the tasks are under Apache-2.0."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ltdi_peft.suite.instructions import instructions
from ltdi_peft.suite.splits import json_object, share

BIGBENCH_SPLITS = Path(__file__).with_name("bigbench_splits.json")
# Keywords that describe the form of a task rather than what it is about (BIG-bench, keywords.md).
FORM_KEYWORDS = {
    "json",
    "programmatic",
    "multiple choice",
    "free response",
    "zero-shot",
    "one-shot",
    "many-shot",
}
# A task with one of these is in that domain whatever else it is about: the domains left out of training.
UNSEEN_KEYWORDS = ("social bias", "theory of mind")
MOST = 500  # examples of a part; the largest tasks have tens of thousands


def read_bigbench(
    folder: Path, evaluation_fraction: float, names: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({file: task record}, {file: reason for leaving it out}), in the order of the sorted paths.

    With `names` only those tasks are read; one that is not there is in neither.
    """
    if not 0 <= evaluation_fraction <= 1:
        raise ValueError(f"evaluation_fraction must be between 0 and 1, got {evaluation_fraction}.")
    files = task_files(folder, names)
    if not files:
        raise ValueError(f"{folder}: no task.json below it; give the folder that holds BIG-bench's tasks.")
    records: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, path in files.items():
        source = json_object(path.read_text(encoding="utf-8"), str(path))
        if reason := unusable(source):
            left_out[str(path)] = reason
        else:
            records[str(path)] = task_record(name, source, evaluation_fraction)
    return records, left_out


def task_files(folder: Path, names: Collection[str] | None = None) -> dict[str, Path]:
    """Task name → file, for all below the folder or for some names."""
    if names is None:
        found = {
            path.parent.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("task.json"))
        }
        if "." in found:  # the folder is a task itself
            found[folder.name] = found.pop(".")
        return found
    files = {name: folder / name / "task.json" for name in sorted(names)}
    return {name: path for name, path in files.items() if path.is_file()}


def task_record(name: str, source: dict[str, Any], evaluation_fraction: float) -> dict[str, Any]:
    """The record of a usable task."""
    examples = usable_examples(source)
    train, evaluation = parts(examples, evaluation_fraction)
    sets = {tuple(example["choices"]) for example in examples}
    prompts, held_out = instructions(name, source["description"], sets.pop() if len(sets) == 1 else ())
    return {
        "name": name,
        "prompts": prompts,
        "evaluation_prompts": held_out,
        "domain": domain_of(source),
        "family": name.split("/")[0],
        "train": train[:MOST],
        "evaluation": evaluation[:MOST],
    }


def unusable(source: dict[str, Any]) -> str:
    """Why there is no task in this file, or nothing."""
    description = source.get("description")
    if not isinstance(description, str) or not description.strip():
        return "no description, so there is no prompt"
    if not isinstance(source.get("examples"), list):
        return "no list of examples (a programmatic task, or the head of subtasks)"
    if not usable_examples(source):
        return f"none of its {len(source['examples'])} examples has an input and a target or target_scores"
    return ""


def keywords_of(source: dict[str, Any]) -> list[str]:
    """What the task is about, in the order of the file."""
    return [k for k in source.get("keywords") or [] if isinstance(k, str) and k not in FORM_KEYWORDS]


def domain_of(source: dict[str, Any]) -> str:
    """An unseen keyword where the task has one, else its first keyword."""
    keywords = keywords_of(source)
    unseen = [keyword for keyword in UNSEEN_KEYWORDS if keyword in keywords]
    return (unseen or keywords or ["general"])[0]


def usable_examples(source: dict[str, Any]) -> list[dict[str, Any]]:
    """Distinct examples with a text input and a non-blank answer, in the order of the file."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for example in source["examples"]:
        if not isinstance(example, dict) or not isinstance(example.get("input"), str):
            continue
        answer, choices = _answer(example)
        if answer.strip():
            record = {"input": example["input"], "answer": answer, "choices": choices}
            found.setdefault((example["input"], answer), record)
    return list(found.values())


def _answer(example: dict[str, Any]) -> tuple[str, list[str]]:
    """(answer, choices); max() keeps the first of equals, which is the rule for ties."""
    scores = example.get("target_scores")
    if isinstance(scores, dict) and scores:
        return max(scores, key=lambda choice: scores[choice]), list(scores)
    target = example.get("target")
    first = target[0] if isinstance(target, list) and target else target
    return (str(first) if isinstance(first, (str, int, float)) else ""), []


def parts(examples: list[dict[str, Any]], evaluation_fraction: float) -> tuple[list[Any], list[Any]]:
    """(training, evaluation) examples, each in the order of the hash of their inputs."""
    ranked = [(share("input " + example["input"]), example) for example in examples]
    ranked.sort(key=lambda pair: pair[0])
    held_out = [example for position, example in ranked if position < evaluation_fraction]
    return [example for position, example in ranked if position >= evaluation_fraction], held_out
