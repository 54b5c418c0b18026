"""BIG-bench `task.json` files → plain task records.

In: a folder, searched recursively.  Out: records for `Task.from_dict`, and the reason for each task left out.
Idea: the answer is the first `target`, or the best of `target_scores` (on a tie the first listed, so that
      the answer does not depend on anything but the file); examples are split by the hash of their input,
      so that no input is on both sides. A family is a top-level folder below the one given.
Source: the JSON schema in github.com/google/BIG-bench, docs/doc.md."""

from pathlib import Path
from typing import Any

from ltdi_peft.suite.splits import json_object, share

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


def read_bigbench(
    folder: Path, evaluation_fraction: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({file: task record}, {file: reason for leaving it out}), in the order of the sorted paths."""
    if not 0 <= evaluation_fraction <= 1:
        raise ValueError(f"evaluation_fraction must be between 0 and 1, got {evaluation_fraction}.")
    files = sorted(folder.rglob("task.json"))
    if not files:
        raise ValueError(f"{folder}: no task.json below it; give the folder that holds BIG-bench's tasks.")
    records: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    domains: dict[str, str] = {}
    names: set[str] = set()
    for path in files:
        source = json_object(path.read_text(encoding="utf-8"), str(path))
        reason = _unusable(source)
        if reason:
            left_out[str(path)] = reason
            continue
        family = (path.relative_to(folder).parts[:-1] or (folder.name,))[0]
        domain = domains.setdefault(family, _domain(source))  # of its first task: a family has one domain
        name = _free_name(source, path, family, names)
        names.add(name)
        train, evaluation = _parts(usable_examples(source), evaluation_fraction)
        prompts = [source["description"].strip()]
        head = {"name": name, "prompts": prompts, "domain": domain, "family": family}
        records[str(path)] = {**head, "train": train, "evaluation": evaluation}
    return records, left_out


def _unusable(source: dict[str, Any]) -> str:
    description = source.get("description")
    if not isinstance(description, str) or not description.strip():
        return "no description, so there is no prompt"
    if not isinstance(source.get("examples"), list):
        return "no list of examples (a programmatic task, or the head of subtasks)"
    if not usable_examples(source):
        return f"none of its {len(source['examples'])} examples has an input and a target or target_scores"
    return ""


def _free_name(source: dict[str, Any], path: Path, family: str, taken: set[str]) -> str:
    """`name`, else the folder's; where that is taken (subtasks share names), family/folder, else numbered."""
    folder = path.parent.name
    wanted = source.get("name")
    options = [wanted] if isinstance(wanted, str) and wanted.strip() else []
    options += [folder, f"{family}/{folder}"]
    options += [f"{family}/{folder}-{n}" for n in range(2, len(taken) + 3)]
    return next(option for option in options if option not in taken)


def _domain(source: dict[str, Any]) -> str:
    keywords = [k for k in source.get("keywords") or [] if isinstance(k, str) and k not in FORM_KEYWORDS]
    return keywords[0] if keywords else "general"


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


def _parts(examples: list[dict[str, Any]], evaluation_fraction: float) -> tuple[list[Any], list[Any]]:
    train = [e for e in examples if share("input " + e["input"]) >= evaluation_fraction]
    return train, [e for e in examples if share("input " + e["input"]) < evaluation_fraction]
