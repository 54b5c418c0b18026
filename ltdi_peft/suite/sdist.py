"""Tasks of BIG-bench out of its PyPI sdist (358 MB), kept in the cache.

In: folder names of tasks.  Out: a folder that holds their `task.json` files.
Idea: the archive is fetched once and only what is asked for is unpacked of it (all 1,041 files are 1.7 GB);
what the cache holds needs no network, and an archive that lies there is not fetched again.
"""

import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from ltdi_peft.download import cache_folder, pip_download

RELEASE = "bigbench-1.0.0"
REQUIREMENT = "bigbench==1.0.0"
INSIDE = "/bigbench/benchmark_tasks/"  # of the archive's top folder


def bigbench_folder(names: Iterable[str], cache_dir: str | Path | None = None) -> Path:
    """A folder with `<name>/task.json` for every name.

    OSError when the archive can neither be found nor fetched, ValueError when it is broken or lacks a task.
    """
    cache = cache_folder(cache_dir) / "suites"
    folder, archive = cache / RELEASE, cache / f"{RELEASE}.tar.gz"
    if missing := lacking(folder, names):
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, suffix=".partial") as work:
            unpack(archive if archive.is_file() else fetched(archive, Path(work)), folder, set(missing))
        if lost := lacking(folder, missing):
            raise ValueError(
                f"{RELEASE} has no task {lost[0]!r}; {len(lost)} of the tasks asked for are gone."
            )
    return folder


def lacking(folder: Path, names: Iterable[str]) -> list[str]:
    """The tasks that are not there."""
    return [name for name in names if not (folder / name / "task.json").is_file()]


def fetched(archive: Path, work: Path) -> Path:
    """The archive from the package index."""
    try:
        return pip_download(REQUIREMENT, work, f"{RELEASE}.tar.gz", "--no-binary", ":all:")
    except OSError as error:
        raise OSError(
            f"BIG-bench is not in the cache, and its sdist could not be fetched: {error} Put it there as "
            f"{archive}, or give the folder bigbench/benchmark_tasks of an unpacked copy as suite.source."
        ) from error


def unpack(archive: Path, folder: Path, names: set[str]) -> None:
    """Write the `task.json` of these tasks, each one atomically."""
    try:
        # One pass: a gzipped archive can only be read from its beginning.
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                name = member.name.partition(INSIDE)[2].removesuffix("/task.json")
                content = members.extractfile(member) if name in names else None
                if content and member.name.endswith("/task.json"):
                    write_task(folder / name / "task.json", content.read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is broken ({error}); remove it, so that it is fetched again.") from error


def write_task(path: Path, content: bytes) -> None:
    """A reader sees the finished file or none, also of two processes that unpack at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
