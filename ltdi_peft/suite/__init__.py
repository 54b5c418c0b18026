"""The built-in tasks: rules and word lists of our own, as plain records for `ltdi_peft.task.Task`.

In: the domains of this folder, the formats, and the names in `splits.json`.  Out: task records.
Idea: see `design.py` (what a task is) and `plan.py` (which tasks there are, and their splits).
To add a task, add a question, a format or a domain, then run `write_builtin_splits()` and commit the file."""

from pathlib import Path
from typing import Any

from ltdi_peft.suite.adjectives import ADJECTIVES
from ltdi_peft.suite.clock import DATES, TIMES
from ltdi_peft.suite.design import Domain, alone_record, evaluation_inputs, product_record
from ltdi_peft.suite.facts import ANIMALS, CITIES
from ltdi_peft.suite.formats import FORMATS
from ltdi_peft.suite.grammar import NOUNS, VERBS
from ltdi_peft.suite.letters import LETTERS
from ltdi_peft.suite.messages import MESSAGES, NEWS
from ltdi_peft.suite.numbers import COUNTING, PAIRS, UNITS
from ltdi_peft.suite.plan import chosen_cells, planned_splits
from ltdi_peft.suite.relations import COMPARISONS
from ltdi_peft.suite.sentences import PURCHASES, REVIEWS
from ltdi_peft.suite.sequences import LISTS, RECORDS
from ltdi_peft.suite.splits import read_splits, write_splits
from ltdi_peft.suite.things import THINGS

BUILTIN_SPLITS = Path(__file__).with_name("splits.json")
# The order decides who goes first in every split, so neighbours are of different kinds.
DOMAINS: tuple[Domain, ...] = (
    *(ANIMALS, REVIEWS, PAIRS, VERBS, PURCHASES, DATES, CITIES, MESSAGES, LISTS, NOUNS),
    *(COUNTING, NEWS, RECORDS, ADJECTIVES, COMPARISONS, UNITS, LETTERS, THINGS, TIMES),
)
UNSEEN_DOMAINS = ("things", "times")  # one of knowledge, one of form


def builtin_tasks(wordings: str = "few") -> list[dict[str, Any]]:
    """Records of the tasks that `splits.json` names, in its order; `wordings` as in wordings.py."""
    held_out = {domain.name: evaluation_inputs(domain) for domain in DOMAINS}
    names = [name for part in read_splits(BUILTIN_SPLITS).splits.values() for name in part]
    return [_record(name, held_out[name.split("/")[0]], wordings) for name in names]


def _record(name: str, held_out: frozenset[str], wordings: str) -> dict[str, Any]:
    domain_name, question_name, *format_name = name.split("/")
    domain = next(d for d in DOMAINS if d.name == domain_name)
    if not format_name:
        task = next(task for task in domain.alone if task.name == question_name)
        return alone_record(domain, task, held_out, wordings)
    question = next(q for q in domain.questions if q.name == question_name)
    answer_format = next(f for f in FORMATS if f.name == format_name[0])
    return product_record(domain, question, answer_format, held_out, wordings)


def write_builtin_splits(path: Path = BUILTIN_SPLITS) -> None:
    """Plan the built-in suite anew and write its split file; same rules, same bytes."""
    write_splits(path, "builtin", planned_splits(chosen_cells(DOMAINS, FORMATS), UNSEEN_DOMAINS))
