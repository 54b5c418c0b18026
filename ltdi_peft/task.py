"""Tasks and suites with fixed splits.

In: a JSONL file, a folder of BIG-bench `task.json` files, or the built-in rules of `ltdi_peft.suite`.
Out: `TaskSuite`: named tasks, each in one split (train, validation, unseen_tasks, unseen_domains).
Idea: a split belongs to a family of tasks and is fixed in a file before any training; whatever would let
      a held-out task leak into training (a task in two splits, a family across splits, a held-out prompt or
      example among the training ones) cannot be built.
Source: EVALUATION.md, "Splits"; BIG-bench's JSON schema, github.com/google/BIG-bench docs/doc.md."""

import fnmatch
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, no_type_check

from ltdi_peft.strict import build
from ltdi_peft.suite import BUILTIN_SPLITS, builtin_tasks
from ltdi_peft.suite.bigbench import BIGBENCH_SPLITS, read_bigbench
from ltdi_peft.suite.sdist import bigbench_folder
from ltdi_peft.suite.splits import SPLITS as SPLITS
from ltdi_peft.suite.splits import (
    SplitFile,
    hashed_splits,
    json_object,
    read_splits,
    refuse_crossing,
    write_splits,
)
from ltdi_peft.task_data import DataSource, read_parts

CALIBRATED = ("base", "oracle", "chance")  # accuracies of `calibrate.py` that a table of tasks shows
_PathLike = Path | str | None
_Fractions = Mapping[str, float] | None


Turn = tuple[str, str]
"""(role, content) of one message; roles are those of chat templates: system, user, assistant."""


# Tests check annotations at every call: too slow for the 200,000 examples of a suite; __init__ checks. It is
# written out for them too: a frozen class's own goes through object.__setattr__ for every field.
@no_type_check
@dataclass(frozen=True, init=False)
class Example:
    """One input and its answer; with `choices` it is multiple choice and the answer is one of them.

    `turns` is the conversation before the answer, for models with a chat template; `input` is then the same
    as plain text, which models without one read.
    """

    input: str
    answer: str
    choices: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()

    def __init__(
        self,
        input: str,  # the field's name
        answer: str,
        choices: tuple[str, ...] = (),
        turns: tuple[Turn, ...] = (),
    ) -> None:
        """Refuse what cannot be scored: a blank answer, or one that is no choice."""
        own = self.__dict__
        own["input"], own["answer"], own["choices"], own["turns"] = input, answer, choices, turns
        if not isinstance(input, str) or not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"an example needs a text input and a non-blank text answer, got {self!r}.")
        if choices and answer not in choices:
            raise ValueError(f"the answer {answer!r} is not among its choices {list(choices)}.")
        if turns and not all(
            len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
        ):
            raise ValueError(f"turns are (role, content) pairs of texts, got {turns!r}.")


ExampleLike = Example | Sequence[Any] | Mapping[str, Any]  # itself, (input, answer[, choices]), or a dict


