"""What a built-in task is made of: a domain's inputs × a question × an answer format.

In: `Domain`s (inputs with attributes, questions about them) and the formats of `formats.py`.
Out: plain task records for `ltdi_peft.task.Task`.
Idea: the questions of a domain share its inputs, so only the prompt tells its tasks apart; formats are shared
      by domains, so a new pair of question and format is asked for in words that were each seen before.
Adding a task: one more `Question` in a domain, or one more `Format`; a domain needs ≥ 220 inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ltdi_peft.suite.splits import share
from ltdi_peft.suite.wordings import TRAINING_PROMPTS, worded

Item = dict[str, str]  # "input", and the attributes that the questions read


@dataclass(frozen=True)
class Question:
    """A rule input → answer, with ≥ 10 ways to ask for it and 2 more that are never trained on."""

    name: str
    answer: Callable[[Item], str]
    ask: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """A rule answer → text, with ≥ 8 ways to ask for it and 2 held-out ones.

    Formats of one `group` differ only by a constant: with the same question they are one family.
    """

    name: str
    group: str
    apply: Callable[[str], str]
    ask: tuple[str, ...]
    held_out: tuple[str, ...]
    suits: Callable[[str], bool] = lambda answer: True


@dataclass(frozen=True)
class Alone:
    """A task that is no question × format: a rule on a domain's inputs with its own prompts."""

    name: str
    answer: Callable[[Item], str]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """Inputs with attributes, the questions asked about all of them, and stand-alone tasks."""

    name: str
    items: tuple[Item, ...]
    questions: tuple[Question, ...]
    alone: tuple[Alone, ...] = field(default=())


def question(name: str, answer: Callable[[Item], str] | str, ask: str, held_out: str) -> Question:
    """A question from lines of text; an answer given as a name reads that attribute."""
    rule = (lambda item: item[answer]) if isinstance(answer, str) else answer
    return Question(name, rule, lines(ask), lines(held_out))


def alone(name: str, answer: Callable[[Item], str], prompts: str, held_out: str) -> Alone:
    """A stand-alone task from lines of text."""
    return Alone(name, answer, lines(prompts), lines(held_out))


def lines(text: str) -> tuple[str, ...]:
    """The non-blank lines of a text, stripped."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """The phrases of a text that commas separate."""
    return tuple(phrase.strip() for phrase in text.split(","))


def word_pairs(text: str) -> dict[str, str]:
    """A dictionary from words of the form key/value."""
    return dict(pair.split("/") for pair in words(text))


def grouped(keys: str, text: str) -> tuple[Item, ...]:
    """Items from lines "value value: word word …", the values being those of `keys`; _ stands for a space."""
    items: dict[str, Item] = {}
    for line in lines(text):
        head, members = line.split(":")
        values = dict(zip(words(keys), (v.replace("_", " ") for v in words(head)), strict=True))
        for word in (w.replace("_", " ") for w in words(members)):
            if word in items:
                raise ValueError(f"the word list for {keys!r} has {word!r} twice.")
            items[word] = {"input": word, **values}
    return tuple(items.values())


def drawn(seed: str, count: int, build: Callable[[Random], Item]) -> tuple[Item, ...]:
    """The first `count` distinct inputs that `build` makes; seeded by a text, so equal in every process."""
    rng = Random(seed)
    items: dict[str, Item] = {}
    for _ in range(100 * count):
        item = build(rng)
        items.setdefault(item["input"], item)
        if len(items) == count:
            return tuple(items.values())
    raise ValueError(
        f"{seed!r} has only {len(items)} distinct inputs, {count} were asked for; widen its slots."
    )


def evaluation_inputs(domain: Domain) -> frozenset[str]:
    """Half of the domain's inputs, by hash: evaluation inputs for every task of the domain."""
    ranked = sorted(
        (item["input"] for item in domain.items), key=lambda text: share(domain.name + " " + text)
    )
    return frozenset(ranked[: len(ranked) // 2])


def paired_prompts(questions: Iterable[str], formats: Iterable[str], count: int) -> list[str]:
    """Up to `count` joined instructions; every paraphrase of either part turns up about equally often."""
    asks, says = list(questions), list(formats)
    count = min(count, len(asks) * len(says))
    pairs = [(i % len(asks), (i % len(asks) + i // len(asks)) % len(says)) for i in range(count)]
    return [joined(asks[a], says[s]) for a, s in pairs]


def joined(ask: str, say: str) -> str:
    """One instruction: the format follows the question, or holds it where it has a {} slot."""
    return say.format(ask) if "{}" in say else f"{ask} {say}"


def product_record(
    domain: Domain, q: Question, f: Format, held_out: frozenset[str], wordings: str
) -> dict[str, Any]:
    """The task record of a question with a format; `held_out` as `evaluation_inputs` gives it."""
    asks = worded(q.ask, "questions", f"{domain.name}/{q.name}", wordings)
    says = worded(f.ask, "formats", f.name, wordings)
    head = {
        "name": f"{domain.name}/{q.name}/{f.name}",
        "domain": domain.name,
        "family": f"{domain.name}/{q.name}/{f.group}",
        "attributes": {"question": f"{domain.name}/{q.name}", "format": f.name},
        "prompts": paired_prompts(asks, says, TRAINING_PROMPTS[wordings]),
        "evaluation_prompts": paired_prompts(q.held_out, f.held_out, 4),
    }
    return head | examples(domain, lambda item: f.apply(q.answer(item)), held_out)


def alone_record(domain: Domain, task: Alone, held_out: frozenset[str], wordings: str) -> dict[str, Any]:
    """The task record of a stand-alone task, a family of its own."""
    name = f"{domain.name}/{task.name}"
    head = {"name": name, "domain": domain.name, "family": name, "attributes": {"question": name}}
    asks = worded(task.prompts, "questions", name, wordings)
    prompts = {"prompts": list(asks), "evaluation_prompts": list(task.held_out)}
    return head | prompts | examples(domain, task.answer, held_out)


def examples(
    domain: Domain, rule: Callable[[Item], str], held_out: frozenset[str]
) -> dict[str, list[tuple[str, str]]]:
    """The two parts of a task's examples; the inputs of each are the same for all tasks of the domain."""
    pairs = [(item["input"], rule(item)) for item in domain.items]
    return {
        "train": [pair for pair in pairs if pair[0] not in held_out],
        "evaluation": [pair for pair in pairs if pair[0] in held_out],
    }
