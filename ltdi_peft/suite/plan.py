"""Which question meets which format, and which task is in which split.

In: the domains and formats.  Out: the content of `splits.json`; deterministic.
Idea: each question meets every format that adds something constant around its answer, and the least used one
      of those that change the answer itself; two of its families are held out. Question and format of a
      held-out task are then both known from other tasks, their pair is not. (With three formats a question, a
      multi-task adapter did not learn to combine them.)
      Split orders go round the domains, so that a prefix is a small suite of the same kind.
Source: EVALUATION.md, "Splits"."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltdi_peft.suite.design import Domain, Format, Question
from ltdi_peft.suite.splits import SplitFile, share

MAX_SHARE = 0.6  # of one answer among a task's examples: above it, a constant would look like a skill
MAX_AGREEMENT = 0.8  # of two tasks' answers on shared inputs: above it, the prompt would hardly matter
AROUND = ("plain", "wrap", "end", "lead", "sentence")  # groups of formats that leave the answer as it is
CHANGES_A_QUESTION = 1  # formats of the other groups: letter case, repetition, spelling
FAMILIES_HELD_OUT = 2  # of each question
VALIDATION_A_DOMAIN = 2  # of these families
FOLDS = 6  # besides fold 0, which is the unseen domains


@dataclass(frozen=True)
class Cell:
    """One question of a domain in one format; `format` "" is a stand-alone task."""

    domain: str
    question: str
    format: str
    group: str = ""

    @property
    def family(self) -> str:
        """Tasks that differ only by a constant share it, and with it their split."""
        return "/".join(part for part in (self.domain, self.question, self.group) if part)

    @property
    def name(self) -> str:
        """The task's name."""
        return "/".join(part for part in (self.domain, self.question, self.format) if part)


def chosen_cells(domains: Sequence[Domain], formats: Sequence[Format]) -> list[Cell]:
    """The sparse design: for each question the least used formats that suit it, then stand-alone tasks."""
    used: Counter[str] = Counter()
    cells = []
    for domain in domains:
        earlier = [[task.answer(item) for item in domain.items] for task in domain.alone]
        for q in domain.questions:
            chosen = _formats_of(domain, q, _least_used(formats, used, f"{domain.name}/{q.name}"), earlier)
            cells += [Cell(domain.name, q.name, f.name, f.group) for f in chosen]
            used.update(f.name for f in chosen)
            earlier += [[f.apply(q.answer(item)) for item in domain.items] for f in chosen]
        cells += [Cell(domain.name, task.name, "") for task in domain.alone]
    return cells


def _least_used(formats: Iterable[Format], used: Counter[str], tie: str) -> list[Format]:
    return sorted(formats, key=lambda f: (used[f.name], share(f"{tie}/{f.name}")))


def _formats_of(
    domain: Domain, q: Question, formats: Iterable[Format], earlier: list[list[str]]
) -> list[Format]:
    """The formats that suit, in the order given: all that go around the answer, few that change it."""
    answers = [q.answer(item) for item in domain.items]
    found: list[Format] = []
    others = list(earlier)
    for f in formats:
        changes = [other for other in found if other.group not in AROUND]
        if not all(map(f.suits, answers)) or (f.group not in AROUND and len(changes) == CHANGES_A_QUESTION):
            continue
        texts = [f.apply(answer) for answer in answers]
        differs = all(agreement(texts, other) <= MAX_AGREEMENT for other in others)
        changed = f.name == "plain" or agreement(texts, answers) <= MAX_AGREEMENT
        if changed and differs and varied(texts):
            found.append(f)
            others.append(texts)
    return found


def varied(texts: Sequence[str]) -> bool:
    """Whether no single answer dominates."""
    return Counter(texts).most_common(1)[0][1] <= MAX_SHARE * len(texts)


def agreement(texts: Sequence[str], other: Sequence[str]) -> float:
    """Share of the inputs on which two tasks want the same."""
    return sum(a == b for a, b in zip(texts, other, strict=True)) / len(texts)


def planned_splits(cells: Sequence[Cell], unseen_domains: Sequence[str]) -> SplitFile:
    """The split file of the built-in suite."""
    domains = list(dict.fromkeys(cell.domain for cell in cells))
    by_domain = {d: [cell for cell in cells if cell.domain == d] for d in domains}
    held: Counter[str] = Counter()
    unseen, validation, train = {}, {}, {}
    for d in (d for d in domains if d not in unseen_domains):
        questions = _by_hash({cell.question for cell in by_domain[d] if cell.format}, d)
        picked: list[list[Cell]] = []
        for question in questions * FAMILIES_HELD_OUT:
            taken = {cell for family in picked for cell in family}
            picked.append(_held_out([cell for cell in by_domain[d] if cell not in taken], question, held))
        # The second question's goes to validation: short prefixes of all three splits then cover each other.
        chosen = picked[1 : 2 * VALIDATION_A_DOMAIN : 2]
        validation[d] = _interleaved(chosen)
        unseen[d] = _interleaved([family for family in picked if family not in chosen])
        rest = [cell for cell in by_domain[d] if cell not in {*unseen[d], *validation[d]}]
        train[d] = (questions, rest)
    splits = {
        "train": _train_order(train),
        "validation": _round_robin(validation),
        "unseen_tasks": _round_robin(unseen),
        "unseen_domains": _round_robin({d: by_domain[d] for d in unseen_domains}),
    }
    seen = [d for d in domains if d not in unseen_domains]
    folds = dict.fromkeys(unseen_domains, 0) | {d: i % FOLDS + 1 for i, d in enumerate(seen)}
    return SplitFile({split: tuple(cell.name for cell in part) for split, part in splits.items()}, folds)


def _by_hash(questions: set[str], domain: str) -> list[str]:
    return sorted(questions, key=lambda question: share(f"held out {domain}/{question}"))


def _held_out(cells: list[Cell], question: str, held: Counter[str]) -> list[Cell]:
    """The question's family whose group, of those that every question meets, is held out least so far."""
    options = [cell for cell in cells if cell.question == question and cell.group in AROUND]
    first = min(options, key=lambda option: (held[option.group], share(option.family)))
    held[first.group] += 1
    return [cell for cell in options if cell.family == first.family]


def _interleaved(families: list[list[Cell]]) -> list[Cell]:
    """The first of every family, then the second of every family, and so on."""
    return _round_robin(dict(enumerate(families)))


def _round_robin(queues: Mapping[Any, list[Cell]]) -> list[Cell]:
    longest = max(map(len, queues.values()))
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)]


def _train_order(train: dict[str, tuple[list[str], list[Cell]]]) -> list[Cell]:
    """Round the domains; in each the questions of held-out tasks come first, with the rarest format."""
    left = {domain: list(cells) for domain, (_, cells) in train.items()}
    formats: Counter[str] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    order: list[Cell] = []
    while any(left.values()):
        for domain in (d for d in left if left[d]):
            ranks = {question: rank for rank, question in enumerate(train[domain][0])}
            cell = min(left[domain], key=lambda c: _rank(c, asked, ranks, formats))
            left[domain].remove(cell)
            formats[cell.format] += 1
            asked[cell.domain, cell.question] += 1
            order.append(cell)
    return order


def _rank(
    cell: Cell, asked: Counter[tuple[str, str]], ranks: dict[str, int], formats: Counter[str]
) -> tuple[bool, int, int, int, float]:
    """Stand-alone tasks last; then questions in turn; then the rarest format."""
    times = asked[cell.domain, cell.question]
    return not cell.format, times, ranks.get(cell.question, 0), formats[cell.format], share(cell.name)
