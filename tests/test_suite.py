"""The built-in suite keeps the promises of EVALUATION.md; each check is shown to catch its fault."""

import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from ltdi_peft.config import SuiteConfig
from ltdi_peft.suite import BUILTIN_SPLITS, DOMAINS, UNSEEN_DOMAINS
from ltdi_peft.suite.design import (
    Domain,
    Format,
    Question,
    drawn,
    evaluation_inputs,
    grouped,
    joined,
    paired_prompts,
)
from ltdi_peft.suite.formats import FORMATS
from ltdi_peft.suite.grammar import past, progressive, with_s
from ltdi_peft.suite.numbers import in_words
from ltdi_peft.suite.plan import (
    AROUND,
    CHANGES_A_QUESTION,
    MAX_AGREEMENT,
    MAX_SHARE,
    Cell,
    agreement,
    chosen_cells,
    planned_splits,
    varied,
)
from ltdi_peft.suite.wordings import further
from ltdi_peft.task import TaskSuite, load_suite


@pytest.fixture(scope="module")
def suite() -> TaskSuite:
    return TaskSuite.builtin()


def parts_of(name: str) -> tuple[str, str, str]:
    """(domain, question, format) of a task name; a stand-alone task has no format."""
    domain, question, *rest = name.split("/")
    return domain, question, rest[0] if rest else ""


def question_of(name: str) -> tuple[str, str]:
    return parts_of(name)[:2]


# --- size


def test_size(suite):
    sizes = {split: len(names) for split, names in suite.splits.items()}
    assert len(suite.tasks) >= 120
    assert len({task.domain for task in suite.tasks.values()}) >= 10
    assert sizes["train"] >= 64
    assert sizes["unseen_tasks"] >= 48
    assert sizes["validation"] >= 12
    assert sizes["unseen_domains"] >= 16
    assert {task.domain for task in suite.split("unseen_domains")} == set(UNSEEN_DOMAINS)
    assert sum(parts_of(name)[2] == "" for name in suite.tasks) >= 10


def test_every_task_has_prompts_and_examples(suite):
    for task in suite.tasks.values():
        assert len(task.prompts) >= 8, task.name
        assert len(task.evaluation_prompts) >= 3, task.name
        assert len(task.train) >= 100, task.name
        assert len(task.evaluation) >= 100, task.name
        assert max(len(e.input.split()) for e in task.train) < 20, task.name
        assert max(len(e.answer) for e in task.train) <= 40, task.name


def test_design_is_sparse_and_balanced(suite):
    formats, domains = defaultdict(set), defaultdict(set)
    for domain, question, answer_format in map(parts_of, suite.tasks):
        if answer_format:
            formats[domain, question].add(answer_format)
            domains[answer_format].add(domain)
    around = {f.name for f in FORMATS if f.group in AROUND}
    for met in formats.values():
        assert around <= met
        assert len(met - around) <= CHANGES_A_QUESTION
    assert set(domains) == {f.name for f in FORMATS}
    assert min(map(len, domains.values())) >= 5
    assert all(len(domain.questions) >= 3 for domain in DOMAINS)
    uses = Counter(parts_of(name)[2] for name in suite.tasks if parts_of(name)[2] not in {"", *around})
    assert max(uses.values()) - min(uses.values()) <= 2


def test_paraphrases_are_enough():
    for q in [q for domain in DOMAINS for q in domain.questions]:
        assert (len(q.ask) >= 5, len(q.held_out) >= 2) == (True, True), q.name
    for f in FORMATS:
        assert (len(f.ask) >= 4, len(f.held_out) >= 2) == (True, True), f.name


# --- answers


def test_answers_vary(suite):
    for task in suite.tasks.values():
        assert varied([e.answer for e in task.train + task.evaluation]), task.name


def test_varied_catches_a_constant():
    assert varied(["a"] * 6 + ["b"] * 4)
    assert not varied(["a"] * 7 + ["b"] * 3)
    assert MAX_SHARE == 0.6


