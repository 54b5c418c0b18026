"""How many ways of asking a built-in task is trained on: `few`, those beside its rule, or `many`.

In: a part of a task (question, stand-alone task, format) and its own wordings.  Out: its training wordings.
Idea: what a prompt means must not hang on the words of one author. `wordings.json` holds further wordings of
      every part; they were written from the rule, examples of it and its training wordings alone, without
      sight of the held-out ones, so held-out wordings are as new to `many` as to `few`.
To add some, add them to the file: a test refuses doubles and whatever is held out.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

WORDINGS_FILE = Path(__file__).with_name("wordings.json")
# Training prompts of a question in a format, pairs of a wording of either.
TRAINING_PROMPTS = {"few": 24, "many": 96}
WORDINGS = tuple(TRAINING_PROMPTS)


@cache
def further() -> dict[str, dict[str, tuple[str, ...]]]:
    """Further wordings: "questions" by domain/name (stand-alone tasks too), "formats" by name."""
    table = json.loads(WORDINGS_FILE.read_text(encoding="utf-8"))
    return {kind: {key: tuple(texts) for key, texts in parts.items()} for kind, parts in table.items()}


def worded(own: Sequence[str], kind: str, key: str, wordings: str) -> tuple[str, ...]:
    """The wordings of a part: its own, then with `many` the further ones, if there are any."""
    return (*own, *(further()[kind].get(key, ()) if wordings == "many" else ()))
