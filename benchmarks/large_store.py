"""A store of the plan's size (DESIGN.md): writing, index, codec fit, encoding, training's reading, streamed.

    python benchmarks/large_store.py [--gigabytes 20] [--width 64] [--folder FOLDER] [--out FILE]
    Expect: ≤ 2 GB of anonymous memory in every stage, the same for a quarter of the runs as for all of them,
    and times in proportion to the runs. 2 CPU cores, as much disk as --gigabytes.

Adapters of 3.4 M numbers (a 7-billion model with grouped attention, 32 layers, rank 8 on q and v), A and
B trained, 16 snapshots a run in 16 bit. Only the number of runs is smaller than in the plan: 54 GB are 500.
The limit: reading the same files in the same order, byte by byte into one buffer, from the disk (the page
cache dropped for them) and from the page cache; of writing: a file of the same size, without the library,
after every run; and where a stage multiplies matrices, the time that its products need at the rate of large
square ones, measured here. Memory and the exponent of time are from a quarter, half and all of the runs;
processor seconds count all threads.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import PeakMemory, Result, Watch, parser_of, product_rate, publish, slope, timed

from ltdi_peft.config import Recipe
from ltdi_peft.prepare import encode_targets, fit_codec, norm_range
from ltdi_peft.spec import Adapter, AdapterSpec, Site
from ltdi_peft.store import Trajectory, TrajectoryStore
from ltdi_peft.subspace import StreamingSubspace
from ltdi_peft.task import Task

LAYERS, RANK, SNAPSHOTS, PLANNED = 32, 8, 16, 500
SHAPES = {"q_proj": (4096, 4096), "v_proj": (4096, 1024)}  # fan_in, fan_out
FRACTIONS = (0.25, 0.5, 1.0)
MOST = 2e9  # bytes of anonymous memory


@dataclass(frozen=True)
class Stage:
    """What one stage took over a part of the runs."""

    name: str
    runs: int
    seconds: float
    processor: float  # seconds of all threads, which other load disturbs less
    size: int  # bytes of the snapshots that it has to read or write
    peak: int  # bytes of anonymous memory
    flop: tuple[float, float] = (0.0, 0.0)  # of products in float64, in float32


def spec_of_plan(layers: int) -> AdapterSpec:
    """The site table of the plan's adapter."""
    names = [(f"model.layers.{i}.self_attn.{kind}", *SHAPES[kind]) for i in range(layers) for kind in SHAPES]
    sites = tuple(Site(name, fan_in, fan_out, RANK, 16.0, 2.0) for name, fan_in, fan_out in sorted(names))
    return AdapterSpec("plan/7b", sites, {"r": RANK, "lora_alpha": 16})


def random_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    """A and B of the size that training gives them."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=rng)

    return {site.name: (draw(site.rank, site.fan_in), draw(site.fan_out, site.rank)) for site in spec.sites}


def between(start: Adapter, parts: Sequence[Adapter], mix: Sequence[float]) -> Adapter:
    """The start and a combination of the parts; 16 bit make its last digits directions of their own."""
    out = {}
    for site, (a, b) in start.items():
        more = [part[site] for part in parts]
        out[site] = (
            a + sum(m * x for m, (x, _) in zip(mix, more, strict=True)),
            b + sum(m * y for m, (_, y) in zip(mix, more, strict=True)),
        )
    return out


def write_runs(
    folder: Path, spec: AdapterSpec, count: int, *, parts: int = 8, decay: float = 0.0
) -> tuple[list[Stage], float]:
    """Fill the store; only the library's own calls are timed. With it: bytes a second of plain writing.

    Runs are combinations of `parts` random adapters, the i-th weighted i^-decay.

    Plain files are written between the runs and stay until the end: pages that a removed file gave back are
    written ten times faster than those that the system has to find.
    """
    store, start = TrajectoryStore(folder), random_adapter(spec, 0)
    drawn, rng = [random_adapter(spec, seed + 1) for seed in range(parts)], torch.Generator().manual_seed(0)
    weights = torch.arange(1, parts + 1) ** -decay
    stages, watch, plain, size = [], Watch(), Watch(), 0
    data = os.urandom(2 * spec.numbers)
    with PeakMemory() as memory:
        for index in range(count):
            task = Task(f"task-{index:04d}", (f"Do thing {index}.",))
            mix = weights * torch.randn(parts, generator=rng)
            about = {"seed": 0, "planned_steps": SNAPSHOTS, "dtype": "float16"}
            with adding(watch):
                writer = store.start_run(spec, task, start=start, **about)
            for step in range(1, SNAPSHOTS + 1):
                noise = 0.02 * weights * torch.randn(parts, generator=rng)
                adapter = between(start, drawn, (mix * step / SNAPSHOTS + noise).tolist())
                with adding(watch):
                    path = writer.write(step, adapter, loss=1.0 / step, learning_rate=1e-3)
                size += path.stat().st_size
            writer.finish(SNAPSHOTS)
            with adding(plain):
                (folder.parent / f"plain-{index}").write_bytes(data)
            if index + 1 in parts_of(count):
                stages.append(Stage("write", index + 1, watch.seconds, watch.processor, size, memory.peak))
    for index in range(count):
        (folder.parent / f"plain-{index}").unlink()
    return stages, len(data) * count / plain.seconds


@contextmanager
def adding(total: Watch) -> Iterator[None]:
    """Add the block's time."""
    with timed(torch.device("cpu")) as watch:
        yield
    total.seconds += watch.seconds
    total.processor += watch.processor