def test_shared_inputs_want_different_answers(suite):
    by_domain = defaultdict(list)
    for task in suite.tasks.values():
        by_domain[task.domain].append(task)
    for tasks in by_domain.values():
        inputs = [e.input for e in tasks[0].evaluation]
        assert all([e.input for e in task.evaluation] == inputs for task in tasks)
        answers = [[e.answer for e in task.evaluation] for task in tasks]
        for i, first in enumerate(answers):
            for second in answers[:i]:
                # Planned on all inputs, seen here on half of them: room for the difference.
                assert agreement(first, second) <= MAX_AGREEMENT + 0.1


def test_design_refuses_formats_that_change_nothing():
    items = tuple({"input": str(n), "parity": "odd" if n % 2 else "even"} for n in range(10))
    digits = Question("digits", lambda i: i["input"], ("Copy it.",), ("Repeat it.",))
    cells = chosen_cells([Domain("d", items, (digits,))], FORMATS)
    chosen = {cell.format for cell in cells}
    assert chosen
    assert chosen.isdisjoint(
        {"upper", "title", "spelled", "initial"}
    )  # digits have no case, one has no letters
    constant = Format("constant", "constant", lambda a: "x", ("Say x.",), ("Utter x.",))
    assert chosen_cells([Domain("d", items, (digits,))], [constant]) == []


# --- nothing leaks


def test_no_input_is_in_both_parts_of_a_domain(suite):
    train, evaluation = defaultdict(set), defaultdict(set)
    for task in suite.tasks.values():
        train[task.domain] |= {e.input for e in task.train}
        evaluation[task.domain] |= {e.input for e in task.evaluation}
    assert all(train[domain].isdisjoint(evaluation[domain]) for domain in train)
    assert all(len(train[domain]) + len(evaluation[domain]) >= 220 for domain in train)


def test_held_out_prompts_are_never_training_prompts(suite):
    trained = {prompt for task in suite.tasks.values() for prompt in task.prompts}
    held_out = {prompt for task in suite.tasks.values() for prompt in task.evaluation_prompts}
    assert trained.isdisjoint(held_out)
    sentences = {s for d in DOMAINS for q in d.questions for s in q.ask}
    sentences |= {s for f in FORMATS for s in f.ask}
    held = {s for d in DOMAINS for q in d.questions for s in q.held_out} | {
        s for f in FORMATS for s in f.held_out
    }
    assert sentences.isdisjoint(held)  # nor is any part of one


@pytest.mark.parametrize("wordings", ["few", "many"])
def test_a_prompt_asks_for_one_task_only(wordings):
    """Within a domain: the same input and prompt with two answers could not be learned."""
    for split in ("prompts", "evaluation_prompts"):
        owner = {}
        for task in TaskSuite.builtin(wordings=wordings).tasks.values():
            for prompt in vars(task)[split]:
                assert owner.setdefault((task.domain, prompt), task.name) == task.name


def test_families_hold_one_question(suite):
    families = defaultdict(list)
    for task in suite.tasks.values():
        families[task.family].append(task.name)
    assert max(map(len, families.values())) <= 5
    assert all(len(set(map(question_of, names))) == 1 for names in families.values())
    group = {f.name: f.group for f in FORMATS}
    groups = Counter((*question_of(n), group[parts_of(n)[2]]) for n in suite.tasks if parts_of(n)[2])
    assert max(groups.values()) <= 5


# --- splits


def test_held_out_tasks_are_covered_by_train(suite):
    questions = Counter(map(question_of, suite.splits["train"]))
    formats = Counter(parts_of(name)[2] for name in suite.splits["train"])
    for name in suite.splits["unseen_tasks"] + suite.splits["validation"]:
        assert questions[question_of(name)] >= 2, name
        assert formats[parts_of(name)[2]] >= 3, name


def uncovered(train: tuple[str, ...], held_out: tuple[str, ...]) -> list[str]:
    questions, formats = set(map(question_of, train)), {parts_of(name)[2] for name in train}
    return [n for n in held_out if question_of(n) not in questions or parts_of(n)[2] not in formats]


def test_prefixes_are_covered_and_spread(suite):
    small = suite.parts(train=48, unseen_tasks=16, validation=8)
    assert uncovered(small.splits["train"], small.splits["unseen_tasks"]) == []
    assert uncovered(small.splits["train"], small.splits["validation"]) == []
    seen = len(DOMAINS) - len(UNSEEN_DOMAINS)
    for split, names in small.splits.items():
        if split != "unseen_domains":
            counts = Counter(parts_of(name)[0] for name in names)
            assert max(counts.values()) - min(counts.values()) <= 1, split
            assert len(counts) == min(seen, len(names)), split


