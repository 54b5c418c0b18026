"""Codec error against width and gauge, on adapters that the codec was not fitted on.

    python benchmarks/codec_error.py STORE [--widths 8 16 32 64 128] [--gauges shared_a …] [--targets 3]
    python benchmarks/codec_error.py --plan 24    random adapters of the plan's size, 3.4 M numbers

In: a trajectory store with ≥ 2 tasks; every fifth task (by name) is held out. With --plan so many runs are
written to a store of their own first: combinations of 48 adapters, the i-th weighted 1/i, in 16 bit.
Out: a Markdown table: relative ΔW error of held-out and of fitted adapters, time per adapter, size; beside a
basis from `torch.svd_lowrank` over all coordinates in memory at once (same codec, only the basis differs).
"""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import Result, parser_of, publish
from large_store import LAYERS, spec_of_plan, write_runs
from tqdm import tqdm

from ltdi_peft.distance import delta_w_distance
from ltdi_peft.encode import AdapterCodec, round_trip
from ltdi_peft.gauge import GAUGES
from ltdi_peft.spec import Adapter, AdapterSpec, require_same_spec
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.trajectory import Trajectory

HOLD_OUT_EVERY = 5  # tasks
PARTS, DECAY = 48, 1.0  # of what --plan writes
COLUMNS = (
    "gauge",
    "width",
    "error held out",
    "error fitted",
    "energy kept",
    "svd_lowrank: error held out",
    "fit ms/adapter",
    "svd_lowrank ms/adapter",
    "encode ms",
    "decode ms",
    "basis MB",
)


def adapters_of(runs: Sequence[Trajectory], targets: int) -> Iterator[Adapter]:
    """The local targets of the runs, read one at a time."""
    for run in runs:
        for snapshot in run.local_targets(targets):
            yield run.adapter(snapshot)


def possible_gauges(runs: Sequence[Trajectory]) -> list[str]:
    """The gauges that these runs allow: what they share decides."""
    starts = {run.start_path for run in runs}
    names = {f"{site.name}.lora_A" for site in runs[0].spec.sites}
    frozen = all(names <= set(run.frozen) for run in runs)
    allowed = {"canonical", "reference"}
    if len(starts) == 1:
        allowed.add("shared_a" if frozen else "shared_start")
    return [gauge for gauge in GAUGES if gauge in allowed]


def error(codec: AdapterCodec, adapters: Sequence[Adapter], spec: AdapterSpec) -> float:
    """Mean over adapters of ‖ΔW_decoded − ΔW‖ / ‖ΔW‖, all sites together."""
    return sum(delta_w_distance(spec, round_trip(codec, x), x, relative=True) for x in adapters) / len(
        adapters
    )


def with_one_shot_bases(codec: AdapterCodec, adapters: Sequence[Adapter], width: int) -> AdapterCodec:
    """The same codec with the bases of torch.svd_lowrank, which needs all coordinates of a site in memory."""
    torch.manual_seed(0)  # svd_lowrank draws from the global generator
    bases = []
    for frame, basis in zip(codec.frames, codec.bases, strict=True):
        if basis is None:
            bases.append(None)
            continue
        x = torch.stack([frame.coordinates(adapter, "adapter") for adapter in adapters]).float()
        _, _, v = torch.svd_lowrank(x, q=min(width, *x.shape))
        bases.append(v.mT.contiguous())
    return replace(codec, bases=tuple(bases))


def milliseconds(start: float, count: int) -> float:
    """Since `start`, per adapter."""
    return 1000 * (time.perf_counter() - start) / count


def row(
    gauge: str, width: int, fit_on: Sequence[Adapter], held_out: Sequence[Adapter], first: Trajectory
) -> tuple[str, ...]:
    """One line of the table."""
    spec = first.spec
    start = {"canonical": None, "reference": fit_on[0]}.get(gauge, first.start())
    clock = time.perf_counter()
    codec = AdapterCodec.fit(lambda: fit_on, spec, start, gauge=gauge, width=width)
    fit_time = milliseconds(clock, len(fit_on))
    clock = time.perf_counter()
    one_shot = with_one_shot_bases(codec, fit_on, width)
    one_shot_time = milliseconds(clock, len(fit_on))
    codec.encode(held_out[0])  # makes the buffers
    clock = time.perf_counter()
    tokens = codec.encode_many(held_out)
    encode_time = milliseconds(clock, len(held_out))
    clock = time.perf_counter()
    for token in tokens:
        codec.decode(token)
    decode_time = milliseconds(clock, len(held_out))
    return (
        gauge,
        str(width),
        f"{error(codec, held_out, spec):.4f}",
        f"{error(codec, fit_on, spec):.4f}",
        f"{float(codec.energy_kept.mean()):.4f}",
        f"{error(one_shot, held_out, spec):.4f}",
        f"{fit_time:.1f}",
        f"{one_shot_time:.1f}",
        f"{encode_time:.1f}",
        f"{decode_time:.1f}",
        f"{sum(basis.nbytes for basis in codec.bases if basis is not None) / 1e6:.1f}",
    )


def measured(store: Path, widths: Sequence[int], gauges: Sequence[str], targets: int) -> Result:
    """The table of a store's runs."""
    runs = TrajectoryStore(store, create=False).trajectories()
    tasks = sorted({run.task.name for run in runs})
    if len(tasks) < 2:
        raise SystemExit(
            f"{store} has finished runs of {len(tasks)} tasks; expected at least 2, one held out."
        )
    for run in runs[1:]:
        require_same_spec(runs[0].spec, run.spec, run.run_id)
    out = set(tasks[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY] or tasks[-1:])
    fit_on = list(adapters_of([run for run in runs if run.task.name not in out], targets))
    held_out = list(adapters_of([run for run in runs if run.task.name in out], targets))
    pairs = [(gauge, width) for gauge in gauges or possible_gauges(runs) for width in widths]
    bar = tqdm(pairs, desc="gauges and widths", unit="codec")
    rows = [row(gauge, width, fit_on, held_out, runs[0]) for gauge, width in bar]
    spec = runs[0].spec
    title = (
        f"{len(fit_on)} adapters of {len(spec.sites)} sites, {spec.numbers / 1e6:.2f} M numbers, fitted; "
        f"{len(held_out)} of {len(out)} other tasks held out"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB, on Linux
    return Result(title, COLUMNS, rows, {"peak memory, MB": peak})


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--plan", type=int, metavar="RUNS", help="no store: random runs of the plan's size")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of --plan; fewer: a quick try")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument(
        "--gauges", nargs="+", choices=GAUGES, default=[], help="default: all that the runs allow"
    )
    parser.add_argument("--targets", type=int, default=3, help="snapshots of a run, at equal progress")
    options = parser.parse_args()
    if (options.store is None) == (options.plan is None):
        parser.error("name a store, or --plan with a number of runs; one of the two")
    about = options.widths, options.gauges, options.targets
    if options.store:
        publish(measured(options.store, *about), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_runs(store, spec_of_plan(options.layers), options.plan, parts=PARTS, decay=DECAY)
        publish(measured(store, *about), options)


if __name__ == "__main__":
    main()