@dataclass(frozen=True, init=False)
class Task:
    """A task: what it is called, how it may be asked for, and examples (none = weight-space use only).

    `prompts` are training paraphrases, `evaluation_prompts` held-out ones; `family` names the tasks that
    must share a split ("" = a family of its own, which is then set to the name). `attributes` say what it has
    in common with others, e.g. {"language": "German", "form": "letter"}: training may use them
    (`condition.attributes`), generation reads prompts alone. Sequences become tuples, and
    (input, answer) pairs or dicts become `Example`s. Raises ValueError for what could leak or not be asked.
    """

    name: str
    prompts: tuple[str, ...]
    domain: str = "general"
    family: str = ""
    train: tuple[Example, ...] = ()
    evaluation: tuple[Example, ...] = ()
    evaluation_prompts: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        name: str,
        prompts: Iterable[str],
        domain: str = "general",
        family: str = "",
        train: Iterable[ExampleLike] = (),
        evaluation: Iterable[ExampleLike] = (),
        evaluation_prompts: Iterable[str] = (),
        attributes: Mapping[str, Any] | Iterable[Any] = (),
    ) -> None:
        """Normalise sequences, then refuse half-valid tasks."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a task needs a non-blank name, got {name!r}.")
        values = {
            "name": name,
            "prompts": _prompts(name, "prompts", prompts),
            "domain": domain,
            "family": family or name,
            "train": tuple([_example(name, e) for e in train]),
            "evaluation": tuple([_example(name, e) for e in evaluation]),
            "evaluation_prompts": _prompts(name, "evaluation_prompts", evaluation_prompts),
            "attributes": _attributes(name, attributes),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)  # the class is frozen
        if not self.prompts:
            raise ValueError(f"task {name!r} has no prompts; give at least one sentence that asks for it.")
        self._refuse_leaks()

    def _refuse_leaks(self) -> None:
        if shared := sorted(set(self.prompts) & set(self.evaluation_prompts)):
            raise ValueError(
                f"task {self.name!r}: prompt {shared[0]!r} is both a training and a held-out prompt."
            )
        if {e.input for e in self.train}.isdisjoint([e.input for e in self.evaluation]):
            return
        seen = {(e.input, e.answer) for e in self.train}
        if leaked := [e for e in self.evaluation if (e.input, e.answer) in seen]:
            raise ValueError(
                f"task {self.name!r}: {len(leaked)} examples are both in train and in evaluation, "
                f"e.g. {leaked[0].input!r} → {leaked[0].answer!r}; keep each in one part."
            )

    @property
    def held_out_prompts(self) -> tuple[str, ...]:
        """The prompts to judge with: `evaluation_prompts`, or `prompts` where there are none."""
        return self.evaluation_prompts or self.prompts

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; an example is [input, answer], or [input, answer, [choices]]."""
        record = {key: value for key, value in vars(self).items() if value}
        for key in ("train", "evaluation"):
            if key in record:
                record[key] = [_example_record(e) for e in record[key]]
        if self.attributes:
            record["attributes"] = dict(self.attributes)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}

    @staticmethod
    def from_dataset(
        path: str | Path,
        *,
        name: str,
        prompts: Iterable[str],
        domain: str = "general",
        family: str = "",
        evaluation_prompts: Iterable[str] = (),
        **source: Any,  # noqa: ANN401
    ) -> "Task":
        """A task whose examples are a local file or a `datasets.load_dataset` name.

        `source`: fields of `task_data.DataSource`, e.g. input="question", answer="label", limit=500. Raises
        ValueError, with the columns that are there, where these do not fit; OSError where nothing is found.
        """
        table = {key: list(value) if isinstance(value, tuple) else value for key, value in source.items()}
        parts = read_parts(build(DataSource, {**table, "path": str(path)}, f"task {name!r}"))
        return Task(name, prompts, domain, family, evaluation_prompts=evaluation_prompts, **parts)

    @staticmethod
    def from_dict(d: dict[str, Any], where: str, folder: Path = Path()) -> "Task":
        """The inverse of `to_dict`; `where` (file and line) begins every error message.

        A key "dataset" stands for the examples: fields of `task_data.DataSource`, its path from `folder`.
        """
        if "dataset" in d:
            d = _with_data(d, where, folder)
        known = [f.name for f in fields(Task)]
        if unknown := sorted(set(d) - set(known)):
            raise ValueError(f"{where}: unknown keys {unknown}; a task has {known}.")
        if missing := [key for key in ("name", "prompts") if key not in d]:
            raise ValueError(f"{where}: missing keys {missing}; a task needs a name and prompts.")
        try:
            return Task(**d)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


@no_type_check  # as for Example
def _attributes(task: str, given: Mapping[str, Any] | Iterable[Any]) -> tuple[tuple[str, str], ...]:
    try:
        table = dict(given)
    except (TypeError, ValueError):
        table = None
    if table is None or not all(isinstance(t, str) and t.strip() for pair in table.items() for t in pair):
        raise ValueError(
            f'task {task!r}: attributes are texts, e.g. {{"language": "German"}}, got {given!r}.'
        )
    return tuple(sorted(table.items()))