def test_uncovered_catches_a_reversed_order(suite):
    assert uncovered(suite.splits["train"][::-1][:48], suite.splits["unseen_tasks"][:16])


def test_folds_leave_every_domain_out_once(suite):
    assert set(suite.folds) == {domain.name for domain in DOMAINS}
    assert {domain for domain, fold in suite.folds.items() if fold == 0} == set(UNSEEN_DOMAINS)
    assert max(Counter(suite.folds.values()).values()) <= 3


@pytest.mark.parametrize("number", [0, 1, 6])
def test_a_fold_makes_its_domains_unseen(suite, number):
    fold = suite.fold(number)
    unseen = {domain for domain, n in suite.folds.items() if n == number}
    assert {task.domain for task in fold.split("unseen_domains")} == unseen
    everything = {name for name, task in suite.tasks.items() if task.domain in unseen}
    assert set(fold.splits["unseen_domains"]) == everything
    for split in ("train", "validation", "unseen_tasks"):
        expected = tuple(name for name in suite.splits[split] if suite[name].domain not in unseen)
        assert fold.splits[split] == expected
    assert set(fold.folds) == {task.domain for task in fold.tasks.values()}
    assert (fold.splits == suite.splits) == (number == 0)


def test_an_unknown_fold_is_named(suite):
    with pytest.raises(ValueError, match=r"no fold 7; its folds are \[0, 1, 2, 3, 4, 5, 6\]"):
        suite.fold(7)


def test_round_robin_survives_uneven_domains():
    cells = [
        Cell(d, q, f, f)
        for d, q in (("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"))
        for f in ("wrap", "end", "lead")
    ]
    content = planned_splits([*cells, Cell("c", "1", "end", "end"), Cell("b", "alone", "")], ["c"])
    assert content.splits["unseen_domains"] == ("c/1/end",)
    assert content.splits["train"][-1] == "b/alone"
    assert sum(map(len, content.splits.values())) == 14


def test_same_suite_and_split_bytes_under_any_hash_seed(tmp_path):
    program = (
        "import sys, time, hashlib; from pathlib import Path\n"
        "from ltdi_peft.suite import write_builtin_splits; from ltdi_peft.task import TaskSuite\n"
        "start = time.process_time(); suite = TaskSuite.builtin(); seconds = time.process_time() - start\n"
        "write_builtin_splits(Path(sys.argv[1]))\n"
        "content = [task.to_dict() for task in suite.tasks.values()]\n"
        "print(hashlib.sha256(repr(content).encode()).hexdigest(), 'torch' in sys.modules)\n"
        "print(seconds, file=sys.stderr)"
    )
    outputs = set()
    for seed in ("0", "1"):
        path = tmp_path / f"splits-{seed}.json"
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
        assert float(done.stderr) < 1.2  # CPU seconds: 0.15 to 0.55 on an idle core, doubled for a shared one
        assert path.read_bytes() == BUILTIN_SPLITS.read_bytes(), (
            "the suite changed: run ltdi_peft.suite.write_builtin_splits() and commit splits.json"
        )
    assert len(outputs) == 1
    assert outputs.pop().endswith("False\n")


# --- the rules and helpers


@pytest.mark.parametrize(
    ("rule", "word", "expected"),
    [
        (past, "go", "went"),
        (past, "carry", "carried"),
        (past, "stop", "stopped"),
        (past, "play", "played"),
        (past, "arrive", "arrived"),
        (progressive, "lie", "lying"),
        (progressive, "see", "seeing"),
        (progressive, "run", "running"),
        (progressive, "make", "making"),
        (with_s, "go", "goes"),
        (with_s, "cry", "cries"),
        (with_s, "box", "boxes"),
        (with_s, "day", "days"),
        (in_words, 40, "forty"),
        (in_words, 17, "seventeen"),
        (in_words, 261, "two hundred sixty-one"),
        (in_words, 200, "two hundred"),
    ],
)
def test_rules(rule, word, expected):
    assert rule(word) == expected


