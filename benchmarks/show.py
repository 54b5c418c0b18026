"""Write the tables of docs/results/benchmarks/*.json into docs/benchmarks.md, between their markers.

    python benchmarks/show.py

A table's place is `<!-- NAME -->` … `<!-- end -->`; NAME is the file's. A file without a place is an
error; a place without a file stays as it is.
"""

import re
from pathlib import Path

from common import ROOT, read_result

PAGE, RESULTS = ROOT / "docs/benchmarks.md", ROOT / "docs/results/benchmarks"
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.S)


def shown(file: Path) -> str:
    """Title, table, and where and with what it was measured."""
    result, about = read_result(file)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['device']}; {versions}; commit {short(about['commit'])}."
    return f"{result.title[0].upper()}{result.title[1:]}.\n\n{result.markdown()}\n\n{where}"


def short(commit: str) -> str:
    """The first digits of a commit's hash, and whether tracked files differed from it."""
    digits, _, changed = commit.partition("-")
    return digits[:8] + ("+" if changed else "")


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with every table in its place. ValueError for a table that has none."""
    if odd := set(tables) - set(PLACE.findall(page)):
        raise ValueError(f"{PAGE} has no place <!-- NAME --> for the results {sorted(odd)}; add one.")

    def place(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->" if found[1] in tables else found[0]

    return PLACE.sub(place, page)


def main() -> None:
    """Rewrite the page."""
    tables = {file.stem: shown(file) for file in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text(filled(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
