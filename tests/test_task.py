"""Tasks and suites: what must not be built cannot be, what is written is read back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltdi_peft.task import SPLITS, Example, Task, TaskSuite


def make_task(name: str, **fields) -> Task:
    prompts = fields.pop("prompts", (f"Do {name}.", f"Please do {name}."))
    return Task(name, prompts, **fields)


def make_suite(**splits) -> TaskSuite:
    tasks = {
        n: make_task(n, domain=n[0], train=[(f"in {n}", "x")]) for names in splits.values() for n in names
    }
    return TaskSuite("small", tasks, splits)


def write_jsonl(path: Path, tasks) -> Path:
    path.write_text("\n".join(json.dumps(task.to_dict()) for task in tasks) + "\n\n")
    return path


# --- Example and Task


def test_sequences_become_tuples_and_pairs_examples():
    task = Task("t", ["a", "b"], train=[("1", "x"), {"input": "2", "answer": "y", "choices": ["x", "y"]}])
    assert task.prompts == ("a", "b")
    assert task.train == (Example("1", "x"), Example("2", "y", ("x", "y")))
    assert task.family == "t"
    assert task.evaluation == ()


def test_held_out_prompts_fall_back_to_prompts():
    assert make_task("t", prompts=("a",)).held_out_prompts == ("a",)
    assert make_task("t", prompts=("a",), evaluation_prompts=("b",)).held_out_prompts == ("b",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": " ", "prompts": ("a",)}, "non-blank name"),
        ({"name": "t", "prompts": ()}, "'t' has no prompts"),
        ({"name": "t", "prompts": ("a", " ")}, "non-blank text"),
        ({"name": "t", "prompts": "abc"}, "list of sentences"),
        ({"name": "t", "prompts": ("a", "a")}, "repeats a prompt"),
        (
            {"name": "t", "prompts": ("a",), "evaluation_prompts": ("a",)},
            "both a training and a held-out prompt",
        ),
        (
            {"name": "t", "prompts": ("a",), "train": [("1", "x")], "evaluation": [("1", "x")]},
            "both in train and in",
        ),
        ({"name": "t", "prompts": ("a",), "train": [("1", " ")]}, "non-blank text answer"),
        ({"name": "t", "prompts": ("a",), "train": [("1", "x", ["y"])]}, "not among its choices"),
        ({"name": "t", "prompts": ("a",), "train": ["1 x"]}, "an example is"),
    ],
)
def test_half_valid_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(**fields)


def test_the_same_input_with_another_answer_is_another_example():
    task = make_task("t", train=[("1", "x")], evaluation=[("1", "y")])
    assert len(task.train) == len(task.evaluation) == 1


def test_dict_round_trip():
    task = make_task(
        "t",
        domain="d",
        family="f",
        train=[("1", "x"), ("2", "y", ("x", "y"))],
        evaluation=[("3", "z")],
        evaluation_prompts=("held",),
    )
    assert Task.from_dict(json.loads(json.dumps(task.to_dict())), "here") == task


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "t", "prompts": ["a"], "prompt": "a"}, r"here:3: unknown keys \['prompt'\]"),
        ({"name": "t"}, r"here:3: missing keys \['prompts'\]"),
        ({"name": "t", "prompts": ["a"], "train": [["1"]]}, r"here:3: task 't': an example is .*got \['1'\]"),
        ({"name": "t", "prompts": ["a"], "train": [["1", "b", "abc"]]}, "an example is .*'abc'"),
        ({"name": "t", "prompts": ["a"], "train": [{"input": "1", "output": "2"}]}, "an example is .*output"),
        ({"name": "t", "prompts": ["a"], "train": [["1", 2]]}, "a text input and a non-blank text answer"),
        ({"name": "t", "prompts": []}, "here:3: .*no prompts"),
    ],
)
def test_from_dict_says_where(record, message):
    with pytest.raises(ValueError, match=message):
        Task.from_dict(record, "here:3")


# --- TaskSuite


def test_split_order_is_kept_and_every_split_exists():
    suite = make_suite(train=("b", "a"), unseen_tasks=("c",))
    assert [task.name for task in suite.split("train")] == ["b", "a"]
    assert tuple(suite.splits) == SPLITS
    assert suite.split("validation") == ()
    assert suite["a"].name == "a"


def test_unknown_names_are_refused():
    suite = make_suite(train=("a",))
    with pytest.raises(KeyError, match="no task 'z'"):
        suite["z"]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        suite.split("test")


def test_a_task_stands_under_its_own_name():
    tasks = make_suite(train=("a", "b")).tasks
    with pytest.raises(ValueError, match=r"task 'a' stands under 'x'; expected \{task\.name: task\}"):
        TaskSuite("s", {"x": tasks["a"]}, {"train": ("x",)})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": ("a", "b")}, r"unknown splits \['test'\]"),
        ({"train": ("a", "b"), "validation": ("b",)}, "'b' is in 'train' and 'validation'"),
        ({"train": ("a", "b", "a")}, "'a' is in 'train' and 'train'"),
        ({"train": ("a", "b", "ghost")}, "names 'ghost', which is no task"),
        ({"train": ("a",)}, "1 tasks are in no split, e.g. 'b'"),
    ],
)
def test_broken_splits_are_refused(splits, message):
    with pytest.raises(ValueError, match=message):
        TaskSuite("s", {"a": make_task("a"), "b": make_task("b")}, splits)


def test_an_empty_suite_is_refused():
    with pytest.raises(ValueError, match="'s' is empty"):
        TaskSuite("s", {}, {})


def test_a_family_may_not_cross_splits():
    tasks = {n: make_task(n, family="f") for n in "ab"}
    with pytest.raises(
        ValueError, match="family 'f' crosses splits: 'a' is in 'train', 'b' in 'unseen_tasks'"
    ):
        TaskSuite("s", tasks, {"train": ("a",), "unseen_tasks": ("b",)})
    assert TaskSuite("s", tasks, {"train": ("a", "b")}).split("train")  # the control: one split is fine


def test_an_unseen_domain_may_not_be_trained():
    tasks = {n: make_task(n, domain="d") for n in "ab"}
    with pytest.raises(ValueError, match="unseen domain 'd' crosses splits"):
        TaskSuite("s", tasks, {"train": ("a",), "unseen_domains": ("b",)})
    assert TaskSuite("s", tasks, {"train": ("a",), "unseen_tasks": ("b",)})  # a seen domain may be shared


def test_parts_take_prefixes():
    suite = make_suite(train=("a", "b", "c"), validation=("d",), unseen_tasks=("e", "f"))
    part = suite.parts(train=2, validation=0)
    assert part.splits == {
        "train": ("a", "b"),
        "validation": (),
        "unseen_tasks": ("e", "f"),
        "unseen_domains": (),
    }
    assert set(part.tasks) == {"a", "b", "e", "f"}
    with pytest.raises(ValueError, match=r"parts\(train=4\): suite 'small' has 3 tasks"):
        suite.parts(train=4)
    with pytest.raises(ValueError, match=r"parts\(train=-1\)"):
        suite.parts(train=-1)
    with pytest.raises(ValueError, match="unknown split"):
        suite.parts(test=1)


def test_table_has_a_row_a_task():
    rows = make_suite(train=("a",), unseen_tasks=("b",)).table()
    assert rows[1] == {
        "name": "b",
        "domain": "b",
        "family": "b",
        "split": "unseen_tasks",
        "examples": 1,
        "prompt": "Do b.",
        "example": "in b → x",
    }
    bare = TaskSuite("s", {"a": make_task("a")}, {"train": ("a",)})
    assert bare.table()[0]["example"] == ""  # a task without examples is allowed: weight-space use


# --- split files and JSONL


def test_split_file_round_trip(tmp_path):
    suite = make_suite(train=("b", "a"), unseen_tasks=("c",))
    jsonl, splits = write_jsonl(tmp_path / "small.jsonl", suite.tasks.values()), tmp_path / "splits.json"
    suite.save_splits(splits)
    first = splits.read_bytes()
    again = TaskSuite.from_jsonl(jsonl, splits)
    assert again == suite
    again.save_splits(splits)
    assert splits.read_bytes() == first
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "splits.json: format_version is 2, this version of ltdi_peft reads 1"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"splits": {"test": []}}, r"unknown splits \['test'\]"),
        ({"splits": {"train": "a"}}, "list of task names"),
        ({"splits": {"train": ["ghost"]}}, "splits.json: .*'ghost', which is no task"),
        ({"folds": {"a": "one"}}, "`folds` must map"),
    ],
)
def test_broken_split_files_are_refused(tmp_path, change, message):
    suite = make_suite(train=("a",))
    jsonl, splits = write_jsonl(tmp_path / "s.jsonl", suite.tasks.values()), tmp_path / "splits.json"
    suite.save_splits(splits)
    splits.write_text(json.dumps(json.loads(splits.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        TaskSuite.from_jsonl(jsonl, splits)


def test_what_the_split_file_leaves_out_is_listed(tmp_path):
    suite = make_suite(train=("a", "b"))
    jsonl, splits = write_jsonl(tmp_path / "s.jsonl", suite.tasks.values()), tmp_path / "splits.json"
    suite.save_splits(splits)
    record = json.loads(splits.read_text()) | {"left_out": {"b": "gap 0.02"}, "splits": {"train": ["a"]}}
    splits.write_text(json.dumps(record))
    part = TaskSuite.from_jsonl(jsonl, splits)
    assert list(part.tasks) == ["a"]
    assert part.left_out == {"b": "gap 0.02"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"name": "a", "prompts": ["p"]}\n{"name": ', "s.jsonl:2: not valid JSON"),
        ("[1]", "s.jsonl:1: expected a JSON object"),
        ('{"name": "a", "prompts": ["p"]}\n{"name": "a", "prompts": ["q"]}', "two tasks are called 'a'"),
    ],
)
def test_broken_jsonl_is_refused(tmp_path, text, message):
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TaskSuite.from_jsonl(path)


# --- hashed splits


def test_hashed_splits_follow_fractions_and_families(tmp_path):
    tasks = [make_task(f"t{n}", family=f"f{n // 2}", domain=f"d{n % 10 // 2}") for n in range(400)]
    path = write_jsonl(tmp_path / "s.jsonl", tasks)
    suite = TaskSuite.from_jsonl(path)
    # 200 families of 2: the share of unseen_tasks is 0.2 with standard deviation 0.028, four of them here.
    assert 0.08 < len(suite.splits["unseen_tasks"]) / 400 < 0.32
    assert suite.splits["unseen_domains"] == ()
    assert set(TaskSuite.from_jsonl(path, fractions={}).splits["train"]) == {t.name for t in tasks}
    more = write_jsonl(tmp_path / "more.jsonl", [*tasks, make_task("new")])
    grown = TaskSuite.from_jsonl(more)
    assert all(set(suite.splits[s]) <= set(grown.splits[s]) for s in SPLITS)  # adding a task moves no other
    by_domain = TaskSuite.from_jsonl(path, fractions={"unseen_domains": 0.5})
    held = {suite[n].domain for n in by_domain.splits["unseen_domains"]}
    assert held.isdisjoint({suite[n].domain for n in by_domain.splits["train"]})


def test_bad_fractions_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [make_task("a")])
    with pytest.raises(ValueError, match=r"unknown splits \['test'\]"):
        TaskSuite.from_jsonl(path, fractions={"test": 0.1})
    with pytest.raises(ValueError, match="leave a share for train"):
        TaskSuite.from_jsonl(path, fractions={"validation": 0.5, "unseen_tasks": 0.5})
    make_suite(train=("a",)).save_splits(tmp_path / "splits.json")
    with pytest.raises(ValueError, match="not both"):
        TaskSuite.from_jsonl(path, tmp_path / "splits.json", fractions={})


# --- what a process could change


def test_tasks_are_light_and_equal_in_every_process(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [make_task(f"t{n}") for n in range(50)])
    program = (
        "import sys; from ltdi_peft.task import TaskSuite; s = TaskSuite.from_jsonl(sys.argv[1]);"
        "print(s.splits, 'torch' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().endswith("False\n")
