"""Split files, and splits for suites that have none.

In: task names with their domain and family.  Out: {split: ordered names}, and the JSON file that fixes it.
Idea: a split is decided once, by family, from names alone; the file has a version and is read strictly.
Source: EVALUATION.md, "Splits"."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "unseen_tasks", "unseen_domains")
SPLIT_FORMAT_VERSION = 1
FRACTIONS = {"validation": 0.1, "unseen_tasks": 0.2, "unseen_domains": 0.0}  # the rest is train


@dataclass(frozen=True)
class SplitFile:
    """What a split file holds: ordered task names by split, fold by domain, reason by left-out task.

    `calibration` maps a task, chosen or left out, to the accuracies that decided it (`calibrate.py`).
    """

    splits: dict[str, tuple[str, ...]]
    folds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of all splits."""
        return tuple(name for part in self.splits.values() for name in part)


def share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text (sha256; Python's own hash is seeded)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def hashed_splits(
    tasks: Iterable[tuple[str, str, str]], fractions: Mapping[str, float] | None = None
) -> dict[str, tuple[str, ...]]:
    """Splits for (name, domain, family) rows, by the hash of the domain, then by that of the family.

    `fractions` gives the expected share of each held-out split (default `FRACTIONS`); adding tasks later
    moves none of the old ones. Raises ValueError for unknown splits and for shares that leave no train.
    """
    shares = dict(FRACTIONS if fractions is None else fractions)
    if unknown := sorted(set(shares) - set(FRACTIONS)):
        raise ValueError(f"fractions has unknown splits {unknown}; give shares for {list(FRACTIONS)}.")
    if min(shares.values(), default=0) < 0 or sum(shares.values()) >= 1:
        raise ValueError(f"fractions must be ≥ 0 and leave a share for train, got {shares}.")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, domain, family in tasks:
        splits[_hashed_split(domain, family, shares)].append(name)
    return {split: tuple(names) for split, names in splits.items()}


def _hashed_split(domain: str, family: str, shares: dict[str, float]) -> str:
    if share("domain " + domain) < shares.get("unseen_domains", 0.0):
        return "unseen_domains"
    position = share("family " + family)
    if position < shares.get("validation", 0.0):
        return "validation"
    return (
        "unseen_tasks"
        if position < shares.get("validation", 0.0) + shares.get("unseen_tasks", 0.0)
        else "train"
    )


def write_splits(path: Path, suite: str, content: SplitFile) -> None:
    """Write a split file: atomic, equal content gives equal bytes; the order of names is kept."""
    record = {
        "format_version": SPLIT_FORMAT_VERSION,
        "suite": suite,
        "folds": dict(sorted(content.folds.items())),
        "left_out": dict(sorted(content.left_out.items())),
        "splits": {split: list(content.splits.get(split, ())) for split in SPLITS},
    }
    if content.calibration:
        record["calibration"] = dict(sorted(content.calibration.items()))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_splits(path: Path) -> SplitFile:
    """The inverse of `write_splits`. Raises ValueError that names the file and what is wrong with it."""
    record = json_object(path.read_text(encoding="utf-8"), str(path))
    if record.get("format_version") != SPLIT_FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {record.get('format_version')!r}, this version of ltdi_peft reads "
            f"{SPLIT_FORMAT_VERSION}; update ltdi_peft, or write the split file again."
        )
    known = {"format_version", "suite", "folds", "left_out", "calibration", "splits"}
    if unknown := sorted(set(record) - known):
        raise ValueError(f"{path}: unknown keys {unknown}; a split file has {sorted(known)}.")
    splits, folds, left_out = record.get("splits"), record.get("folds", {}), record.get("left_out", {})
    calibration = record.get("calibration", {})
    if not isinstance(splits, dict) or not all(_is_names(names) for names in splits.values()):
        raise ValueError(
            f"{path}: `splits` must map each of {list(SPLITS)} to a list of task names, got {splits!r}."
        )
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise ValueError(f"{path}: unknown splits {unknown}; the splits are {list(SPLITS)}.")
    if not _maps_to(folds, int) or not _maps_to(left_out, str):
        raise ValueError(f"{path}: `folds` must map domains to numbers and `left_out` task names to reasons.")
    if not _maps_to(calibration, dict) or not all(_maps_to(c, (int, float)) for c in calibration.values()):
        raise ValueError(f"{path}: `calibration` must map task names to tables of accuracies.")
    return SplitFile({split: tuple(names) for split, names in splits.items()}, folds, left_out, calibration)


def refuse_crossing(suite: str, kind: str, group_of: dict[str, str], split_of: dict[str, str]) -> None:
    """Raise ValueError if the tasks of one group (a family, a domain) are in more than one split."""
    first: dict[str, str] = {}
    for task, group in group_of.items():
        other = first.setdefault(group, task)
        if split_of[other] != split_of[task]:
            raise ValueError(
                f"suite {suite!r}: {kind} {group!r} crosses splits: {other!r} is in {split_of[other]!r}, "
                f"{task!r} in {split_of[task]!r}; keep it in one."
            )


def _is_names(value: Any) -> bool:  # noqa: ANN401 - whatever JSON held
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _maps_to(value: Any, kind: type | tuple[type, ...]) -> bool:  # noqa: ANN401 - whatever JSON held
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object, or a ValueError that begins with `where`."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object {{…}}, got {type(record).__name__}.")
    return record