def _with_data(d: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The record with the examples that its data set holds."""
    if both := sorted({"train", "evaluation"} & set(d)):
        raise ValueError(f"{where}: give `dataset` or {both}, not both.")
    source = build(DataSource, d["dataset"], f"{where}: dataset")
    try:
        parts = read_parts(source, folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {key: value for key, value in d.items() if key != "dataset"} | parts


def _prompts(task: str, key: str, prompts: Iterable[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError(f"task {task!r}: {key} must be a list of sentences, got {prompts!r}.")
    prompts = tuple(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"task {task!r}: {key} holds {prompt!r}; every prompt must be a non-blank text.")
    if len(set(prompts)) < len(prompts):
        raise ValueError(f"task {task!r}: {key} repeats a prompt; every paraphrase must differ.")
    return prompts


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block no garbage is looked for: 200,000 examples that all stay would be walked often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_type_check  # as for Example
def _example(task: str, value: ExampleLike) -> Example:
    if type(value) is Example:
        return value
    parts = value
    if isinstance(value, (list, tuple)) and 2 <= len(value) <= 3:
        parts = dict(zip(("input", "answer", "choices"), value, strict=False))
    known, choices = {"input", "answer", "choices", "turns"}, None
    if isinstance(parts, dict) and {"input", "answer"} <= set(parts) <= known:
        choices = parts.get("choices", ())
    if choices is None or isinstance(choices, str):
        raise ValueError(
            f"task {task!r}: an example is [input, answer], [input, answer, [choice, …]] or {{input, answer, "
            f"choices, turns}}, got {value!r}."
        )
    try:
        turns = tuple(map(tuple, parts.get("turns", ())))
        return Example(parts["input"], parts["answer"], tuple(choices), turns)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {task!r}: {error}") from error


def _example_record(example: Example) -> list[Any] | dict[str, Any]:
    if example.turns:
        return {key: value for key, value in vars(example).items() if value}
    pair = [example.input, example.answer]
    return [*pair, list(example.choices)] if example.choices else pair


class UnknownTaskError(KeyError, ValueError):
    """A name that no task of a suite has."""

    def __str__(self) -> str:
        """The sentence itself: of a KeyError Python shows the quoted text."""
        return str(self.args[0])


@dataclass(frozen=True)
class TaskSuite:
    """Tasks by name, and for each split the ordered names of its tasks.

    The splits are train, validation, unseen_tasks and unseen_domains; every task is in one.

    `folds` maps a domain to the number of the fold in which it is left out; `left_out` maps what was not
    loaded, or is deliberately in no split, to the reason; `calibration` maps a task to the accuracies that
    were measured before it was chosen, if they were. Raises ValueError for an empty suite, an unknown
    split, a name that no task has, a task in two splits or in none, a family or an unseen domain
    that crosses splits.
    """

    name: str
    tasks: dict[str, Task]
    splits: dict[str, tuple[str, ...]]
    folds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Give every split an entry, then check the suite whole."""
        if not isinstance(self.tasks, Mapping):
            raise ValueError(
                f"suite {self.name!r}: tasks is a {type(self.tasks).__name__}; expected {{task.name: task}}."
            )
        if odd := [name for name, task in self.tasks.items() if task.name != name]:
            raise ValueError(
                f"suite {self.name!r}: task {self.tasks[odd[0]].name!r} stands under {odd[0]!r}; expected "
                f"{{task.name: task}}."
            )
        if not self.tasks:
            why = "".join(f"\n  {task}: {reason}" for task, reason in list(self.left_out.items())[:5])
            raise ValueError(f"suite {self.name!r} is empty: it needs at least one task.{why}")
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise ValueError(f"suite {self.name!r}: unknown splits {unknown}; the splits are {list(SPLITS)}.")
        object.__setattr__(self, "splits", {s: tuple(self.splits.get(s, ())) for s in SPLITS})
        split_of = self._one_split_each()
        refuse_crossing(self.name, "family", {n: t.family for n, t in self.tasks.items()}, split_of)
        unseen = {self.tasks[n].domain for n in self.splits["unseen_domains"]}
        domains = {n: t.domain for n, t in self.tasks.items() if t.domain in unseen}
        refuse_crossing(self.name, "unseen domain", domains, split_of)

    def _one_split_each(self) -> dict[str, str]:
        split_of: dict[str, str] = {}
        for split, names in self.splits.items():
            for name in names:
                if name not in self.tasks:
                    raise ValueError(
                        f"suite {self.name!r}: split {split!r} names {name!r}, which is no task of it."
                    )
                if name in split_of:
                    raise ValueError(
                        f"suite {self.name!r}: task {name!r} is in {split_of[name]!r} and {split!r}."
                    )
                split_of[name] = split
        if homeless := sorted(set(self.tasks) - set(split_of)):
            raise ValueError(
                f"suite {self.name!r}: {len(homeless)} tasks are in no split, e.g. {homeless[0]!r}; "
                'name them in a split, or under "left_out" of the split file with the reason.'
            )
        return split_of

    def __getitem__(self, task_name: str) -> Task:
        if task_name not in self.tasks:
            raise UnknownTaskError(
                f"suite {self.name!r} has no task {task_name!r}; `ltdi tasks` (with --source, for a suite of "
                f"your own) lists its {len(self.tasks)}."
            )
        return self.tasks[task_name]

    def split(self, name: str) -> tuple[Task, ...]:
        """The tasks of one split, in the fixed order."""
        if name not in self.splits:
            raise ValueError(f"unknown split {name!r}; the splits are {list(SPLITS)}.")
        return tuple(self.tasks[task] for task in self.splits[name])

    def parts(self, **limits: int) -> "TaskSuite":
        """The suite with only the first n tasks of the splits given; splits not given stay whole."""
        for split, limit in limits.items():
            if not 0 <= limit <= len(self.split(split)):
                raise ValueError(
                    f"parts({split}={limit}): suite {self.name!r} has {len(self.split(split))} tasks "
                    f"in {split!r}; ask for 0 to that many."
                )
        splits = {s: names[: limits.get(s, len(names))] for s, names in self.splits.items()}
        return self._with_splits(splits)

    def _with_splits(self, splits: Mapping[str, tuple[str, ...]]) -> "TaskSuite":
        """The suite of the tasks that `splits` names, with their domains' folds."""
        tasks = {n: self.tasks[n] for names in splits.values() for n in names}
        domains = {task.domain for task in tasks.values()}
        folds = {domain: fold for domain, fold in self.folds.items() if domain in domains}
        return replace(self, tasks=tasks, splits=dict(splits), folds=folds)

    def only(self, domains: Sequence[str] = (), match: Sequence[str] = ()) -> "TaskSuite":
        """The suite cut to some domains and to names that match a pattern such as "animals/*/brackets".

        Nothing given means everything. ValueError names an unknown domain or a pattern that matches no task.
        """
        known = {task.domain for task in self.tasks.values()}
        if unknown := sorted(set(domains) - known):
            raise ValueError(f"suite {self.name!r} has no domains {unknown}; it has {sorted(known)}.")
        if idle := [pattern for pattern in match if not fnmatch.filter(self.tasks, pattern)]:
            raise ValueError(f"suite {self.name!r} has no task that matches {idle}; `ltdi tasks` lists them.")
        tasks = {
            name: task
            for name, task in self.tasks.items()
            if (not domains or task.domain in domains)
            and (not match or any(fnmatch.fnmatchcase(name, pattern) for pattern in match))
        }
        splits = {split: tuple(n for n in names if n in tasks) for split, names in self.splits.items()}
        kept = {task.domain for task in tasks.values()}
        return replace(
            self, tasks=tasks, splits=splits, folds={d: fold for d, fold in self.folds.items() if d in kept}
        )

    def fold(self, number: int) -> "TaskSuite":
        """The suite in which the domains of one fold are the unseen ones, with all their tasks.

        Domains that are unseen in every other fold (those of fold 0) are left out, for they have no training
        tasks. ValueError for a number that no domain has.
        """
        if number not in self.folds.values():
            known = sorted(set(self.folds.values()))
            raise ValueError(f"suite {self.name!r} has no fold {number}; its folds are {known}.")
        unseen = {domain for domain, fold in self.folds.items() if fold == number}
        splits = {
            s: tuple(n for n in names if self.tasks[n].domain not in unseen)
            for s, names in self.splits.items()
        }
        moved = tuple(n for names in self.splits.values() for n in names if self.tasks[n].domain in unseen)
        return self._with_splits({**splits, "unseen_domains": moved})

    def table(self) -> list[dict[str, Any]]:
        """One row a task: name, domain, family, split, number of examples, first prompt, first example.

        Of a calibrated suite also the accuracies measured, None where a task's were not.
        """
        rows = [_row(split, task) for split in SPLITS for task in self.split(split)]
        for row in rows if self.calibration else ():
            row |= {key: self.calibration.get(row["name"], {}).get(key) for key in CALIBRATED}
        return rows

    def save_splits(self, path: Path | str) -> None:
        """Write the split file (JSON, deterministic bytes, atomic)."""
        content = SplitFile(self.splits, self.folds, self.left_out, self.calibration)
        write_splits(Path(path), self.name, content)

    @staticmethod
    def builtin(split_file: _PathLike = None, *, wordings: str = "few") -> "TaskSuite":
        """The suite written by this project, with its committed splits unless another file is given.

        wordings: "few", or "many" training prompts a task (suite/wordings.py).
        """
        with uncollected():
            tasks = [Task(**record) for record in builtin_tasks(wordings)]
        return _suite("builtin", tasks, split_file or BUILTIN_SPLITS, None, {})

    @staticmethod
    def from_jsonl(
        path: Path | str,
        split_file: _PathLike = None,
        *,
        fractions: _Fractions = None,
    ) -> "TaskSuite":
        """One task a line, as `Task.to_dict` gives it; without a split file, splits by `hashed_splits`."""
        path = Path(path)
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        tasks = [
            Task.from_dict(json_object(text, f"{path}:{n}"), f"{path}:{n}", path.parent)
            for n, text in lines
            if text.strip()
        ]
        return _suite(path.stem, tasks, split_file, fractions, {})

    @staticmethod
    def from_bigbench(
        folder: Path | str,
        split_file: _PathLike = None,
        *,
        fractions: _Fractions = None,
        evaluation_fraction: float = 0.5,
    ) -> "TaskSuite":
        """BIG-bench's `task.json` files below `folder` (`suite/bigbench.py`); unusable ones: `left_out`.

        With a split file only the tasks that it puts into a split are read, else every one.
        """
        names = None if split_file is None else read_splits(Path(split_file)).names
        records, left_out = read_bigbench(Path(folder), evaluation_fraction, names)
        tasks = [Task.from_dict(record, where) for where, record in records.items()]
        return _suite(Path(folder).name, tasks, split_file, fractions, left_out)


def load_suite(source: str, split_file: _PathLike = None, wordings: str = "few") -> TaskSuite:
    """A suite: "builtin", "bigbench" (fetched once), a .jsonl file, or a folder of BIG-bench tasks.

    wordings: of the built-in suite; others have the prompts that they come with, and ValueError says so.
    """
    if source == "builtin":
        return TaskSuite.builtin(split_file, wordings=wordings)
    if wordings != "few":
        raise ValueError(
            f"suite.wordings is {wordings!r}, which is the built-in suite's alone: suite {source!r} has the "
            f"prompts that it comes with. Leave suite.wordings out."
        )
    if source == "bigbench":
        chosen = Path(split_file or BIGBENCH_SPLITS)
        return TaskSuite.from_bigbench(bigbench_folder(read_splits(chosen).names), chosen)
    if not Path(source).exists():
        raise FileNotFoundError(
            f"suite {source!r}: no such file or folder; give 'builtin', 'bigbench', a .jsonl file or a "
            f"folder of BIG-bench tasks."
        )
    if Path(source).is_dir():
        return TaskSuite.from_bigbench(source, split_file)
    return TaskSuite.from_jsonl(source, split_file)


def _suite(
    name: str, tasks: list[Task], split_file: _PathLike, fractions: _Fractions, left_out: dict[str, str]
) -> TaskSuite:
    """A suite with the splits of a file, or hashed ones; tasks that the file leaves out are not loaded."""
    if split_file is not None and fractions is not None:
        raise ValueError("give a split file or fractions, not both: the file fixes every split.")
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        twice = sorted({t.name for t in tasks if by_name[t.name] is not t})
        raise ValueError(f"suite {name!r}: two tasks are called {twice[0]!r}; every name must differ.")
    if split_file is None:
        rows = [(task.name, task.domain, task.family) for task in tasks]
        return TaskSuite(name, by_name, hashed_splits(rows, fractions), left_out=left_out)
    content = read_splits(Path(split_file))
    kept = {n: task for n, task in by_name.items() if n not in content.left_out}
    try:
        left_out = {**left_out, **content.left_out}
        return TaskSuite(name, kept, content.splits, content.folds, left_out, content.calibration)
    except ValueError as error:
        raise ValueError(f"{split_file}: {error}") from error


def _row(split: str, task: Task) -> dict[str, Any]:
    examples = (*task.train, *task.evaluation)
    return {
        "name": task.name,
        "domain": task.domain,
        "family": task.family,
        "split": split,
        "examples": len(examples),
        "prompt": task.prompts[0],
        "example": f"{examples[0].input} → {examples[0].answer}" if examples else "",
    }
