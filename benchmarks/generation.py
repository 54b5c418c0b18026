"""Seconds from a sentence to a loaded PeftModel, step by step; against a T2L hypernetwork; and hot swap.

    python benchmarks/generation.py runs/demo/generator [--batches 1 32 100] [--device cuda]
    Expect: hot swap in ≤ 20 ms for SmolLM2-135M. 1 CPU core, about 2 minutes.

The peer is one forward pass of a hypernetwork (hypernetwork.py) with as many numbers as the generator has
outside of its codec, untrained: time does not depend on what the weights are. Both start at the same
conditions and end at adapters on the CPU. Peers of the hot swap: PEFT's own, and loading beside the old one.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import Result, median_seconds, parser_of, publish
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict

from ltdi_peft.adapter import attach, load_adapter_folder, prove_loaded
from ltdi_peft.base import Base, load_base
from ltdi_peft.generate import PROBE
from ltdi_peft.generated import GeneratedAdapter
from ltdi_peft.generator import Generator, load_generator
from ltdi_peft.hypernetwork import Hypernetwork, mean_difference, parameter_count
from ltdi_peft.t2l import T2LRival

MOST = 20.0  # ms of a hot swap
Cells = list[tuple[str, ...]]


def rival_of(generator: Generator, size: int) -> T2LRival:
    """An untrained hypernetwork of at least `size` numbers, for the generator's adapters."""
    spec, start = generator.spec, generator.codec.start
    if start is None:
        start = {s.name: (torch.zeros(s.rank, s.fan_in), torch.zeros(s.fan_out, s.rank)) for s in spec.sites}
    width, train_a = generator.conditions.shape[-1], generator.codec.gauge != "shared_a"
    for hidden in range(32, 8192, 32):
        with torch.device("meta"):
            options = {"condition_width": width, "hidden": hidden, "train_a": train_a}
            count = parameter_count(Hypernetwork(spec, start, **options))
        if count >= size:
            network = Hypernetwork(spec, start, **options).eval().to(generator.centre.device)
            return T2LRival(network, mean_difference(network, generator.conditions[:, None]))
    raise ValueError(f"no hypernetwork of {size} numbers below a hidden width of 8192.")


def batches(generator: Generator, rival: T2LRival, base: Base, sizes: list[int]) -> tuple[Cells, dict]:
    """Milliseconds of condition, chain and decoding of so many prompts at once, and of the peer."""
    rows, numbers, device = [], {}, generator.centre.device
    for size in sizes:
        prompts = [f"Write sentence number {index} backwards." for index in range(size)]
        conditions = generator.encode_prompts(prompts, base)
        with torch.no_grad():
            tokens = generator.tokens(conditions)
            steps = {
                "condition": median_seconds(lambda p=prompts: generator.encode_prompts(p, base), device, 3),
                "chain": median_seconds(lambda c=conditions: generator.tokens(c), device, 3),
                "decode": median_seconds(
                    lambda t=tokens: [generator.clamped(f) for f in generator.codec.decode_batches(t)],
                    device,
                    3,
                ),
                "T2L": median_seconds(lambda c=conditions: rival.adapters(c), device, 3),
            }
        numbers[str(size)] = steps
        ours = steps["chain"] + steps["decode"]
        cells = [f"{1000 * steps[key]:.1f}" for key in ("condition", "chain", "decode")]
        each = f"{1000 * (ours + steps['condition']) / size:.1f}"
        ratio = f"{ours / steps['T2L']:.2f}"
        rows.append((f"{size} prompts, ms", *cells, each, f"{1000 * steps['T2L']:.1f}", ratio))
    return rows, numbers


def loading(generator: Generator, made: GeneratedAdapter, base: Base) -> dict[str, float]:
    """Seconds of every part of the way from a generated adapter to a proved PeftModel."""
    device = base.model.device
    probe = base.tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)

    def written() -> None:
        with tempfile.TemporaryDirectory() as name:
            made.save_pretrained(Path(name))
            load_adapter_folder(Path(name))

    steps = {"write and read back": median_seconds(written, device, 3)}
    steps["attach (and detach)"] = median_seconds(
        lambda: attach(base.model, made.spec, made.adapter).unload(), device, 3
    )
    model, ranges = attach(base.model, made.spec, made.adapter), generator.config.norm_range
    steps["prove"] = median_seconds(
        lambda: prove_loaded(model, made.spec, made.adapter, probe, norm_range=ranges), device, 3
    )
    model.unload()
    return steps


def swapping(one: GeneratedAdapter, other: GeneratedAdapter, base: Base) -> dict[str, float]:
    """Seconds of replacing the adapter of a loaded model, in our way and in PEFT's."""
    model = attach(base.model, one.spec, one.adapter)
    turn, device = [one, other], base.model.device

    def ours() -> None:
        turn.reverse()
        turn[0].swap_into(model)

    def in_memory() -> None:
        turn.reverse()
        named = {
            f"base_model.model.{site}.lora_{kind}.default.weight": weight
            for site, pair in turn[0].adapter.items()
            for kind, weight in zip("AB", pair, strict=True)
        }
        hotswap_adapter_from_state_dict(model, named, "default", model.peft_config["default"])

    def beside() -> None:
        turn.reverse()
        attach(model, turn[0].spec, turn[0].adapter, "more")
        model.set_adapter("default")
        model.delete_adapter("more")

    with tempfile.TemporaryDirectory() as name:
        one.save_pretrained(Path(name))
        steps = {
            "swap_into": median_seconds(ours, device),
            "PEFT hotswap_adapter_from_state_dict": median_seconds(in_memory, device),
            "PEFT hotswap_adapter, from a folder": median_seconds(
                lambda: hotswap_adapter(model, name, "default"), device
            ),
            "load beside, delete": median_seconds(beside, device),
        }
    model.unload()
    return steps


def measured(options: argparse.Namespace) -> Result:
    """All parts in one table."""
    generator = load_generator(options.generator).to(options.device)
    base = load_base(generator.config.base_model, device=options.device)
    size = sum(tensor.numel() for tensor in generator.state_dict().values())
    rival = rival_of(generator, size)
    rows, numbers = batches(generator, rival, base, options.batches)
    one, other = (generator.generate(["Answer in capitals."], seed=s, base=base)[0] for s in (0, 1))
    load, swap = loading(generator, one, base), swapping(one, other, base)
    rows += [(f"{name}, ms", f"{1000 * s:.1f}", *[""] * 5) for name, s in load.items()]
    for name, seconds in swap.items():
        goal = f"≤ {MOST:.0f}: {'met' if 1000 * seconds <= MOST else '**missed**'}"
        rows.append((f"hot swap, {name}, ms", f"{1000 * seconds:.1f}", "", "", "", "", goal))
    peer = parameter_count(rival.network)
    title = (
        f"{generator.config.base_model}, {len(generator.spec.sites)} sites; generator {size / 1e6:.1f} M "
        f"numbers beside its codec, T2L hypernetwork {peer / 1e6:.1f} M; ratio: chain and decode over T2L"
    )
    columns = ("", "condition", "chain", "decode", "ms a prompt", "T2L, ms", "ratio")
    return Result(title, columns, rows, {"batches": numbers, "loading": load, "hot_swap": swap})


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("generator", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 100])
    options = parser.parse_args(arguments)
    publish(measured(options), options)


if __name__ == "__main__":
    main()
