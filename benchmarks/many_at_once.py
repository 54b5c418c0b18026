"""Many adapters at once, as `collect` trains them, against PEFT's Trainer one adapter after the other.

    python benchmarks/many_at_once.py [--tasks 8] [--start runs/demo/start] [--base.dtype=float32]
    Expect: at least 1.5 × the adapters a minute on 2 CPU cores, 5 × on a GPU. 2 CPU cores, about 3 minutes.

Both train the recipe's adapter from the same start on the same rows in the same order, with the same AdamW,
learning rates and clipping, on one loaded base model. Ours also makes its cached activations and records its
snapshots within its time; the peer saves nothing and has its rows tokenised beforehand.
FLOP are counted, not guessed; the limit is a large matrix product of the same dtype in the same run.
"""

import argparse
import tempfile
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from common import Result, parser_of, product_rate, publish, timed
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForSeq2Seq, ProgressCallback, Trainer, TrainingArguments

from ltdi_peft.adapter import attach, load_adapter_folder, read_adapter
from ltdi_peft.batched import Row, stack_adapters
from ltdi_peft.collect import Bench, open_bench, record_group, run_seed
from ltdi_peft.config import load_recipe
from ltdi_peft.distance import delta_w_distance
from ltdi_peft.fit import backward, draws, make_pool, scheduled
from ltdi_peft.flops import counted
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task


def ours(bench: Bench, start: Adapter, tasks: list[Task], folder: Path) -> list[Adapter]:
    """Final adapters of the tasks, trained `collect.together` at a time and recorded in a store."""
    store, together = TrajectoryStore(folder / "store"), bench.recipe.collect.together
    for first in range(0, len(tasks), together):
        record_group(bench, store, start, [(task, 0) for task in tasks[first : first + together]])
    runs = {run.task.name: run for run in store.trajectories()}
    return [runs[task.name].adapter(runs[task.name].snapshots[-1]) for task in tasks]


def drawn_rows(bench: Bench, task: Task) -> list[Row]:
    """The rows of all steps in the order in which ours reads them."""
    single, pool = bench.recipe.collect.single, bench.pool(task)
    batches = islice(draws(pool, single, run_seed(bench.recipe.seed, 0)), single.steps)
    return [pool.rows[index] for index in chain.from_iterable(batches)]


def fields(row: Row) -> dict[str, list[int]]:
    """A row as the Trainer reads it; the loss is of the answer alone."""
    return {"input_ids": list(row.ids), "labels": [-100] * row.answer + list(row.ids[row.answer :])}


def wrapped(bench: Bench, start: Adapter) -> PeftModel:
    """The base model with the start on it, and the factors that the recipe trains."""
    model = attach(bench.base.model, bench.spec, start)
    frozen_a = bench.recipe.collect.gauge == "shared_a"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not frozen_a))
    return model


def one_alone(bench: Bench, start: Adapter, rows: list[Row], folder: Path) -> Adapter:
    """One adapter by PEFT and Trainer; the base model is afterwards what it was."""
    single, model = bench.recipe.collect.single, wrapped(bench, start)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=single.learning_rate, weight_decay=0.0)
    about = {"warmup": single.warmup, "schedule": single.schedule}
    rates = LambdaLR(
        optimizer, lambda step: scheduled(1.0, min(step, single.steps - 1), single.steps, **about)
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=single.steps,
        per_device_train_batch_size=single.batch_size,
        train_sampling_strategy="sequential",
        max_grad_norm=single.max_grad_norm,
        use_cpu=bench.adapted.device.type == "cpu",
        bf16=False,  # the base model has the dtype already
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=False,  # else it prints its logs
    )
    collator = DataCollatorForSeq2Seq(bench.base.tokenizer)
    options = {"train_dataset": [fields(row) for row in rows], "data_collator": collator}
    trainer = Trainer(model=model, args=arguments, optimizers=(optimizer, rates), **options)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    found = read_adapter(model)
    model.unload()
    bench.base.model.eval()
    return found


def operations(bench: Bench, start: Adapter, tasks: list[Task]) -> tuple[float, float]:
    """FLOP an adapter of ours and of the peer, from a step of the first tasks (rows differ by a few %)."""
    single, collect, own = bench.recipe.collect.single, bench.recipe.collect, tasks[:1]
    rows = {task.name: drawn_rows(bench, task)[: single.batch_size] for task in own}
    stacked = stack_adapters([start], bench.adapted.device)
    for a, b in stacked.values():
        a.requires_grad_(collect.gauge != "shared_a")
        b.requires_grad_(True)
    batch = rows[own[0].name]
    inputs = bench.adapted.inputs(batch)
    lower = counted(lambda: make_pool(bench.adapted, own[0], collect.rows))
    step = counted(lambda: backward(bench.adapted, batch, inputs, stacked))
    model, collator = wrapped(bench, start), DataCollatorForSeq2Seq(bench.base.tokenizer)
    padded = collator([fields(row) for row in batch]).to(bench.adapted.device)
    alone = counted(lambda: model(**padded).loss.backward())
    model.unload()
    return lower + single.steps * step, float(single.steps * alone)


