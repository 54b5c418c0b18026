"""What the benchmark scripts share: the table, the result file, the machine, time, memory, a limit.

In: rows of a table.  Out: the table on stdout; by `--out` also a JSON file with device, versions, commit.
Idea: `python benchmarks/show.py` writes the tables of these files into docs/benchmarks.md, so that no
number there was typed by hand.
"""

import argparse
import importlib.metadata
import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltdi_peft.evaluate import commit, machine
from ltdi_peft.files import json_bytes, replace_file
from ltdi_peft.generator import Generator

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
PRODUCT, EACH = 2048, 1.0  # rows of the square product, seconds that it is repeated for


@dataclass(frozen=True)
class Result:
    """A table, a sentence about it, and the numbers behind it as JSON."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: dict[str, Any]

    def markdown(self) -> str:
        """The table alone."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def require_unseen(generator: Generator, names: Iterable[str]) -> None:
    """SystemExit names a task that is to be scored and that the generator was trained on."""
    if known := sorted(set(names) & set(generator.config.training_tasks)):
        raise SystemExit(
            f"the generator was trained on {len(known)} of these unseen tasks, first {known[0]}. Name a "
            f"generator of this recipe with --generator."
        )


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with `--out` and `--device`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="a JSON file; docs/results/benchmarks/NAME.json for the docs"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return parser


def publish(result: Result, options: argparse.Namespace) -> None:
    """Print the table; write the file if `--out` names one."""
    device = machine(options.device)
    print(f"{result.title}; {device}\n\n{result.markdown()}\n", flush=True)
    if options.out:
        about = {"title": result.title, "device": device, "versions": versions(), "commit": commit()}
        asked = {key: str(value) for key, value in vars(options).items() if key != "out"}
        table = {"columns": result.columns, "rows": result.rows, "numbers": result.numbers}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, json_bytes({**about, "options": asked, **table}))


def write_pages(folder: Path, name: str, found: dict[str, Any], text: str) -> None:
    """A result as `<name>.json`, its page as `<name>.md`; the page is printed, too."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{name}.json", json_bytes(found))
    replace_file(folder / f"{name}.md", text.encode())
    print(text)


def read_result(file: Path) -> tuple[Result, dict[str, Any]]:
    """A result file as `publish` wrote it: the table, and all of the file."""
    table = json.loads(file.read_text())
    rows = [tuple(row) for row in table["rows"]]
    return Result(table["title"], tuple(table["columns"]), rows, table["numbers"]), table


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


# ---- time


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Watch:
    """Wall seconds of one block, and processor seconds of all threads, which other load disturbs less."""

    seconds: float = 0.0
    processor: float = 0.0


@contextmanager
def timed(device: torch.device) -> Iterator[Watch]:
    """Measure the block, an accelerator's work included."""
    watch = Watch()
    synchronize(device)
    began, used = time.perf_counter(), time.process_time()
    yield watch
    synchronize(device)
    watch.seconds, watch.processor = time.perf_counter() - began, time.process_time() - used


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Of one call; the first warms up and is not counted."""
    taken = []
    for _ in range(repeats + 1):
        with timed(device) as watch:
            work()
        taken.append(watch.seconds)
    return sorted(taken[1:])[repeats // 2]


def product_rate(dtype: torch.dtype, device: torch.device, size: int = PRODUCT) -> float:
    """FLOP a second of a large square product, the best of all rounds: the limit of matrix work."""
    square = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + EACH
    for _ in iter(lambda: time.perf_counter() < end, False):
        with timed(device) as watch:
            square @ square
        best = min(best, watch.seconds)
    return 2 * size**3 / best


# ---- memory


def anonymous_bytes() -> int:
    """Of this process now: its heap, without mapped files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon: this measurement needs Linux 4.5 or newer.")


class PeakMemory:
    """Within a `with` block: the most anonymous memory, looked at every 20 ms."""

    def __init__(self) -> None:
        self.before = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ∝ xᵖ by least squares on logarithms: 1 is linear, 0 is flat."""
    log_x, log_y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    log_x, log_y = log_x - log_x.mean(), log_y - log_y.mean()
    return float((log_x @ log_y) / (log_x @ log_x))
