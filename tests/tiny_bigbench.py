"""Made-up BIG-bench tasks: single files, and a cache that holds one for every name of a split file."""

import json
from pathlib import Path

from ltdi_peft.suite.sdist import RELEASE
from ltdi_peft.suite.splits import read_splits


def write_bigbench(root: Path, folder: str, **record) -> Path:
    path = root / folder / "task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


def choices(count: int, labels=("yes", "no"), text="question") -> list[dict]:
    """Multiple-choice examples with distinct inputs."""
    return [
        {
            "input": f"{text} {n}",
            "target_scores": {label: int(n % len(labels) == i) for i, label in enumerate(labels)},
        }
        for n in range(count)
    ]


def record_like(split: str, text: str = "question") -> dict:
    """A task whose keywords suit a split of the committed file."""
    keyword = "theory of mind" if split == "unseen_domains" else "logical reasoning"
    return {
        "description": "Say yes or no.",
        "keywords": ["json", keyword],
        "examples": choices(60, text=text),
    }


def cached_bigbench(cache: Path, split_file: Path) -> Path:
    """A cache folder in which every task of the split file is unpacked already."""
    for split, names in read_splits(split_file).splits.items():
        for name in names:
            write_bigbench(cache / "suites" / RELEASE, name, **record_like(split, f"{name} question"))
    return cache
