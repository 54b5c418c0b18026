"""Where a step of generator training goes, against the roofline; fused optimiser, compiled network, bfloat16.

    python benchmarks/generator_training.py recipes/demo.yaml [--steps 30] [--compile]
    Expect: most of the step at the limit of memory, little of it drawing data. 2 CPU cores, 2 minutes.

Needs the recipe's collected runs. Limit: arithmetic at the rate of a large square product of the same type,
and the numbers that each phase must move at the rate of a long vector addition, phase by phase: weights are
read twice and gradients written, clipping reads them and writes them, AdamW reads four vectors and writes
three, the averaged weights read two and write one. `data` is the share of a step that draws rows and noise.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import Result, median_seconds, parser_of, product_rate, publish, synchronize
from torch.utils.flop_counter import FlopCounterMode

from ltdi_peft.collect import recipe_suite
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe, load_recipe
from ltdi_peft.prepare import Prepared, prepare
from ltdi_peft.session import Session

MOVED = 16  # numbers a weight that a step moves: 3 in the passes, 3 clipping, 7 AdamW, 3 for the average
LONG = 2**25  # numbers of the vectors that measure the memory's rate
COLUMNS = (
    "network",
    "variant",
    "M weights",
    "step, ms",
    "data, %",
    "GFLOP a step",
    "limit, ms",
    "of the limit",
)


def memory_rate(device: torch.device) -> float:
    """Bytes a second of a long vector addition: two vectors read, one written."""
    one, other, out = (torch.ones(LONG, device=device) for _ in range(3))
    return 3 * 4 * LONG / median_seconds(lambda: torch.add(one, other, out=out), device)


class Timed(Session):
    """A session that measures what drawing takes."""

    drawing = 0.0

    def draw(self, rng: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As it is, timed."""
        began = time.perf_counter()
        found = super().draw(rng, rows)
        self.drawing += time.perf_counter() - began
        return found


def opened(recipe: Recipe, prepared: Prepared, variant: str, device: torch.device) -> Timed:
    """A session of the variant."""
    precision = "bf16" if variant == "bfloat16" else "no"
    AcceleratorState._reset_state(reset_partial_state=True)  # else Accelerate keeps the first precision
    session = Timed(recipe, prepared, Accelerator(cpu=device.type == "cpu", mixed_precision=precision))
    if variant == "AdamW not fused":
        for group in session.optimizer.param_groups:
            group["fused"], group["foreach"] = False, None
    if variant == "compiled":
        session.network = torch.compile(session.network)
    return session


def row(session: Timed, variant: str, steps: int, rates: tuple[float, float]) -> tuple[tuple[str, ...], dict]:
    """Median step, share of drawing, arithmetic and limit."""
    network = "transformer" if session.recipe.denoiser.nonlinear else "linear"
    for _ in range(3):  # compiles, and makes the optimiser's state
        session.step()
    with FlopCounterMode(display=False) as counter:
        session.backward(session.done + 1)
    session.drawing, taken = 0.0, []
    for _ in range(steps):
        began = time.perf_counter()
        session.step()
        synchronize(session.accelerator.device)
        taken.append(time.perf_counter() - began)
    seconds, weights = sorted(taken)[steps // 2], sum(p.numel() for p in session.plain_network.parameters())
    flop, (arithmetic, memory) = counter.get_total_flops(), rates
    limit = flop / arithmetic + 4 * MOVED * weights / memory
    share = session.drawing / sum(taken)
    cells = (f"{weights / 1e6:.1f}", f"{1000 * seconds:.1f}", f"{100 * share:.1f}", f"{flop / 1e9:.2f}")
    numbers = {"weights": weights, "seconds": seconds, "data": share, "flop": flop, "limit": limit}
    cells = (network, variant, *cells, f"{1000 * limit:.1f}", f"{100 * limit / seconds:.0f} %")
    return cells, {"network": network, "variant": variant, **numbers}


def measured(recipe: Recipe, options: argparse.Namespace) -> Result:
    """Both networks, each in all variants."""
    prepared = prepare(recipe, PromptEncoder(recipe.condition.encoder), recipe_suite(recipe))
    tasks = len(prepared.data.names)
    arithmetic = {t: product_rate(t, options.device) for t in (torch.float32, torch.bfloat16)}
    memory = memory_rate(options.device)
    variants = ["plain", "AdamW not fused", "bfloat16", *(["compiled"] if options.compile else [])]
    rows, numbers = [], []
    for nonlinear in (False, True):
        about = replace(recipe, denoiser=replace(recipe.denoiser, nonlinear=nonlinear))
        for variant in variants:
            rate = arithmetic[torch.bfloat16 if variant == "bfloat16" else torch.float32]
            session = opened(about, prepared, variant, options.device)
            cells, found = row(session, variant, options.steps, (rate, memory))
            rows.append(cells)
            numbers.append(found)
    title = (
        f"{recipe.name}: {tasks} tasks, batch {recipe.train.batch_size}; memory moves "
        f"{memory / 1e9:.1f} GB/s, products reach {arithmetic[torch.float32] / 1e9:.0f} GFLOP/s in float32, "
        f"{arithmetic[torch.bfloat16] / 1e9:.0f} in bfloat16"
    )
    rates = {"float32": arithmetic[torch.float32], "bfloat16": arithmetic[torch.bfloat16], "memory": memory}
    return Result(title, COLUMNS, rows, {"rates": rates, "rows": numbers})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="a compiled network too; needs a C++ compiler")
    options, overrides = parser.parse_known_args(arguments)
    publish(measured(load_recipe(options.recipe, overrides), options), options)


if __name__ == "__main__":
    main()
