"""Imports go one way: a room imports only rooms above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ltdi_peft"
ROOMS = (  # from the top; a room may import those before it
    "quiet",
    "files",
    "strict",
    "evaluate_config",
    "config",
    "download",
    "suite",
    "task_data",
    "task",
    "wheel",
    "four_bit",
    "base",
    "hub",
    "chat",
    "spec",
    "adapter",
    "trajectory",
    "provenance",
    "store",
    "kept",
    "recording",
    "record",
    "batched",
    "lower",
    "score",
    "fit",
    "fit_point",
    "launch",
    "collect",
    "calibrate",
    "gauge",
    "sources",
    "importing",
    "distance",
    "subspace",
    "int8",
    "encode",
    "centre",
    "attributes",
    "condition",
    "chain",
    "diffusion",
    "denoiser",
    "meta",
    "cards",
    "generator_config",
    "generated",
    "generator",
    "guidance",
    "encoded",
    "prepare",
    "encoding",
    "baselines",
    "multi_task",
    "origin",
    "tuning",
    "attribute_fit",
    "session",
    "stages",
    "resume",
    "train",
    "variants",
    "memorisation",
    "hypernetwork",
    "t2l_fit",
    "t2l",
    "shrink",
    "generate",
    "refine",
    "statistics",
    "summary",
    "protocol",
    "few_shot",
    "curve",
    "flops",
    "cost",
    "sweep",
    "task_curve",
    "sections",
    "plot_data",
    "plot",
    "plot_sweep",
    "plot_result",
    "plot_store",
    "figures",
    "tables",
    "targets",
    "report",
    "evaluate",
    "publish",
    "talk",
    "studio",
    "page_parts",
    "shapes",
    "speed",
    "forecast",
    "plan",
    "ship",
    "terminal",
    "command",
    "exchange_commands",
    "page",
    "serve_command",
    "commands",
    "completion",
    "cli",
)
FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module's source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.add(".")
            elif node.module == "ltdi_peft":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("ltdi_peft."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ltdi_peft.")}
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """Imported rooms that are not above `room`."""
    above = ROOMS[: ROOMS.index(room)]
    return sorted(imported_rooms(source) - set(above))


def test_there_are_rooms():
    assert len(FILES) > 20
    assert len(ROOMS) == len(set(ROOMS))


def test_every_room_has_its_place():
    assert sorted(set(FILES) - set(ROOMS)) == [], "add the room to ROOMS, below what it imports"


@pytest.mark.parametrize("room", sorted(set(FILES) & set(ROOMS)))
def test_imports_go_up(room):
    assert wrong_imports(room, FILES[room].read_text()) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "suite").glob("*.py")), ids=lambda path: path.stem)
def test_suite_imports_itself_and_above(path):
    assert imported_rooms(path.read_text()) <= {"suite", *ROOMS[: ROOMS.index("suite")]}


def test_only_the_suite_has_a_folder():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert folders == {".", "suite"}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from ltdi_peft.config import Recipe\nfrom ltdi_peft.base import Base", []),
        ("from ltdi_peft.train import train_generator", ["train"]),
        ("import ltdi_peft.cli", ["cli"]),
        ("from ltdi_peft import generate", ["generate"]),
        ("def late():\n    from ltdi_peft.store import TrajectoryStore", ["store"]),
        ("from ltdi_peft.spec import Site", ["spec"]),
        ("from . import config", ["."]),
        ("from ltdi_peft.nowhere import x", ["nowhere"]),
    ],
)
def test_the_guard_sees_wrong_imports(source, wrong):
    """Negative control: made-up modules in the place of `spec`."""
    assert wrong_imports("spec", source) == wrong
