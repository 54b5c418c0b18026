"""What examples beside the prompt are worth to a generator that reads them, without a gradient step.

    python benchmarks/read_examples.py recipes/read_examples.yaml [--counts 4 16] [--shots 5]

On the recipe's unseen tasks, by its generator: the prompt alone, and the prompt with so many of the task's
examples; against the multi-task LoRA that differences are added to (`origin`), and against that LoRA and the
base model with `--shots` examples in their context. In both contexts of the protocol; differences are paired
and bootstrapped over tasks. Interrupted, it goes on at the task where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import require_unseen, write_pages
from paired import compared, table

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import load_recipe
from ltdi_peft.evaluate import commit, machine
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.kept import Line, hashed, kept_lines, task_keys
from ltdi_peft.protocol import generator_digest
from ltdi_peft.score import make_sheet, pick_shots, score
from ltdi_peft.spec import require_same_spec
from ltdi_peft.summary import CONTEXTS, UNSEEN
from ltdi_peft.task import Task

PROMPT, ORIGIN = "prompt alone", "origin"


def scored(bench: Bench, generator: Generator, task: Task, counts: Sequence[int], shots: int) -> Line:
    """Context → method → accuracy on the task's evaluation examples."""
    base, adapted = bench.base, bench.adapted
    examples = task.evaluation[: bench.recipe.evaluate.examples]
    origin = generator.codec.nothing()
    found: Line = {context: {} for context in CONTEXTS}
    for context in CONTEXTS:
        prompts = task.held_out_prompts if context == "prompt" else None
        asked = {"base": base, "prompt_in_context": context == "prompt"}
        made = {ORIGIN: origin, PROMPT: generator.generate(task.held_out_prompts[:1], **asked)[0].adapter}
        for count in counts:
            shown = [task.train[:count]]
            (one,) = generator.generate(task.held_out_prompts[:1], examples=shown, **asked)
            made[f"{count} read"] = one.adapter
        in_context = {f"base, {shots} in context": bench.fresh, f"origin, {shots} in context": origin}
        for adapters, solved in ((made, ()), (in_context, pick_shots(task, shots))):
            sheet = make_sheet(adapted, examples, prompts, shots=solved)
            stacked = stack_adapters(list(adapters.values()), adapted.device)
            values = [round(value, 6) for value in score(adapted, sheet, stacked).accuracy.tolist()]
            found[context] |= dict(zip(adapters, values, strict=True))
    return found


def main() -> None:
    """Score, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16], help="examples that are read")
    parser.add_argument("--shots", type=int, default=5, help="examples in context")
    parser.add_argument("--generator", help="a folder; the recipe's own by default")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    bench = open_bench(recipe)
    generator = find_generator(known.generator or recipe.generator_folder)
    require_same_spec(bench.spec, generator.spec, "the generator")
    tasks = {split: bench.suite.split(split) for split in UNSEEN if bench.suite.split(split)}
    every = [task for part in tasks.values() for task in part]
    require_unseen(generator, (task.name for task in every))
    about = {"generator": generator_digest(generator), "counts": known.counts, "shots": known.shots}
    keys = task_keys(every, recipe.evaluate.examples)
    lines = kept_lines(
        recipe.folder / "evaluation" / f"read-{hashed(about)}.jsonl",
        every,
        keys,
        lambda group: [scored(bench, generator, task, known.counts, known.shots) for task in group],
        together=1,
        desc="evaluation",
        progress=True,
    )
    most = f"{max(known.counts)} read"
    splits = {split: compared(most, split, part, lines, recipe) for split, part in tasks.items()}
    head = {"recipe": recipe.name, "machine": machine(torch.device("cpu")), "commit": commit()}
    text = "\n\n".join(
        [
            f"# {recipe.name}",
            "\n".join(f"- {key}: {value}" for key, value in head.items()),
            f"Made by `python benchmarks/read_examples.py {known.recipe}`; intervals are 95 %, bootstrapped "
            f"over tasks (unseen domains: over domains). {recipe.evaluate.examples} evaluation examples a "
            f"task, prompts in held-out words.",
            *(table(most, split, found) for split, found in splits.items()),
        ]
    )
    result = {**head, "splits": splits, "per_task": lines}
    write_pages(known.results, recipe.name, result, f"{text}\n")


if __name__ == "__main__":
    main()
