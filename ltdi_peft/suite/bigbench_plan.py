"""Which BIG-bench tasks are in the suite, and in which split.

In: a folder with all of BIG-bench, the length of a text in tokens, and what `ltdi calibrate` measured.
Out: the content of `bigbench_splits.json`; deterministic.
Idea: a group (a top-level folder) is never divided. A group with a keyword of an unseen domain goes there
      whole, so no training task has that keyword; large groups train, or one would make up most of a held-out
      split; the others are drawn by the hash of their name. Split orders go round the groups, cheap and
      calibrated tasks first, so that a prefix is a small suite of the same kind.
Source: EVALUATION.md, "BIG-bench" and "Splits"."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from ltdi_peft.suite.bigbench import (
    BIGBENCH_SPLITS,
    UNSEEN_KEYWORDS,
    domain_of,
    keywords_of,
    parts,
    task_files,
    unusable,
    usable_examples,
)
from ltdi_peft.suite.splits import SPLITS, SplitFile, json_object, share, write_splits

NOT_ENGLISH = {"non-English", "multilingual", "translation", "low-resource language"}  # keywords
LEAST_EXAMPLES = 50
LEAST_PART = 20  # examples of each part
MOST_CHOICES = 10  # mean
MOST_INPUT, MOST_CHOICE = 96, 24  # tokens, of 9 in 10
LOOKED_AT = 200  # examples whose tokens are counted
LEAST_GAIN = 0.15  # oracle − base
LARGE = 5  # a group of more tasks trains
VALIDATION, UNSEEN = 0.15, 0.45  # expected shares of the other groups

Measured = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Candidate:
    """A task that may be in the suite; `cost` is the tokens that scoring one example takes."""

    name: str
    domain: str
    cost: float

    @property
    def group(self) -> str:
        """The top-level folder."""
        return self.name.split("/")[0]


def write_bigbench_splits(
    folder: Path, length: Callable[[str], int], measured: Measured, path: Path = BIGBENCH_SPLITS
) -> None:
    """Plan the suite anew from `bigbench/benchmark_tasks` of an unpacked sdist and write its split file."""
    found = (candidate(name, file, length) for name, file in task_files(folder).items())
    write_splits(path, "bigbench", planned([one for one in found if one], measured))


def candidate(name: str, file: Path, length: Callable[[str], int]) -> Candidate | None:
    """The task if it is multiple choice, English, short and large enough."""
    source = json_object(file.read_text(encoding="utf-8"), str(file))
    if unusable(source) or NOT_ENGLISH & set(keywords_of(source)):
        return None
    examples = usable_examples(source)
    train, evaluation = parts(examples, 0.5)
    enough = len(examples) >= LEAST_EXAMPLES and min(len(train), len(evaluation)) >= LEAST_PART
    if not enough or foreign(examples) or min(len(example["choices"]) for example in examples) < 2:
        return None
    looked_at = [*train, *evaluation][:: max(1, len(examples) // LOOKED_AT)]
    choices = fmean(len(example["choices"]) for example in looked_at)
    inputs = [length(example["input"]) for example in looked_at]
    answers = [length(choice) for example in looked_at for choice in example["choices"]]
    fits = choices <= MOST_CHOICES and tenth(inputs) <= MOST_INPUT and tenth(answers) <= MOST_CHOICE
    return Candidate(name, domain_of(source), choices * (fmean(inputs) + fmean(answers))) if fits else None


def foreign(examples: list[dict[str, Any]]) -> bool:
    """Whether more than a tenth of the letters are of another alphabet: not every such task has a keyword."""
    letters = [letter for example in examples[:LOOKED_AT] for letter in example["input"] if letter.isalpha()]
    return sum(not letter.isascii() for letter in letters) > len(letters) / 10


def tenth(values: list[int]) -> float:
    """What 9 in 10 do not exceed."""
    return quantiles(values, n=10, method="inclusive")[-1]


def planned(candidates: Iterable[Candidate], measured: Measured) -> SplitFile:
    """The split file; measured tasks that a LoRA hardly learns are left out with their figures."""
    groups: dict[str, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda one: (one.cost, one.name)):
        groups.setdefault(one.group, []).append(one)
    split_of = {name: group_split(name, tasks) for name, tasks in groups.items()}
    left_out = {name: too_small(values) for name, values in measured.items() if gain(values) < LEAST_GAIN}
    left_out |= {
        one.name: "its group is of an unseen domain, but this task is not"
        for name, group in groups.items()
        for one in group
        if split_of[name] == "unseen_domains" and one.domain not in UNSEEN_KEYWORDS
    }
    splits: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        own = [group for name, group in groups.items() if split_of[name] == split]
        order = [one.name for one in round_robin(own) if one.name not in left_out]
        splits[split] = tuple(sorted(order, key=lambda name: name not in measured))
    folds = {keyword: 0 for keyword in UNSEEN_KEYWORDS}
    calibration = {name: dict(values) for name, values in measured.items()}
    return SplitFile(splits, folds, left_out, calibration)


def gain(values: Mapping[str, float]) -> float:
    """What the task's own LoRA adds."""
    return values["oracle"] - values["base"]


def too_small(values: Mapping[str, float]) -> str:
    """The reason for leaving a measured task out."""
    figures = f"{values['base']:.2f} → {values['oracle']:.2f}"
    return f"its own LoRA gains {gain(values):+.2f} ({figures}), below {LEAST_GAIN}"


def group_split(name: str, tasks: Sequence[Candidate]) -> str:
    """The split of a group, which depends on no other group."""
    if any(task.domain in UNSEEN_KEYWORDS for task in tasks):
        return "unseen_domains"
    position = share(f"group {name}")
    if len(tasks) > LARGE or position >= VALIDATION + UNSEEN:
        return "train"
    return "validation" if position < VALIDATION else "unseen_tasks"


def round_robin(groups: Iterable[list[Candidate]]) -> list[Candidate]:
    """The first task of every group, then the second of every group, and so on."""
    return [one for turn in zip_longest(*groups) for one in turn if one is not None]
