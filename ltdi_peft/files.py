"""Files and folders that are whole or not there.

In: bytes, or whoever writes a file or folder by itself.  Out: the file or folder in its place.
Idea: written beside, then renamed, which is atomic on one file system; a killed writer leaves only *.partial
behind, which nobody reads.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under; renamed to `path` when all went well."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    yield partial
    partial.chmod(mode)  # safetensors' own file may be read by its owner alone
    os.replace(partial, path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, for one writer at a time: what stood at `path` is removed for it at the end."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def replace_file(path: Path, data: bytes) -> None:
    """Write these bytes to `path`."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def json_bytes(table: dict[str, Any]) -> bytes:
    """JSON for people and programs, keys in the order given."""
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ValueError that names the file."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(table).__name__}.")
    return table


def read_header(path: Path, key: str) -> Any:  # noqa: ANN401 (JSON)
    """The JSON under `key` of a safetensors file's metadata. KeyError without, SafetensorError if damaged."""
    with safe_open(path, framework="pt") as reader:
        return json.loads((reader.metadata() or {})[key])
