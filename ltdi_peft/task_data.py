"""Examples from the data people have: a `datasets.load_dataset` name or a local file, in the usual formats.

In: `DataSource`: where the data is, which columns hold input and answer.  Out: records for `Task`.
Formats: columns named by the source; TRL's prompt and completion (texts or messages); messages or
conversations, of which the last assistant turn is the answer and what is before it the input.
Idea: rows are drawn in an order fixed by their number alone, for files are often sorted by label and the
first rows of a task are those that are trained on; the same input is never on both sides.
Source: TRL's dataset formats (docs, "Dataset formats and types").
"""

import random
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltdi_peft.strict import at_least, share
from ltdi_peft.suite.splits import share as hashed_share

if TYPE_CHECKING:  # importing datasets takes a second
    from datasets import Dataset

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
SAVED = ("state.json", "dataset_dict.json")  # one of them is in every folder that save_to_disk wrote

Row = dict[str, Any]
Record = dict[str, Any]  # input, answer, and choices and turns where there are any


@dataclass(frozen=True)
class DataSource:
    """Where a task's examples are, and how a row becomes one.

    `input` and `answer` are columns, or templates such as "{premise} and {hypothesis}"; without them the
    format is told by the columns' names. Numbers become text, class labels their names.
    """

    path: str = ""  # a .json, .jsonl, .csv or .parquet file, a folder of save_to_disk, or a Hub data set
    config: str | None = None  # of a Hub data set, e.g. "sst2" of "nyu-mll/glue"
    revision: str | None = None
    split: str = "train"
    evaluation_split: str | None = None  # None: a share of the split's inputs is put aside
    evaluation_share: float = 0.25
    input: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] = ()  # the same for every row; with choices an answer may be their number
    choices_column: str | None = None
    chat: bool = False  # read plain inputs as turns of a user, for a model's chat template
    limit: int | None = None  # rows drawn from each split

    def __post_init__(self) -> None:
        if (self.input is None) != (self.answer is None):
            raise ValueError(f"give input and answer both, or neither, got {self.input!r}, {self.answer!r}.")
        if self.choices and self.choices_column:
            raise ValueError("give choices or choices_column, not both.")
        if self.limit is not None:
            at_least("limit", self.limit, 1)
        share("evaluation_share", self.evaluation_share)


def read_parts(source: DataSource, folder: Path = Path()) -> dict[str, list[Record]]:
    """The task's "train" and "evaluation" records. A relative path is looked for in `folder` first.

    OSError for a file or data set that is not there; ValueError for unknown columns (with those that are
    there), a format that cannot be told, or a row without input or answer (with its number).
    """
    train = read_records(source, source.split, folder)
    if source.evaluation_split is not None:
        evaluation = read_records(source, source.evaluation_split, folder)
        aside = {record["input"] for record in evaluation}
        train = [record for record in train if record["input"] not in aside]
    else:
        aside = {r["input"] for r in train if hashed_share("input " + r["input"]) < source.evaluation_share}
        evaluation = [record for record in train if record["input"] in aside]
        train = [record for record in train if record["input"] not in aside]
    return {"train": train, "evaluation": evaluation}


def read_records(source: DataSource, split: str, folder: Path) -> list[Record]:
    """Distinct examples of one split, in the drawn order."""
    data = open_split(source, split, folder)
    where = f"{source.path} ({split})"
    read = row_reader(source, data.column_names, where)
    labels = label_names(data)
    count = min(source.limit or len(data), len(data))
    found: dict[tuple[str, str], Record] = {}
    for index in random.Random(0).sample(range(len(data)), count):
        row = {**data[index]}
        for column, names in labels.items():
            row[column] = names[row[column]] if row[column] in range(len(names)) else None
        try:
            record = read(row)
        except ValueError as error:
            raise ValueError(f"{where}, row {index}: {error}") from error
        if source.chat and "turns" not in record:
            record["turns"] = [["user", record["input"]]]
        found.setdefault((record["input"], record["answer"]), record)
    return list(found.values())


# ---- where the data is


