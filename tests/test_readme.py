"""The README against the code: its program, its commands, its links."""

import ast
import re
from pathlib import Path

import pytest

import ltdi_peft
from ltdi_peft.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def block(language, text=README):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def used_names(program):
    """Every X of `ltdi_peft.X` in a program."""
    attributes = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == "ltdi_peft"}


def relative_links(text):
    links = re.findall(r"\]\(([^)]+)\)", text)
    return [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]


def make_commands(text):
    """The `make …` lines of a shell script or an indented block, without comments."""
    return [match[1].split() for match in re.finditer(r"^\s*make ([^#\n]+)", text, re.MULTILINE)]


def test_program_uses_public_names_only():
    names = used_names(block("python"))
    assert names >= {"Task", "TrajectoryRecorder", "train_generator", "generate_adapter"}
    assert names <= set(ltdi_peft.__all__)


def test_an_unknown_name_would_be_seen():
    assert used_names("import ltdi_peft\nltdi_peft.no_such_door('x')") == {"no_such_door"}


def test_program_is_twelve_statements_or_fewer():
    assert len(ast.parse(block("python")).body) <= 12


def test_recipe_of_the_readme_is_valid(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml"))
    assert load_recipe(path).collect.gauge == "canonical"
    path.write_text(block("yaml") + "no_such_section: 1\n")
    with pytest.raises(ValueError, match="no_such_section"):
        load_recipe(path)


def test_readme_is_one_screen():
    # Beside the table that `make demo` printed, whose length is that of the list of methods.
    text = re.sub(r"<!-- demo table -->.*<!-- end -->\n", "", README, flags=re.DOTALL)
    assert text != README
    assert len(text.splitlines()) <= 90


def test_commands_are_targets_that_ci_calls():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    first_run = make_commands(README)
    assert [command[0] for command in first_run] == ["adapter", "demo", "test", "docs"]
    assert {command[0] for command in first_run} <= targets
    in_ci = make_commands((ROOT / ".ci" / "run").read_text())
    assert sorted(command[0] for command in in_ci) == ["adapter", "demo", "docs", "test"]


def test_commands_of_ltdi_exist():
    from ltdi_peft.cli import make_parser

    (line,) = re.findall(r"`ltdi ([a-z |]+)`", README)
    known = make_parser().format_help()
    assert all(re.search(rf"\b{command.strip()}\b", known) for command in line.split("|"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(document):
    missing = [link for link in relative_links(document.read_text()) if not (document.parent / link).exists()]
    assert missing == []


def test_there_are_documents_with_links():
    assert len(DOCUMENTS) >= 4
    assert len(relative_links(README)) >= 5
    assert relative_links("[a](docs/a.md#part) [b](https://x.y/z)") == ["docs/a.md"]


def test_code_words_of_documents_name_files_that_exist():
    """`recipes/…`, `benchmarks/…` and others, in the prose and in commands; the log tells of older files."""
    folders, kinds = (
        "recipes|tests|examples|ltdi_peft|benchmarks|docs",
        "py|yaml|json|md|jsonl|safetensors|sh",
    )
    named = rf"(?<![\w/.])((?:{folders})/[\w/.-]+\.(?:{kinds}))(?![\w/])"
    found = [
        (document, path)
        for document in DOCUMENTS
        if document.name not in ("log.md", "adapter_alone.md")
        for path in re.findall(named, document.read_text())
        if "NAME" not in path
    ]
    assert len(found) > 100
    assert [f"{document.name}: {path}" for document, path in found if not (ROOT / path).exists()] == []


def test_options_of_benchmarks_in_documents_are_theirs():
    named = re.compile(r"`(--[\w-]+)` of (benchmarks/\w+\.py)")
    found = [
        match
        for document in (*DOCUMENTS, ROOT / "CHANGELOG.md")
        for match in named.findall(document.read_text())
    ]
    assert found
    assert [one for one in found if f'"{one[0]}"' not in (ROOT / one[1]).read_text()] == []