def compared(
    bench: Bench, tasks: list[Task], pairs: list[tuple[Adapter, Adapter]], examples: int
) -> tuple[list[float], list[float], list[int]]:
    """Per task: relative distance in ΔW, accuracy of ours, and by how many examples the peer differs."""
    distances, accuracies, different = [], [], []
    for task, (own, other) in zip(tasks, pairs, strict=True):
        distances.append(delta_w_distance(bench.spec, own, other, relative=True))
        sheet = make_sheet(bench.adapted, task.evaluation[:examples], task.held_out_prompts)
        right = score(bench.adapted, sheet, stack_adapters([own, other], bench.adapted.device)).correct.sum(1)
        accuracies.append(float(right[0]) / len(sheet.right))
        different.append(abs(int(right[0] - right[1])))
    return distances, accuracies, different


def measured(options: argparse.Namespace, overrides: list[str]) -> Result:
    """Both ways, their limit and their results."""
    recipe = load_recipe(options.recipe, overrides)
    bench = open_bench(recipe, device=options.device)
    start = load_adapter_folder(options.start, expected=bench.spec)[1] if options.start else bench.fresh
    tasks = bench.suite.split("train")[: options.tasks]
    bench.adapted.inputs([Row((2, 3, 4), 2)])  # what the first call alone costs belongs to neither
    with tempfile.TemporaryDirectory() as folder:
        with timed(options.device) as together:
            own = ours(bench, start, tasks, Path(folder))
        rows = [drawn_rows(bench, task) for task in tasks]
        with timed(options.device) as alone:
            others = [one_alone(bench, start, part, Path(folder)) for part in rows]
    flop = operations(bench, start, tasks)
    limit = product_rate(bench.base.model.dtype, options.device)
    found = compared(bench, tasks, list(zip(own, others, strict=True)), options.examples)
    numbers = {
        "seconds": [together.seconds, alone.seconds],
        "processor_seconds": [together.processor, alone.processor],
        "flop_an_adapter": flop,
        "product_flop_a_second": limit,
        **dict(zip(("distance", "accuracy", "examples_apart"), found, strict=True)),
    }
    single = recipe.collect.single
    title = (
        f"{len(tasks)} adapters, {single.steps} steps of {single.batch_size} rows, "
        f"{recipe.base.model} in {str(bench.base.model.dtype).removeprefix('torch.')}"
    )
    target = 5.0 if options.device.type == "cuda" else 1.5
    columns = ("", "ours, together", "PEFT Trainer, one by one", "ratio", "target")
    return Result(title, columns, table(numbers, len(tasks), target, options.examples), numbers)


def table(numbers: dict[str, Any], count: int, target: float, examples: int) -> list[tuple[str, ...]]:
    """Rows of the table."""
    (mine, theirs), used = numbers["seconds"], numbers["processor_seconds"]
    (own, other), limit = numbers["flop_an_adapter"], numbers["product_flop_a_second"]
    rates = own * count / mine, other * count / theirs
    shares = [f"{rate / limit:.1%}" for rate in rates]
    wanted = f"≥ {target}"

    def pair(name: str, x: float, y: float, ratio: float, form: str, goal: str = "") -> tuple[str, ...]:
        return name, format(x, form), format(y, form), f"{ratio:.2f}", goal

    return [
        pair("adapters a minute", 60 * count / mine, 60 * count / theirs, theirs / mine, ".1f", wanted),
        pair(
            "processor seconds an adapter", used[0] / count, used[1] / count, used[1] / used[0], ".1f", wanted
        ),
        pair("TFLOP an adapter", own / 1e12, other / 1e12, other / own, ".2f"),
        pair("GFLOP/s", rates[0] / 1e9, rates[1] / 1e9, rates[0] / rates[1], ".0f"),
        (f"share of a large product's {limit / 1e9:.0f} GFLOP/s", *shares, "", ""),
        ("‖ΔW − ΔW′‖/‖ΔW‖, largest", f"{max(numbers['distance']):.1e}", "", "", "≤ 1e-2 in float32"),
        (f"of {examples} answers other, most", str(max(numbers["examples_apart"])), "", "", "≤ 1"),
        ("accuracy, mean", f"{sum(numbers['accuracy']) / count:.3f}", "", "", ""),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--start", type=Path, help="a PEFT folder; default: a fresh adapter")
    parser.add_argument("--examples", type=int, default=32)
    options, overrides = parser.parse_known_args(arguments)
    publish(measured(options, overrides), options)


if __name__ == "__main__":
    main()
