"""The multi-task LoRA at four times the rank against the package's generator, on the recipe's unseen tasks.

    python benchmarks/wide_rival.py recipes/smollm2_builtin.yaml [--generator FOLDER] [--results FOLDER]

Nothing is collected: the rival is trained on the training tasks (an hour at the whole suite, once; it is kept
in `<output>/multi_task_lora_4x`), the generator is there. `origin` is what the generator adds to: the
multi-task LoRA at the recipe's rank. Differences are paired and bootstrapped over tasks.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import require_unseen, write_pages
from paired import compared, table
from tqdm import tqdm

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import load_recipe
from ltdi_peft.evaluate import commit, machine
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.generator_config import default_folder
from ltdi_peft.multi_task import train_wide_multi_task_lora, widened
from ltdi_peft.protocol import one_by_one, seed_prompts
from ltdi_peft.report import saw_line
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter, require_same_spec
from ltdi_peft.summary import CONTEXTS, UNSEEN
from ltdi_peft.task import Task

METHODS = ("ours", "origin", "multi_task_lora_4x")


def task_accuracy(
    bench: Bench, wide: Bench, rival: Adapter, generator: Generator, task: Task
) -> dict[str, dict[str, float]]:
    """Context → method → accuracy on the task's evaluation examples, seeds averaged."""
    settings = bench.recipe.evaluate
    examples, prompts = task.evaluation[: settings.examples], task.held_out_prompts
    asked = seed_prompts(task, settings.seeds)
    origin = generator.codec.nothing()
    broad = stack_adapters([rival], wide.adapted.device)
    found = {}
    for context in CONTEXTS:
        # The specs differ in the rank alone, so one sheet's lower activations serve both.
        sheet = make_sheet(bench.adapted, examples, prompts if context == "prompt" else None)
        made = one_by_one(generator, bench, asked, settings.seeds, context=context)
        narrow = stack_adapters([*made, origin], bench.adapted.device)
        *ours, alone = score(bench.adapted, sheet, narrow).accuracy.tolist()
        four = score(wide.adapted, sheet, broad).accuracy.tolist()
        found[context] = dict(zip(METHODS, (sum(ours) / len(ours), alone, four[0]), strict=True))
    return found


def page(found: dict[str, Any], recipe: str, generator: str) -> str:
    """The result as Markdown; `recipe` and `generator` as they were named."""
    head = "\n".join(f"- {key}: {found[key]}" for key in ("recipe", "machine", "commit"))
    tried = found["trained"]
    best = max(point["accuracy"] for point in tried["curve"])
    tables = "\n\n".join(table(METHODS[0], split, one) for split, one in found["splits"].items())
    return (
        f"# {found['recipe']}_wide\n\n{head}\n- generator: {generator}\n\n"
        f"Made by `python benchmarks/wide_rival.py {recipe}`; intervals are 95 %.\n\n"
        f"`multi_task_lora_4x` has rank {tried['rank']}; after {tried['steps']} steps its best accuracy on "
        f"validation tasks is {best:.3f}.\n{saw_line('multi_task_lora_4x', tried)}\n{tables}\n"
    )


def main() -> None:
    """Train the rival if it is not there, score all three, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    bench = open_bench(recipe)
    generator = find_generator(known.generator or default_folder())
    require_same_spec(bench.spec, generator.spec, "the generator")
    require_unseen(generator, (task.name for split in UNSEEN for task in bench.suite.split(split)))
    wide = widened(bench)
    rival, tried = train_wide_multi_task_lora(wide)
    splits, per_task = {}, {}
    for split in UNSEEN:
        tasks = bench.suite.split(split)
        if not tasks:
            continue
        bar = tqdm(tasks, desc=split, unit="task")
        scored = {task.name: task_accuracy(bench, wide, rival, generator, task) for task in bar}
        splits[split] = compared(METHODS[0], split, tasks, scored, recipe)
        per_task |= scored
    about = {"recipe": recipe.name, "machine": machine(torch.device("cpu")), "commit": commit()}
    found = {**about, "trained": tried, "splits": splits, "per_task": per_task}
    name, text = f"{recipe.name}_wide", page(found, known.recipe, known.generator or "the one in the package")
    write_pages(known.results, name, found, text)


if __name__ == "__main__":
    main()