def open_split(source: DataSource, split: str, folder: Path) -> "Dataset":
    """The rows of one split. OSError that says where it was looked for, ValueError for an unreadable file."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = next((p for p in (folder / source.path, Path(source.path)) if source.path and p.exists()), None)
    if path is None and (not source.path or Path(source.path).suffix in BUILDERS):
        raise FileNotFoundError(f"data {source.path!r}: no such file, neither below {folder} nor here.")
    try:
        if path and path.is_dir() and any((path / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(path)
            found = found if isinstance(found, datasets.DatasetDict) else {"train": found}
        elif path and path.is_file():
            found = datasets.load_dataset(builder_of(path), data_files=str(path))
        else:
            found = datasets.load_dataset(str(path or source.path), source.config, revision=source.revision)
    except (DatasetsError, ConnectionError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"data {source.path!r} cannot be read: {error}") from error
    if split not in found:
        raise ValueError(f"data {source.path!r} has no split {split!r}; it has {sorted(map(str, found))}.")
    return found[split]


def builder_of(path: Path) -> str:
    """The `datasets` builder for a file."""
    if path.suffix not in BUILDERS:
        raise ValueError(f"data {str(path)!r}: files are read that end in {sorted(BUILDERS)}.")
    return BUILDERS[path.suffix]


def label_names(data: "Dataset") -> dict[str, list[str]]:
    """Column of class labels → the names of its numbers."""
    import datasets

    return {c: f.names for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}


# ---- a row


def row_reader(source: DataSource, columns: Iterable[str], where: str) -> Callable[[Row], Record]:
    """How a row is read. ValueError names what is missing and the columns that are there."""
    have = sorted(columns)
    wanted = [*fields_of(source.input), *fields_of(source.answer), *fields_of(source.choices_column)]
    if missing := [column for column in wanted if column not in have]:
        raise ValueError(f"{where} has no columns {missing}; it has {have}.")
    if source.input is not None and source.answer is not None:
        return lambda row: columns_record(source, row)
    if {"prompt", "completion"} <= set(have):
        return prompt_completion_record
    for column in ("messages", "conversations"):
        if column in have:
            return lambda row: conversation_record(row[column])
    raise ValueError(
        f"{where}: which columns hold input and answer? It has {have}. Name them with `input` and `answer`, "
        f"or have `prompt` and `completion`, or `messages`."
    )


def fields_of(text: str | None) -> list[str]:
    """The columns of a template, or the one column that a plain text names."""
    if text is None:
        return []
    return [name for _, name, _, _ in string.Formatter().parse(text) if name] if "{" in text else [text]


def filled(text: str, row: Row) -> str:
    """A column's value, or a template with its columns filled in. ValueError for one without a value."""
    for column in fields_of(text):
        if row[column] is None or not str(row[column]).strip():
            raise ValueError(f"column {column!r} is empty. Take such rows out, e.g. by datasets' filter.")
    return text.format_map(row) if "{" in text else str(row[text])


def columns_record(source: DataSource, row: Row) -> Record:
    """Input, answer and choices from the columns that the source names."""
    if source.input is None or source.answer is None:
        raise ValueError("give input and answer.")
    choices = row[source.choices_column] if source.choices_column else source.choices
    answer = filled(source.answer, row).strip()
    options = [str(choice) for choice in choices]
    if options and answer not in options:
        if not answer.isdecimal() or int(answer) >= len(options):
            raise ValueError(
                f"the answer {answer!r} is none of its choices {options}, nor the number of one."
            )
        answer = options[int(answer)]
    return {"input": filled(source.input, row), "answer": answer, "choices": options}


def prompt_completion_record(row: Row) -> Record:
    """TRL's prompt and completion: two texts, or two lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation_record([*prompt, *completion])
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return {"input": prompt, "answer": completion.strip()}
    raise ValueError(f"prompt and completion must be two texts or two lists of messages, got {row!r}.")


def conversation_record(messages: object) -> Record:
    """The last assistant turn is the answer, what is before it the input."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"expected a list of messages {{role, content}}, got {messages!r}.")
    turns = [turn_of(message) for message in messages]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise ValueError(f"no assistant turn after another one in roles {[role for role, _ in turns]}.")
    before, answer = turns[:last], turns[last][1].strip()
    alone = len(before) == 1 and before[0][0] == "user"
    text = before[0][1] if alone else "\n".join(f"{role}: {content}" for role, content in before)
    return {"input": text, "answer": answer, "turns": before}


def turn_of(message: dict[str, Any]) -> list[str]:
    """[role, content]; `from` and `value` are read as TRL reads them, content blocks if all are text."""
    role, content = message.get("role") or message.get("from"), message.get("content") or message.get("value")
    if isinstance(content, list) and all(block.get("type") == "text" for block in content):
        content = "".join(str(block["text"]) for block in content)
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        raise ValueError(
            f"a message needs a role and a text content (no images, no tool calls), got {message!r}."
        )
    return [ROLES.get(role, role), content]
