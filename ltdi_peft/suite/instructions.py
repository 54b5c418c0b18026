"""Prompts for a task that comes with one description.

In: the task's name, its description, its choices where all examples have the same.
Out: training prompts and held-out ones.
Idea: an author wrote one sentence; around it stand sentences of ours, others in training than in evaluation.
      What varies is thus the wording around the description and what is said beside it, not its own words.
      Subtasks of a group mostly share a description, so the subtask's name stands with it in every prompt.
"""

import re
from collections.abc import Sequence

MOST_WORDS = 40  # of a description: a few are pages long
MOST_LABELS = 6
TRAINING = (
    "{ask}.",
    "{name}: {ask}.",
    "Task: {ask}. {labels}",
    "Answer the input. {ask}. {labels}",
    "Read the input and do this: {ask}.",
    "{name}. {labels}",
    "Here is a task called {name}. {ask}.",
    "Instruction: {whole}. {labels}",
)
HELD_OUT = (
    "Please do the following. {ask}. {labels}",
    "Your job, {name}: {ask}.",
    "What is wanted: {ask}. {labels}",
    "You are solving {name}. {whole}.",
)


def instructions(name: str, description: str, choices: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), as many for every task."""
    family, _, subtask = name.replace("_", " ").replace("-", " ").partition("/")
    subtask = subtask.replace("/", ", ")
    suffix = f" ({subtask})" if subtask else ""
    text = " ".join(description.split())
    first = re.split(r"(?<=[.!?]) ", text)[0]
    words = {
        "ask": shortened(first) + suffix,
        "whole": shortened(text) + suffix,
        "name": f"{family}, {subtask}" if subtask else family,
        "labels": labels_of(choices),
    }
    prompts, held_out = (
        [template.format(**words).strip() for template in templates] for templates in (TRAINING, HELD_OUT)
    )
    return prompts, held_out


def shortened(text: str) -> str:
    """The first words, without what ends a sentence."""
    return " ".join(text.split()[:MOST_WORDS]).rstrip(".!?:;, ")


def labels_of(choices: Sequence[str]) -> str:
    """A sentence that names the choices, or nothing where they are none or many."""
    if not 2 <= len(choices) <= MOST_LABELS or sum(len(choice.split()) for choice in choices) > MOST_WORDS:
        return ""
    return f"Answer {', '.join(choices[:-1])} or {choices[-1]}."
