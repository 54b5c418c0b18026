"""Write the tables of docs/results/benchmarks/*.json into docs/benchmarks.md, between their markers.

    python benchmarks/show.py

A table's place is `<!-- NAME -->` … `<!-- end -->`; NAME is the file's. A file without a place, and a place
without a file, are errors.
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
    where = f"{about['device']}; {versions}; commit {about['commit']}."
    return f"{result.title[0].upper()}{result.title[1:]}.\n\n{result.markdown()}\n\n{where}"


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with every table in its place. ValueError unless places and tables are the same."""
    if odd := set(PLACE.findall(page)) ^ set(tables):
        raise ValueError(f"places in the page and result files differ: {sorted(odd)}.")
    return PLACE.sub(lambda found: f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->", page)


def main() -> None:
    """Rewrite the page."""
    tables = {file.stem: shown(file) for file in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text(filled(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
