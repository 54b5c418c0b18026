"""Every format that data comes in becomes the same task; what does not fit is named with what is there."""

import csv
import json

import datasets
import pytest

from ltdi_peft.task import Example, Task, TaskSuite

ROWS = [{"question": f"q{i} of them", "label": "yes" if i % 2 else "no", "n": i} for i in range(40)]
COLUMNS = {"input": "question", "answer": "label"}
PAIRS = {(row["question"], row["label"]) for row in ROWS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def task_of(path, **source):
    return Task.from_dataset(path, name="t", prompts=["Answer."], **source)


def pairs(task):
    return {(e.input, e.answer) for e in (*task.train, *task.evaluation)}


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_json(path):
    path.write_text(json.dumps(ROWS))


FORMATS = {
    "data.jsonl": lambda path: write_jsonl(path, ROWS),
    "data.json": write_json,
    "data.csv": write_csv,
    "data.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_one_task(name, tmp_path):
    FORMATS[name](tmp_path / name)
    task = task_of(tmp_path / name, **COLUMNS)
    assert pairs(task) == PAIRS
    assert 4 <= len(task.evaluation) <= 18  # a quarter of 40, by hash
    assert task == task_of(tmp_path / name, **COLUMNS)
    assert [e.answer for e in task.train[:8]] != ["no", "yes"] * 4  # drawn, not in the order of the file


def test_a_folder_of_data_files_is_what_load_dataset_makes_of_it(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:20])
    write_jsonl(folder / "test.jsonl", ROWS[10:])  # ten rows are in both: they leave the training part
    task = task_of(folder, evaluation_split="test", **COLUMNS)
    assert len(task.train) == 10
    assert {e.input for e in task.evaluation} == {row["question"] for row in ROWS[10:]}
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        task_of(folder, split="dev", **COLUMNS)


def test_saved_splits_and_class_labels(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), y=datasets.ClassLabel(names=["bad", "good"]))
    rows = [{"text": f"t{i}", "y": i % 2} for i in range(8)]
    both = {s: datasets.Dataset.from_list(rows, features=features) for s in ("a", "b")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "d")
    task = task_of(tmp_path / "d", split="a", input="text", answer="y", choices=["bad", "good"], limit=5)
    found = (*task.train, *task.evaluation)
    assert len(found) == 5
    assert all(e.answer == ("good" if int(e.input[1:]) % 2 else "bad") for e in found)
    assert {e.choices for e in found} == {("bad", "good")}
    hidden = datasets.Dataset.from_list([{"text": "t", "y": -1}], features=features)  # as test splits have it
    hidden.save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match=r"row 0: column 'y' is empty"):
        task_of(tmp_path / "hidden", input="text", answer="y")


def test_templates_and_numbered_choices(tmp_path):
    rows = [{"q": f"q{i}", "hint": "h", "options": ["red", "blue"], "right": i % 2} for i in range(6)]
    source = {"input": "{q} ({hint})", "answer": "right", "choices_column": "options", "evaluation_share": 0}
    task = task_of(write_jsonl(tmp_path / "d.jsonl", rows), **source)
    assert {(e.input, e.answer) for e in task.train} == {
        (f"q{i} (h)", ("red", "blue")[i % 2]) for i in range(6)
    }
    assert task.evaluation == ()
    rows[0]["right"] = 2
    with pytest.raises(ValueError, match=r"row 0: the answer '2' is none of its choices \['red', 'blue'\]"):
        task_of(write_jsonl(tmp_path / "e.jsonl", rows), **source)


# ---- TRL's formats


def test_prompt_and_completion(tmp_path):
    rows = [{"prompt": f"The sky {i} is", "completion": " blue."} for i in range(6)]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", rows))
    assert pairs(task) == {(f"The sky {i} is", "blue.") for i in range(6)}
    assert all(e.turns == () for e in task.train)


def test_chat_reads_plain_inputs_as_turns(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(6)]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", rows), chat=True)
    assert all(e.turns == (("user", e.input),) for e in (*task.train, *task.evaluation))


def test_conversational_prompt_and_completion(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": turns, "completion": [{"role": "assistant", "content": "Ho "}]}]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", rows), evaluation_share=0)
    said = (("system", "Be brief."), ("user", "Hi"))
    assert task.train == (Example("system: Be brief.\nuser: Hi", "Ho", turns=said),)


