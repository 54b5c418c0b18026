"""Numbers, intervals and tables as Markdown.

In: figures.  Out: text.
"""

from collections.abc import Iterable, Sequence


def shown(value: float | None, ends: Sequence[float] | None = None, sign: str = "", digits: int = 2) -> str:
    """A rounded number, with the interval if there is one."""
    text = "–" if value is None else f"{value:{sign}.{digits}f}"
    return text if ends is None else f"{text} {shown_ends(ends, digits)}"


def shown_ends(ends: Sequence[float] | None, digits: int = 2) -> str:
    """An interval alone."""
    return "no interval" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def lines_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    body = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in body) + "\n"
