"""What a 4-bit base costs and saves: memory, accuracy of generated adapters, and time, beside the full base.

    python benchmarks/four_bit.py runs/demo/generator [--recipe recipes/demo.yaml] [--tasks 8] [--examples 32]

In: a generator's folder, the recipe it was trained with (its suite and adapter).  Out: one Markdown table.
The adapters are the same bytes in both columns, unless conditions are read from the base model itself; the
prompt is in context; tasks are spread evenly over the unseen ones. 1 CPU core, about 2 minutes.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import Recipe, load_recipe
from ltdi_peft.fit import losses
from ltdi_peft.four_bit import four_bit_layers
from ltdi_peft.generate import require_same_base
from ltdi_peft.generator import Generator, load_generator
from ltdi_peft.score import make_sheet, score
from ltdi_peft.task import Task

KINDS = ("full", "4-bit")
ROWS, REPEATS = 8, 5  # of a timed step


def open_benches(recipe: Recipe) -> tuple[dict[str, Bench], list[str]]:
    """The same recipe on both bases, and the seconds that each took to load."""
    benches, seconds = {}, []
    for kind in KINDS:
        began = time.perf_counter()
        about = replace(recipe.base, load_in_4bit=kind == "4-bit")
        benches[kind] = open_bench(replace(recipe, base=about))
        seconds.append(f"{time.perf_counter() - began:.1f}")
    return benches, seconds


def weight_bytes(bench: Bench) -> int:
    """Bytes of the parameters, and of what turns 4-bit numbers back into weights."""
    tensors = list(bench.base.model.parameters())
    for layer in four_bit_layers(bench.base.model):
        tensors += [t for t in layer.weight.quant_state.as_dict().values() if isinstance(t, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def warnings_of(generator: Generator, bench: Bench) -> int:
    """How many warnings about other base weights `generate_adapter` gives on this base."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        require_same_base(generator, bench.base)
    return len(seen)


def accuracies(generator: Generator, bench: Bench, task: Task, examples: int) -> tuple[float, float]:
    """Of the bare base and of the generated adapter, prompt in context."""
    (made,) = generator.generate([task.held_out_prompts[0]], seed=0, base=bench.base)
    sheet = make_sheet(bench.adapted, task.evaluation[:examples], task.held_out_prompts)
    bare, ours = score(bench.adapted, sheet, stack_adapters([bench.fresh, made.adapter])).accuracy.tolist()
    return bare, ours


def scoring(bench: Bench, task: Task) -> Callable[[], object]:
    """The whole model on `ROWS` examples, without gradients."""
    pool = bench.pool(task)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.ids) for r in pool.rows[:ROWS]], batch_first=True)

    @torch.no_grad()
    def run() -> object:
        return bench.base.model(input_ids=ids, use_cache=False)

    return run


def training(bench: Bench, task: Task) -> Callable[[], object]:
    """Loss and gradients of one adapter on `ROWS` examples, frozen lower layers kept."""
    pool, stacked = bench.pool(task), stack_adapters([bench.fresh])
    leaves = [factor.requires_grad_() for pair in stacked.values() for factor in pair]

    def run() -> object:
        loss = losses(bench.adapted, pool.rows[:ROWS], pool.inputs[:ROWS], stacked).mean()
        return torch.autograd.grad(loss, leaves)

    return run


def milliseconds(steps: dict[str, Callable[[], object]]) -> list[str]:
    """Median wall time of each, interleaved so that other load meets them alike; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append(1000 * (time.perf_counter() - began))
    return [f"{statistics.median(values[1:]):.0f}" for values in taken.values()]


def measured(recipe: Recipe, generator: Generator, count: int, examples: int) -> list[list[str]]:
    """The rows of the table, without the last column."""
    benches, seconds = open_benches(recipe)
    unseen = benches["full"].suite.split("unseen_tasks")
    tasks = unseen[:: max(1, len(unseen) // count)][:count]
    found = {
        task.name: {kind: accuracies(generator, bench, task, examples) for kind, bench in benches.items()}
        for task in tasks
    }
    rows = [["computes in", *(str(b.base.model.dtype).removeprefix("torch.") for b in benches.values())]]
    rows.append(["base weights, MB", *(f"{weight_bytes(bench) / 1e6:.1f}" for bench in benches.values())])
    rows.append(["Linear4bit layers", *(str(len(four_bit_layers(b.base.model))) for b in benches.values())])
    rows.append(["weights warnings", *(str(warnings_of(generator, bench)) for bench in benches.values())])
    rows += [[f"generated: `{name}`", *(f"{one[k][1]:.2f}" for k in KINDS)] for name, one in found.items()]
    for place, name in ((1, f"**generated, mean of {len(tasks)}**"), (0, "bare base, mean")):
        means = [statistics.fmean(one[kind][place] for one in found.values()) for kind in KINDS]
        rows.append([name, *(f"{mean:.3f}" for mean in means)])
    rows.append(["loading, s", *seconds])
    for name, step in (("forward pass", scoring), ("training step, top layers", training)):
        timed = milliseconds({kind: step(bench, tasks[0]) for kind, bench in benches.items()})
        rows.append([f"{name}, {ROWS} examples, ms", *timed])
    return rows


def print_table(rows: list[list[str]]) -> None:
    """Both columns side by side, and their ratio or difference."""
    print("| | full | 4-bit | |\n|---|---|---|---|")
    for name, full, small in rows:
        if name.endswith((", MB", ", s", ", ms")):
            low, high = sorted((float(full), float(small)))
            about = f"{high / low:.1f} × {'smaller' if float(small) < float(full) else 'larger'}"
        else:
            about = f"{float(small) - float(full):+.3g}" if "." in full else ""
        print(f"| {name} | {full} | {small} | {about} |")


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--examples", type=int, default=32)
    known, overrides = parser.parse_known_args(arguments)
    recipe, generator = load_recipe(known.recipe, overrides), load_generator(known.generator)
    rows = measured(recipe, generator, known.tasks, known.examples)
    name, threads = generator.config.base_model, torch.get_num_threads()
    print(f"{name}, {known.examples} examples a task, {threads} thread(s)\n")
    print_table(rows)


if __name__ == "__main__":
    main()