def parts_of(count: int) -> list[int]:
    """The numbers of runs at which times are compared."""
    return sorted({max(2, round(count * share)) for share in FRACTIONS})


# ---- limits


def files_of(runs: Sequence[Trajectory]) -> list[Path]:
    """Snapshots in the order in which the library reads them."""
    return [snapshot.path for run in runs for snapshot in run.snapshots]


def forget(files: Sequence[Path]) -> None:
    """Drop these files from the page cache, so that the disk has to give them again."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_reading(files: Sequence[Path]) -> float:
    """Bytes a second of reading whole files into one buffer."""
    buffer, size = bytearray(max(path.stat().st_size for path in files)), 0
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            size += file.readinto(buffer) or 0
    return size / (time.perf_counter() - began)


# ---- stages


def fit_flop(spec: AdapterSpec, count: int, width: int) -> tuple[float, float]:
    """Of a codec's fit on `count` adapters: its merges, in float64."""
    total = 0.0
    for site in spec.sites:
        dim = site.rank * (site.fan_in + site.fan_out)
        one = StreamingSubspace(dim, width)
        known, rows = 0, min(count, one.keep + one.block)  # of orthogonal rows the products are known
        left = count - rows
        while True:
            new = rows - known
            kept = one.keep if left else width
            total += 2 * dim * (new * known + new * new + kept * rows)
            if not left:
                break
            known, rows = one.keep, one.keep + min(left, one.block)
            left -= rows - known
        total += 4 * dim * width**2
    return total, 0.0


def encode_flop(spec: AdapterSpec, count: int, width: int) -> tuple[float, float]:
    """Of encoding: the Gram matrix of each basis once, and a product of each adapter with the bases."""
    return 2.0 * width**2 * spec.numbers, 2.0 * count * width * spec.numbers


def reading_stages(recipe: Recipe, cold: bool) -> Iterator[Stage]:
    """Every reading stage over a quarter, half and all of the runs."""
    store = TrajectoryStore(recipe.store_folder)
    everything = store.trajectories()
    spec, width = everything[0].spec, int(recipe.codec.width or 0)
    for count in parts_of(len(everything)):
        runs = everything[:count]
        size = sum(path.stat().st_size for path in files_of(runs))
        targets = [s.path for run in runs for s in run.local_targets(recipe.diffusion.k)]
        wanted = sum(path.stat().st_size for path in targets)
        last = sum(run.snapshots[-1].path.stat().st_size for run in runs)
        ids = [run.run_id for run in runs]
        flop = {
            "codec fit": fit_flop(spec, len(runs) * SNAPSHOTS, width),
            "encode": encode_flop(spec, len(targets), width),
        }
        work: dict[str, tuple[int, Callable[[], object]]] = {
            "index": (0, lambda ids=ids: [store.trajectory(run_id) for run_id in ids]),
            # One pass over each site: what the merges drop here is too little for a second.
            "codec fit": (size, lambda runs=runs: fit_codec(recipe, runs)),
            "encode": (wanted, lambda runs=runs: encode_targets(recipe, fit_codec(recipe, runs), runs)),
            "norms for training": (last, lambda runs=runs: norm_range(runs)),
            "tokens for training": (
                0,
                lambda runs=runs: encode_targets(recipe, fit_codec(recipe, runs), runs).sum(),
            ),
        }
        for name, (needed, do) in work.items():
            if cold:
                forget(files_of(runs))
            elif name == "index":
                do()  # the headers of runs that no stage has read yet lie on the disk
            with PeakMemory() as memory, timed(torch.device("cpu")) as watch:
                do()
            taken = watch.seconds, watch.processor
            yield Stage(name, count, *taken, needed, memory.peak, flop.get(name, (0.0, 0.0)))