CONVERSATION = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]


@pytest.mark.parametrize(
    ("column", "role", "content", "names"),
    [
        ("messages", "role", "content", {}),
        ("conversations", "from", "value", {"user": "human", "assistant": "gpt"}),
    ],
)
def test_the_last_assistant_turn_is_the_answer(tmp_path, column, role, content, names):
    messages = [{role: names.get(who, who), content: said} for who, said in CONVERSATION]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", [{column: messages}]), evaluation_share=0)
    assert task.train == (Example("user: a\nassistant: b\nuser: c", "d", turns=tuple(CONVERSATION[:3])),)


def test_text_blocks_are_joined(tmp_path):
    blocks = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": blocks}]
    task = task_of(write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}]), evaluation_share=0)
    assert task.train == (Example("one two", "one two", turns=(("user", "one two"),)),)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"messages": [{"role": "user", "content": "a"}]}], r"row 0: no assistant turn .* \['user'\]"),
        ([{"messages": [{"role": "user", "content": ""}]}], "a message needs a role and a text content"),
        ([{"messages": "hello"}], "expected a list of messages"),
        ([{"prompt": "a", "completion": " "}], "prompt and completion must be two texts or two lists"),
    ],
)
def test_conversations_without_an_answer_are_refused(rows, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        task_of(write_jsonl(tmp_path / "d.jsonl", rows))


# ---- what does not fit


def test_missing_columns_name_those_that_are_there(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"has no columns \['text'\]; it has \['label', 'n', 'question'\]"):
        task_of(file, input="text", answer="label")
    with pytest.raises(ValueError, match=r"which columns hold input and answer\? It has \['label', 'n'"):
        task_of(file)
    with pytest.raises(ValueError, match="give input and answer both"):
        task_of(file, input="question")
    with pytest.raises(ValueError, match=r"unknown keys \['inputs'\]"):
        task_of(file, inputs="question")
    with pytest.raises(ValueError, match="choices or choices_column, not both"):
        task_of(file, choices=["a"], choices_column="n", **COLUMNS)
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        task_of(file, limit=0, **COLUMNS)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file, neither below \. nor here"):
        task_of("nowhere.csv", **COLUMNS)
    with pytest.raises(OSError, match="'someone/nothing' cannot be read"):  # the Hub may not be asked here
        task_of("someone/nothing", **COLUMNS)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"files are read that end in \['\.csv', '\.json'"):
        task_of(tmp_path / "d.txt", **COLUMNS)
    (tmp_path / "broken.json").write_text("{,")
    with pytest.raises(ValueError, match="cannot be read"):
        task_of(tmp_path / "broken.json", **COLUMNS)


# ---- in a suite


def test_a_line_of_a_suite_names_its_data(tmp_path):
    write_csv(tmp_path / "data.csv")
    lines = [
        {"name": "a", "prompts": ["Answer."], "dataset": {"path": "data.csv", **COLUMNS}},
        {"name": "b", "prompts": ["Reply."], "train": [["x", "y"]]},
    ]
    suite = TaskSuite.from_jsonl(write_jsonl(tmp_path / "tasks.jsonl", lines))
    assert pairs(suite["a"]) == PAIRS
    assert Task.from_dict(suite["a"].to_dict(), "again") == suite["a"]
    lines[1]["dataset"] = lines[0]["dataset"]
    with pytest.raises(ValueError, match=r"tasks.jsonl:2: give `dataset` or \['train'\], not both"):
        TaskSuite.from_jsonl(write_jsonl(tmp_path / "tasks.jsonl", lines))
    lines[0]["dataset"]["answer"] = "labels"
    with pytest.raises(ValueError, match=r"tasks.jsonl:1: .* has no columns \['labels'\]"):
        TaskSuite.from_jsonl(write_jsonl(tmp_path / "tasks.jsonl", lines))


def test_turns_survive_a_file(tmp_path):
    task = Task("t", ["Answer."], train=[Example("user: a", "b", turns=(("user", "a"),)), ("plain", "c")])
    assert Task.from_dict(json.loads(json.dumps(task.to_dict())), "file") == task
    with pytest.raises(ValueError, match=r"turns are \(role, content\) pairs"):
        Example("a", "b", turns=(("user", "a", "c"),))
