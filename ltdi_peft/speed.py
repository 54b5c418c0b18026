"""How fast this machine does what the stages are made of: measured in about two seconds.

In: the shapes of a recipe.  Out: `Speed`.
Idea: a matrix product's peak says little about rows of thirty tokens (a CPU with AMX reaches 5 % of it), so
the program's own loops run on a random model of the same shape and few layers; from two depths follow the
time of one layer and of what every pass costs beside. Time does not depend on what the weights are.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ltdi_peft.base import Base, dtype_named
from ltdi_peft.batched import Row, stack_adapters
from ltdi_peft.collect import Bench, lay_out
from ltdi_peft.denoiser import Denoiser, DenoiserConfig
from ltdi_peft.fit import PIECE_ROWS, backward
from ltdi_peft.score import Sheet, score
from ltdi_peft.shapes import Shapes

LAYERS, DEPTHS = 4, (1, 3)  # of the small models, and how many of them are adapted
EACH = 0.2  # seconds of each of the ten measurements, after its first round
PRODUCT = 512  # rows and columns of the float32 and float64 products


@dataclass(frozen=True)
class Line:
    """Seconds a token: `fixed`, and `layer` for each layer that it passes."""

    fixed: float
    layer: float

    def seconds(self, tokens: int | float, layers: int) -> float:
        """Of so many tokens through so many layers."""
        return tokens * (self.fixed + layers * self.layer)


@dataclass(frozen=True)
class Speed:
    """What was measured: tokens through frozen layers, trained, scored; the generator; plain products."""

    cut: bool  # whether frozen lower layers can be kept apart for this kind of model
    lower: Line
    train: Line
    score: Line
    network: float  # seconds of the denoiser on one condition
    step: float  # seconds of one training step of the generator
    float32: float  # FLOP a second
    float64: float


def measured(shapes: Shapes, network: DenoiserConfig, device: torch.device) -> Speed:
    """Run the small models and the generator's network, on a CPU on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return on_one_thread(shapes, network, device)
    finally:
        torch.set_num_threads(threads)


def on_one_thread(shapes: Shapes, network: DenoiserConfig, device: torch.device) -> Speed:
    """All measurements."""
    low, high = (small_bench(shapes, depth, device) for depth in DEPTHS)
    (lower_1, train_1, score_1), (lower_3, train_3, score_3) = (times(shapes, b) for b in (low, high))
    cut = high.adapted.cut > 0
    if cut:
        # The lowest adapted layer runs with the frozen ones: two layers below three adapted, four below one.
        lines = (
            line((2, lower_3), (4, lower_1)),
            line((1, train_1), (3, train_3)),
            line((1, score_1), (3, score_3)),
        )
    else:  # all layers run every time
        lines = Line(0.0, 0.0), Line(0.0, train_3 / LAYERS), Line(0.0, score_3 / LAYERS)
    return Speed(
        cut,
        *lines,
        network=network_seconds(network, device),
        step=step_seconds(shapes, network, device),
        float32=product_rate(torch.float32, device),
        float64=product_rate(torch.float64, device),
    )


def small_bench(shapes: Shapes, depth: int, device: torch.device) -> Bench:
    """A random model of the recipe's kind with `LAYERS` layers, the top `depth` adapted."""
    recipe = shapes.recipe
    table = shapes.config.to_dict()
    kinds = table.get("layer_types")
    changed: dict[str, Any] = {"num_hidden_layers": LAYERS} | (
        {"layer_types": kinds[:LAYERS]} if kinds else {}
    )
    config = type(shapes.config).from_dict({**table, **changed})
    options = {"attn_implementation": "eager"} if device.type == "cpu" else {}  # as open_bench does
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        dtype = dtype_named(recipe.base.dtype, device)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    model = model.eval().requires_grad_(False)
    model.name_or_path = recipe.base.model
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))  # rows are made without
    base = Base(model, tokenizer, recipe.base.model, "", "")
    return lay_out(replace(recipe, adapter=replace(recipe.adapter, layers=depth)), shapes.suite, base)


