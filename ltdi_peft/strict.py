"""Strict tables: plain values from YAML → frozen dataclasses, or an error that names the file and the key.

In: YAML text, overrides `section.field=value`, and a dataclass whose fields all have defaults.
Out: an instance; and back to plain values.
Idea: nothing is guessed: an unknown or doubled key, a wrong type, an infinite number or an unknown name is
refused before any work starts.
"""

import dataclasses
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

MERGE = "tag:yaml.org,2002:merge"


def one_of(key: str, value: str, known: Sequence[str], other: str = "") -> None:
    """ValueError unless `value` is a known name; `other`: what else the caller would have taken."""
    if value not in known:
        raise ValueError(f"{key} is {value!r}; known names are {sorted(known)}{other}.")


def at_least(key: str, value: int | float, least: int | float) -> None:
    """ValueError unless `value` ≥ `least`."""
    if value < least:
        raise ValueError(f"{key} is {value}; it must be at least {least}.")


def positive(key: str, value: int | float) -> None:
    """ValueError unless `value` > 0."""
    if value <= 0:
        raise ValueError(f"{key} is {value}; it must be greater than 0.")


def share(key: str, value: int | float) -> None:
    """ValueError unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{key} is {value}; it is a share and must lie between 0 and 1.")


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict of the node's pairs."""
        keys = [str(key.value) for key, _ in node.value if key.tag != MERGE]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a YAML file; an empty file is an empty table. ValueError for anything else."""
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"{path}: expected a table of sections, got {type(table).__name__}.")
    return table or {}


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `section.field` in `table`, in place; the value is read as YAML."""
    key, found, text = override.removeprefix("--").partition("=")
    if not found or not key:
        raise ValueError(f"override {override!r}: expected --section.field=value.")
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section.")
    try:
        table[last] = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error


def build(kind: type, table: Any, where: str) -> Any:  # noqa: ANN401
    """A dataclass from a table of plain values; every error names `where` and the key."""
    return changed(kind(), table, where)


def changed(default: Any, table: Any, where: str) -> Any:  # noqa: ANN401
    """`default` with the table's fields changed: a section given in part keeps what its owner has for it."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table of fields, got {table!r}.")
    kinds = {f.name: f.type for f in dataclasses.fields(default)}
    if unknown := sorted(set(map(str, table)) - set(kinds)):
        raise ValueError(f"{where} has unknown keys {unknown}; known keys are {sorted(kinds)}.")
    own = vars(default)
    values = {key: typed(kinds[key], value, f"{where}: {key}", own[key]) for key, value in table.items()}
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def typed(wanted: Any, value: Any, where: str, default: Any = None) -> Any:  # noqa: ANN401
    """`value` as `wanted`, or ValueError. A section is `default` changed."""
    if dataclasses.is_dataclass(wanted):
        return changed(default, value, where)
    if get_origin(wanted) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}.")
        return tuple(typed(get_args(wanted)[0], item, where) for item in value)
    options = get_args(wanted) if get_origin(wanted) is types.UnionType else (wanted,)
    if float in options and (number := as_number(value)) is not None:
        return number
    for option in options:
        if (
            option is not float
            and isinstance(value, option)
            and (option is bool or not isinstance(value, bool))
        ):
            return value
    names = " or ".join("null" if option is types.NoneType else option.__name__ for option in options)
    raise ValueError(f"{where}: expected {names}, got {value!r} ({type(value).__name__}).")


def as_number(value: Any) -> float | None:  # noqa: ANN401
    """A finite number, also as the text that YAML 1.1 takes 3e-4 for; else None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def to_dict(section: Any) -> dict[str, Any]:  # noqa: ANN401
    """A dataclass as plain JSON values: the table that `build` makes it from."""
    return {f.name: plain(vars(section)[f.name]) for f in dataclasses.fields(section)}


def plain(value: Any) -> Any:  # noqa: ANN401
    """Sections as tables, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def differing(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    out = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differing(a, b, f"{where}{key}.")
        elif a != b:
            out.append(f"{where}{key}")
    return out
