"""BIG-bench: files → tasks, prompts out of a description, the sdist, and the committed splits."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from tiny_bigbench import cached_bigbench, choices, record_like, write_bigbench

from ltdi_peft.suite import sdist
from ltdi_peft.suite.bigbench import BIGBENCH_SPLITS, UNSEEN_KEYWORDS
from ltdi_peft.suite.bigbench_plan import (
    LARGE,
    LEAST_EXAMPLES,
    LEAST_GAIN,
    MOST_CHOICE,
    MOST_INPUT,
    Candidate,
    candidate,
    gain,
    planned,
    write_bigbench_splits,
)
from ltdi_peft.suite.instructions import MOST_WORDS, instructions
from ltdi_peft.suite.sdist import RELEASE, bigbench_folder, unpack
from ltdi_peft.suite.splits import read_splits
from ltdi_peft.task import Example, TaskSuite, load_suite

# --- files


@pytest.fixture
def bigbench(tmp_path):
    root = tmp_path / "tasks"
    many = [{"input": f"q{n}", "target": [f"a{n}", "other"]} for n in range(100)]
    write_bigbench(
        root, "riddles/hard", name="hard", description="Solve.", keywords=["json", "logic"], examples=many
    )
    scores = [
        {"input": "tie", "target_scores": {"no": 0, "first": 1, "second": 1}},
        {"input": "tie", "target_scores": {"no": 0, "first": 1, "second": 1}},
        {"input": "best", "target_scores": {"no": 0.1, "yes": 0.7}},
        {"input": "number", "target": 7},
        {"input": "nothing"},
    ]
    write_bigbench(
        root, "riddles/easy", name="hard", description="Pick one.", keywords=["music"], examples=scores
    )
    write_bigbench(root, "nameless", description="Say it.", examples=[{"input": "q", "target": "a"}])
    write_bigbench(root, "empty", name="empty", description="Say it.", examples=[{"input": "q"}])
    write_bigbench(root, "program", name="program", description="Say it.")
    write_bigbench(root, "mute", name="mute", examples=[{"input": "q", "target": "a"}])
    return root


def test_names_families_domains(bigbench):
    suite = TaskSuite.from_bigbench(bigbench)
    assert set(suite.tasks) == {
        "nameless",
        "riddles/easy",
        "riddles/hard",
    }  # folders: two say they are "hard"
    assert {task.family for task in suite.tasks.values()} == {"nameless", "riddles"}
    assert suite["riddles/easy"].domain == "music"
    assert suite["riddles/hard"].domain == "logic"
    assert suite["nameless"].domain == "general"


def test_a_folder_of_one_task_is_named_like_it(bigbench):
    suite = TaskSuite.from_bigbench(bigbench / "riddles/easy")
    assert list(suite.tasks) == ["easy"]


def test_an_unseen_keyword_is_the_domain(tmp_path):
    about = {"description": "d", "keywords": ["logic", UNSEEN_KEYWORDS[0]], "examples": choices(4)}
    write_bigbench(tmp_path, "a", **about)
    assert TaskSuite.from_bigbench(tmp_path)["a"].domain == UNSEEN_KEYWORDS[0]


def test_answers(bigbench):
    task = TaskSuite.from_bigbench(bigbench)["riddles/easy"]
    examples = {e.input: e for e in (*task.train, *task.evaluation)}
    assert examples["tie"] == Example("tie", "first", ("no", "first", "second"))
    assert examples["best"].answer == "yes"
    assert examples["number"] == Example("number", "7")
    assert len(task.train) + len(task.evaluation) == 3  # the repeated and the answerless one are gone


def test_parts_are_by_input_and_shuffled(bigbench):
    many = TaskSuite.from_bigbench(bigbench)["riddles/hard"]
    assert {e.input for e in many.train}.isdisjoint(e.input for e in many.evaluation)
    assert 30 <= len(many.train) <= 70  # 50 expected, standard deviation 5
    assert many.train[0].answer.startswith("a")  # the first of the list of targets
    numbers = [int(e.input[1:]) for e in many.train]
    assert numbers != sorted(numbers)  # a file sorted by class must not give a first part of one class
    whole = TaskSuite.from_bigbench(bigbench, evaluation_fraction=0.0).tasks.values()
    assert all(not task.evaluation for task in whole)
    with pytest.raises(ValueError, match="between 0 and 1"):
        TaskSuite.from_bigbench(bigbench, evaluation_fraction=1.5)


def test_left_out_says_why(bigbench):
    reasons = {
        Path(path).parent.name: why for path, why in TaskSuite.from_bigbench(bigbench).left_out.items()
    }
    assert set(reasons) == {"empty", "program", "mute"}
    assert "none of its 1 examples" in reasons["empty"]
    assert "no list of examples" in reasons["program"]
    assert "no description" in reasons["mute"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no task\.json below it"):
        TaskSuite.from_bigbench(tmp_path)
    file = write_bigbench(tmp_path, "empty", name="empty", description="Say it.", examples=[])
    with pytest.raises(ValueError, match=r"(?s)is empty.*none of its 0 examples"):
        TaskSuite.from_bigbench(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"task\.json: not valid JSON"):
        TaskSuite.from_bigbench(tmp_path)


def test_a_split_file_chooses_what_is_read(bigbench, tmp_path):
    splits = tmp_path / "splits.json"
    record = {"format_version": 1, "splits": {"train": ["riddles/hard"], "unseen_tasks": ["nameless"]}}
    splits.write_text(json.dumps(record))
    (bigbench / "riddles/easy/task.json").write_text("{")  # not read, so not refused
    suite = TaskSuite.from_bigbench(bigbench, splits)
    assert set(suite.tasks) == {"riddles/hard", "nameless"}
    record["splits"]["train"] = ["riddles/gone"]
    splits.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="'riddles/gone', which is no task"):
        TaskSuite.from_bigbench(bigbench, splits)


# --- prompts


def test_prompts_hold_description_name_and_choices():
    prompts, held_out = instructions("code_jam/two_sum", "Find two numbers. They\nadd up.", ("yes", "no"))
    assert prompts[0] == "Find two numbers (two sum)."
    assert "code jam, two sum: Find two numbers (two sum)." in prompts
    assert "Task: Find two numbers (two sum). Answer yes or no." in prompts
    assert any("Find two numbers. They add up (two sum)." in prompt for prompt in (*prompts, *held_out))
    assert not set(prompts) & set(held_out)
    assert len({*prompts, *held_out}) == len(prompts) + len(held_out)


@pytest.mark.parametrize("description", ["One.", "One", "One. Two! Three?", "  spread \n out  ", "?"])
def test_prompts_are_equally_many_and_all_differ(description):
    for answers in ((), ("a",), ("a", "b"), tuple("abcdefgh")):
        prompts, held_out = instructions("name", description, answers)
        assert (len(set(prompts)), len(set(held_out))) == (8, 4)
        assert not set(prompts) & set(held_out)


def test_subtasks_with_one_description_are_told_apart():
    one, other = (instructions(name, "Convert.", ()) for name in ("units/si", "units/old"))
    assert not {*one[0], *one[1]} & {*other[0], *other[1]}


def test_long_descriptions_and_many_choices_are_cut():
    prompts, _ = instructions("name", " ".join(["word"] * 500), [f"choice {n}" for n in range(9)])
    assert max(prompt.count("word") for prompt in prompts) == MOST_WORDS
    assert not any("choice 1" in prompt for prompt in prompts)


# --- the sdist


def write_sdist(path: Path, tasks: dict[str, dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, record in tasks.items():
            for file in (f"{name}/task.json", f"{name}/README.md"):
                content = json.dumps(record).encode()
                member = tarfile.TarInfo(f"{RELEASE}/bigbench/benchmark_tasks/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def no_index(*arguments):
    raise OSError("pip is offline")


TASKS = {"a": record_like("train"), "b/one": record_like("train"), "c": record_like("train")}


def test_an_archive_in_the_cache_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sdist, "pip_download", no_index)
    archive = write_sdist(tmp_path / f"suites/{RELEASE}.tar.gz", TASKS)
    folder = bigbench_folder(["a", "b/one"], tmp_path)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["a/task.json", "b/one/task.json"]  # what was asked for, and nothing else
    assert json.loads((folder / "a/task.json").read_text()) == TASKS["a"]
    archive.unlink()
    assert bigbench_folder(["a"], tmp_path) == folder  # needs no archive any more
    with pytest.raises(OSError, match=r"pip is offline Put it there as .*bigbench-1\.0\.0\.tar\.gz, or give"):
        bigbench_folder(["a", "c"], tmp_path)


def test_the_archive_is_fetched_and_not_kept(tmp_path, monkeypatch):
    asked = []

    def download(requirement, work, pattern, *options):
        asked.append((requirement, options))
        return write_sdist(work / pattern, TASKS)

    monkeypatch.setattr(sdist, "pip_download", download)
    bigbench_folder(["a"], tmp_path)
    assert asked == [("bigbench==1.0.0", ("--no-binary", ":all:"))]
    assert [path.name for path in (tmp_path / "suites").iterdir()] == [RELEASE]
    bigbench_folder(["a"], tmp_path)
    assert len(asked) == 1


def test_a_broken_or_incomplete_archive_is_named(tmp_path):
    archive = write_sdist(tmp_path / f"suites/{RELEASE}.tar.gz", TASKS)
    with pytest.raises(ValueError, match="has no task 'd'; 1 of the tasks"):
        bigbench_folder(["a", "d"], tmp_path)
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"tar\.gz is broken \(.*\); remove it"):
        unpack(archive, tmp_path / "elsewhere", {"c"})
    archive.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="is broken"):
        unpack(archive, tmp_path / "elsewhere", {"c"})


# --- the plan


def words(text: str) -> int:
    return len(text.split())


def plan_file(root, name, **changes):
    return write_bigbench(root, name, **(record_like("train") | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("few", {"examples": choices(LEAST_EXAMPLES - 1)}),
        ("foreign", {"keywords": ["translation"]}),
        ("alphabet", {"examples": choices(60, text="вопрос вопрос")}),
        ("long", {"examples": choices(60, text="word " * MOST_INPUT)}),
        ("wordy", {"examples": choices(60, labels=("yes " * (MOST_CHOICE + 1), "no"))}),
        ("many", {"examples": choices(60, labels=[f"label{n}" for n in range(11)])}),
        ("free", {"examples": [{"input": f"q{n}", "target": "a"} for n in range(60)]}),
        ("lopsided", {"examples": [{**e, "input": ""} | {"target_scores": {f"a{n}": 1, "b": 0}}
                                   for n, e in enumerate(choices(60))]}),
    ],
)  # fmt: skip
def test_what_does_not_suit_is_no_candidate(tmp_path, name, changes):
    assert candidate(name, plan_file(tmp_path, name, **changes), words) is None
    good = candidate("good", plan_file(tmp_path, "good"), words)
    assert good == Candidate("good", "logical reasoning", 2 * (2 + 1.0))  # choices · (input + answer)


def made_candidates():
    small = [Candidate(f"group{n}", "logic", float(n)) for n in range(20)]
    large = [Candidate(f"large/{n}", "logic", float(n)) for n in range(LARGE + 1)]
    held = [Candidate("held/a", "logic", 1.0), Candidate("held/b", UNSEEN_KEYWORDS[1], 2.0)]
    return [*small, *large, *held]


def test_groups_are_never_divided():
    splits = planned(made_candidates(), {}).splits
    assert planned(made_candidates()[3:], {}).splits["train"] == tuple(
        name for name in splits["train"] if name not in {"group0", "group1", "group2"}
    )  # other groups move nothing
    assert splits["unseen_domains"] == ("held/b",)
    assert planned(made_candidates(), {}).left_out == {
        "held/a": "its group is of an unseen domain, but this task is not"
    }
    assert {f"large/{n}" for n in range(LARGE + 1)} <= set(splits["train"])
    assert (len(splits["validation"]), len(splits["unseen_tasks"])) == (5, 5)
    assert planned(reversed(made_candidates()), {}).splits == splits


def test_measured_tasks_come_first_or_go():
    free = planned(made_candidates(), {}).splits["unseen_tasks"]
    assert [int(name.removeprefix("group")) for name in free] == sorted(
        int(name.removeprefix("group")) for name in free
    )  # the cheap ones first
    measured = {free[-1]: {"base": 0.5, "oracle": 0.7}, free[0]: {"base": 0.5, "oracle": 0.6}}
    plan = planned(made_candidates(), measured)
    assert plan.splits["unseen_tasks"] == (free[-1], *free[1:-1])
    assert plan.left_out[free[0]] == "its own LoRA gains +0.10 (0.50 → 0.60), below 0.15"
    assert plan.calibration == measured


def test_a_plan_is_written_and_loaded(tmp_path):
    root = tmp_path / "tasks"
    for n in range(12):
        plan_file(root, f"group{n}", examples=choices(60, text=f"question of {n}"))
    plan_file(root, "true", keywords=["theory of mind"])
    path = tmp_path / "splits.json"
    measured = {"group3": {"base": 0.2, "oracle": 0.9, "chance": 0.5, "constant": 0.5}}
    write_bigbench_splits(root, words, measured, path)
    suite = TaskSuite.from_bigbench(root, path)
    assert suite.calibration == measured
    assert [task.name for task in suite.split("unseen_domains")] == ["true"]
    rows = {row["name"]: row for row in suite.table()}
    assert (rows["group3"]["base"], rows["group3"]["oracle"], rows["true"]["oracle"]) == (0.2, 0.9, None)
    suite.save_splits(tmp_path / "again.json")
    assert read_splits(tmp_path / "again.json").calibration == measured


# --- the committed splits


def test_the_committed_splits_load_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sdist, "pip_download", no_index)
    monkeypatch.setenv("LTDI_CACHE", str(cached_bigbench(tmp_path, BIGBENCH_SPLITS)))
    suite = load_suite("bigbench")
    assert len(suite.tasks) == len(read_splits(BIGBENCH_SPLITS).names)
    assert {task.domain for task in suite.split("unseen_domains")} <= set(UNSEEN_KEYWORDS)
    assert all(task.evaluation and task.train for task in suite.tasks.values())


def test_the_committed_splits_keep_their_promises():
    content = read_splits(BIGBENCH_SPLITS)
    groups = {split: {name.split("/")[0] for name in names} for split, names in content.splits.items()}
    for split, own in groups.items():
        for other, theirs in groups.items():
            assert split == other or not own & theirs, (split, other)
    for name, values in content.calibration.items():
        assert (name in content.left_out) == (gain(values) < LEAST_GAIN)
        assert (name in content.left_out) != (name in content.names)
    assert len(content.calibration) >= 20
    assert set(content.left_out) <= set(content.calibration)  # no other reason has come up
    assert all(0 < values["chance"] <= 0.5 for values in content.calibration.values())