def table(stages: Sequence[Stage], limits: dict[str, float]) -> list[tuple[str, ...]]:
    """A row a stage: at all runs, and how time and memory grow."""
    rows = []
    for name in dict.fromkeys(stage.name for stage in stages):
        own = [stage for stage in stages if stage.name == name]
        last, counts = own[-1], [stage.runs for stage in own]
        moving = last.size / limits["writing" if name == "write" else "reading"]
        rates = limits["float64"], limits["float32"]
        products = sum(flop / rate for flop, rate in zip(last.flop, rates, strict=True))
        grows = slope(counts, [max(stage.processor, 1e-4) for stage in own])
        rows.append(
            (
                name,
                f"{last.seconds:.1f}",
                f"{last.processor:.1f}",
                f"{last.size / 1e9:.2f}" if last.size else "",
                f"{last.size / last.seconds / 1e6:.0f}" if last.size else "",
                f"{moving:.1f}" if last.size else "",
                f"{products:.1f}" if products else "",
                f"{(moving + products) / last.seconds:.0%}" if last.size else "",
                f"{grows:.2f}",
                f"{own[0].peak / 1e6:.0f} → {last.peak / 1e6:.0f}",
                "yes" if last.peak <= MOST else "**no**",
                f"{last.processor * PLANNED / last.runs:.0f}",
            )
        )
    return rows


COLUMNS = (
    "stage",
    "seconds",
    "processor s",
    "GB",
    "MB/s",
    "plain files alone, s",
    "products alone, s",
    "both, of its seconds",
    "time ∝ runs to the",
    "anonymous MB, ¼ → all",
    "≤ 2 GB",
    "processor s for 500 runs",
)


def measured(options: argparse.Namespace, folder: Path) -> Result:
    """Write the store, then every stage."""
    spec = spec_of_plan(options.layers)
    numbers = spec.numbers
    count = max(4, round(options.gigabytes * 1e9 / (2 * numbers * SNAPSHOTS)))
    recipe = Recipe(name="large", output=str(folder / "run"))
    recipe = replace(
        recipe,
        collect=replace(recipe.collect, gauge="shared_start"),
        codec=replace(recipe.codec, width=options.width),
    )
    recipe.folder.mkdir(parents=True)
    stages, writing = write_runs(recipe.store_folder, spec, count)
    limits = {"writing": writing}
    files = files_of(TrajectoryStore(recipe.store_folder).trajectories())
    forget(files)
    limits["disk"] = plain_reading(files)
    limits["page cache"] = plain_reading(files[: max(1, round(4e9 / numbers / 2))])
    limits["float64"] = product_rate(torch.float64, torch.device("cpu"))
    limits["float32"] = product_rate(torch.float32, torch.device("cpu"))
    limits["reading"] = limits["disk" if options.cold else "page cache"]
    stages += reading_stages(recipe, options.cold)
    about = {"limits": limits, "stages": [vars(stage) for stage in stages]}
    title = (
        f"{count} runs of {SNAPSHOTS} snapshots of {numbers / 1e6:.1f} M numbers, "
        f"{sum(path.stat().st_size for path in files) / 1e9:.1f} GB, codec width {options.width}; plain "
        f"reading: disk {limits['disk'] / 1e6:.0f} MB/s, page cache {limits['page cache'] / 1e6:.0f} MB/s; "
        f"{'disk' if options.cold else 'page cache'} is the limit of reading; plain writing "
        f"{writing / 1e6:.0f} MB/s; products {limits['float64'] / 1e9:.0f} GFLOP/s in float64, "
        f"{limits['float32'] / 1e9:.0f} in float32"
    )
    return Result(title, COLUMNS, table(stages, limits), about)


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure in a folder of its own, print, remove the folder."""
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--width", type=int, default=64, help="of the codec: 64 are 0.4 GB at this size")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer: a quick try")
    parser.add_argument("--cold", action="store_true", help="every stage reads from the disk")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where there is room")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="large-store-", dir=options.folder))
    try:
        publish(measured(options, folder), options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
