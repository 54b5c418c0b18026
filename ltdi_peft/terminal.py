"""What a subcommand answers, and how it reaches people or programs.

In: an `Answer`.  Out: JSON lines or text on stdout; progress and errors go to stderr.
Idea: a subcommand finds, one place shows. Colours are for terminals, and for people who did not switch them
off (--no-color, or NO_COLOR as no-color.org has it).
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOLD, RED = "1", "31"  # ECMA-48, select graphic rendition


@dataclass(frozen=True)
class Answer:
    """`records` are what --json prints, one a line; `lines` what people read, the first `heads` in bold.

    A `failure` is said after them, as bad input.
    """

    records: Sequence[Mapping[str, Any]]
    lines: Sequence[str]
    heads: int = 0
    failure: str = ""


def show(answer: Answer, *, as_json: bool, no_color: bool) -> None:
    """Print an answer on stdout."""
    if as_json:
        for record in answer.records:
            print(json.dumps(record, ensure_ascii=False))
        return
    colour = in_colour(sys.stdout.isatty(), no_color)
    for index, line in enumerate(answer.lines):
        print(painted(line, BOLD) if colour and index < answer.heads else line)


def in_colour(terminal: bool, no_color: bool) -> bool:
    """Whether to write in colour on a stream that is a terminal or not."""
    asked_not = no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return terminal and not asked_not


def painted(text: str, colour: str) -> str:
    """The text in a colour or in bold."""
    return f"\x1b[{colour}m{text}\x1b[0m"


def complain(who: str, error: Exception, *, no_color: bool) -> None:
    """One line on stderr."""
    who = painted(f"{who}:", RED) if in_colour(sys.stderr.isatty(), no_color) else f"{who}:"
    print(f"{who} {one_line(error)}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Answer:
    """Rows as records, and as aligned columns with a count."""
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max([len(column), *(len(line[i]) for line in cells)]) for i, column in enumerate(columns)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *cells]
    ]
    return Answer(rows, [*lines, f"{len(rows)} rows"], heads=1)