def times(shapes: Shapes, bench: Bench) -> tuple[float, float, float]:
    """Seconds a token through the lower layers, of a training step, and of scoring."""
    adapted, rows = bench.adapted, random_rows(shapes)
    inputs, stacked = adapted.inputs(rows), stack_adapters([bench.fresh], adapted.device)
    trained = [b for _, b in stacked.values()]
    if shapes.recipe.collect.gauge != "shared_a":
        trained += [a for a, _ in stacked.values()]
    for factor in trained:
        factor.requires_grad_(True)
    sheet = Sheet(rows, tuple(inputs), tuple(range(len(rows))), (True,) * len(rows))
    found = (
        best(lambda: adapted.inputs(rows), adapted.device),
        best(lambda: backward(adapted, rows, inputs, stacked), adapted.device),
        best(lambda: score(adapted, sheet, stacked), adapted.device),
    )
    tokens = sum(len(row.ids) for row in rows)
    lower, train, scored = (seconds / tokens for seconds in found)
    return lower, train, scored


def random_rows(shapes: Shapes) -> tuple[Row, ...]:
    """One piece of rows as long as the recipe's."""
    length, answer = round(shapes.rows.prompted), max(1, round(shapes.rows.answer))
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, int(shapes.config.vocab_size), (PIECE_ROWS, length), generator=rng)
    return tuple(Row(tuple(row), length - answer) for row in ids.tolist())


def line(one: tuple[int, float], other: tuple[int, float]) -> Line:
    """Through two points (layers, seconds a token); no part of it is below 0."""
    (x, y), (to_x, to_y) = one, other
    slope = max(0.0, (to_y - y) / (to_x - x))
    return Line(max(0.0, y - slope * x), slope)


def best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several rounds after a first one.

    On a CPU, of one thread's own time: what other programs do meanwhile is not counted.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    work()
    found, end = [], time.perf_counter() + EACH
    while not found or time.perf_counter() < end:
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - began)
    return min(found)


def network_seconds(config: DenoiserConfig, device: torch.device) -> float:
    """The denoiser on one condition."""
    network = Denoiser(config).to(device)
    x, condition = (
        torch.zeros(1, config.sites, config.width, device=device),
        torch.zeros(1, config.condition_width),
    )
    t = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        return best(lambda: network(x, t, condition.to(device)), device)


def step_seconds(shapes: Shapes, config: DenoiserConfig, device: torch.device) -> float:
    """One training step: the rows' centres, the network forward and back, AdamW and the averaged weights."""
    recipe, network = shapes.recipe, Denoiser(config).to(device)
    rows, tasks = recipe.train.batch_size, len(shapes.tasks("train"))
    x = torch.randn(rows, config.sites, config.width, device=device)
    t, condition = (
        torch.zeros(rows, dtype=torch.long, device=device),
        torch.randn(rows, config.condition_width),
    )
    # The centre of a row is a mixture of all tasks' targets, on the CPU as in training.
    mixture, targets = (
        torch.rand(rows, tasks),
        torch.rand(tasks, recipe.diffusion.k * config.sites * config.width),
    )
    optimizer = torch.optim.AdamW(network.parameters())
    average = [p.detach().clone() for p in network.parameters()]

    def step() -> None:
        torch.matmul(mixture, targets)
        network(x, t, condition.to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for mean, now in zip(average, network.parameters(), strict=True):
            mean.lerp_(now.detach(), 0.01)

    inner = recipe.meta.inner_steps if recipe.meta.method == "reptile" else 1
    return best(step, device) * inner


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of a square product."""
    square = torch.randn(PRODUCT, PRODUCT, dtype=dtype, device=device)
    return 2 * PRODUCT**3 / best(lambda: square @ square, device)