def test_evaluation_inputs_are_half_and_depend_on_the_text_only():
    items = tuple({"input": str(n)} for n in range(40))
    half = evaluation_inputs(Domain("d", items, ()))
    assert len(half) == 20
    assert evaluation_inputs(Domain("d", items[::-1], ())) == half
    assert evaluation_inputs(Domain("other", items, ())) != half


def test_paired_prompts_are_distinct_and_balanced():
    prompts = paired_prompts(["a", "b", "c", "d", "e"], ["1", "2", "3", "4"], 12)
    assert len(set(prompts)) == 12
    assert set(Counter(p.split()[1] for p in prompts).values()) == {3}
    assert len(paired_prompts(["a", "b"], ["1", "2"], 12)) == 4  # all there are
    assert joined("Ask.", "{} Say.") == joined("Ask.", "Say.") == "Ask. Say."


def test_word_lists_refuse_mistakes():
    assert grouped("kind", "thing: frying_pan\nbig_thing: ship") == (
        {"input": "frying pan", "kind": "thing"},
        {"input": "ship", "kind": "big thing"},
    )
    with pytest.raises(ValueError, match="'cat' twice"):
        grouped("kind", "mammal: cat dog\npet: cat")
    with pytest.raises(ValueError, match="shorter than"):
        grouped("kind legs", "mammal: cat")
    with pytest.raises(ValueError, match="'few' has only 2 distinct inputs, 3 were asked for"):
        drawn("few", 3, lambda rng: {"input": rng.choice("ab")})


# ---- many wordings


@pytest.fixture(scope="module")
def many():
    return TaskSuite.builtin(wordings="many")


def parts():
    """Kind and key of every part that can be worded → its own wordings."""
    found = {("questions", f"{d.name}/{q.name}"): q.ask for d in DOMAINS for q in d.questions}
    found |= {("questions", f"{d.name}/{a.name}"): a.prompts for d in DOMAINS for a in d.alone}
    return found | {("formats", f.name): f.ask for f in FORMATS}


def test_further_wordings_are_of_known_parts_and_each_is_new():
    known, held_out = parts(), {s for d in DOMAINS for q in d.questions for s in q.held_out}
    held_out |= {s for f in FORMATS for s in f.held_out} | {
        s for d in DOMAINS for a in d.alone for s in a.held_out
    }
    count = 0
    for kind, table in further().items():
        for key, texts in table.items():
            own = known[kind, key]
            assert len(texts) >= 15, key
            assert len({*texts, *own}) == len(texts) + len(own), key
            assert held_out.isdisjoint(texts), key
            for text in texts:
                assert text == text.strip(), text
                assert "\n" not in text, text
                assert text.format("x").count("x") - text.count("x") in (
                    (0, 1) if kind == "formats" else (0,)
                ), text
            count += len(texts)
    assert count > 500


def test_many_wordings_change_training_prompts_alone(suite, many):
    assert many.splits == suite.splits
    more = 0
    for name, task in suite.tasks.items():
        other = many[name]
        assert (other.train, other.evaluation) == (task.train, task.evaluation)
        assert other.evaluation_prompts == task.evaluation_prompts
        assert len(set(other.prompts)) == len(other.prompts)
        assert set(other.prompts).isdisjoint(task.held_out_prompts)
        more += len(other.prompts) > len(task.prompts)
    assert more > 400
    domain, question, form = next(n for n in suite.tasks if n.count("/") == 2).split("/")
    asks = {
        *parts()["questions", f"{domain}/{question}"],
        *further()["questions"].get(f"{domain}/{question}", ()),
    }
    prompts = many[f"{domain}/{question}/{form}"].prompts
    says = {*parts()["formats", form], *further()["formats"].get(form, ())}
    assert len(prompts) == min(96, len(asks) * len(says))
    for ask in asks:
        assert any(ask in prompt for prompt in prompts), ask


def test_other_suites_have_the_prompts_that_they_come_with(tmp_path):
    with pytest.raises(ValueError, match=r"suite\.wordings is 'many', which is the built-in suite's alone"):
        load_suite(str(tmp_path), wordings="many")
    with pytest.raises(ValueError, match="wordings"):
        SuiteConfig(wordings="some")
