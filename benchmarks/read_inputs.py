"""A generator whose classifier was fitted on prompts alone, taught to read inputs too; nothing else changes.

    python benchmarks/read_inputs.py recipes/attributes.yaml --out FOLDER [--generator FOLDER]

In: a generator with attributes that the recipe trained, the package's own unless named.
Out: the generator in the new folder FOLDER, with what `ltdi train` fits today beside what it reads in
prompts; and how many of the held-out prompts of the recipe's validation tasks are read right, without inputs
and with 1, 4 and 16 of the task's. Nothing needs a store.
"""

import argparse
import statistics
from pathlib import Path

from ltdi_peft.attribute_fit import told_inputs
from ltdi_peft.collect import recipe_suite
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import load_recipe
from ltdi_peft.encoding import tasks_with_runs
from ltdi_peft.files import replacing_folder
from ltdi_peft.generate import find_generator
from ltdi_peft.tables import lines_of
from ltdi_peft.task import Task

COUNTS = (0, 1, 4, 16)


def read_right(encoder: PromptEncoder, tasks: list[Task], count: int) -> dict[str, float]:
    """Attribute → share of held-out prompts whose value is found, beside `count` inputs of their task."""
    found: dict[str, list[bool]] = {}
    for task in tasks:
        prompts = task.held_out_prompts
        shown = [[example.input for example in task.train[:count]]] * len(prompts) if count else ()
        for told in encoder(prompts, inputs=shown):
            reading = encoder.attributes.reading(told)
            for name, value in task.attributes:
                found.setdefault(name, []).append(reading[name] == value)
    return {name: statistics.fmean(right) for name, right in found.items()}


def main() -> None:
    """Fit, count, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the generator")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    known, overrides = parser.parse_known_args()
    if known.out.exists():
        raise SystemExit(f"{known.out} exists already; nothing is overwritten. Choose another --out.")
    recipe, generator = load_recipe(known.recipe, overrides), find_generator(known.generator)
    if generator.attributes is None:
        raise SystemExit("this generator has no classifier of attributes (condition.attributes).")
    suite = recipe_suite(recipe)
    names = tasks_with_runs(recipe, [task.name for task in suite.split("train")])
    encoder = PromptEncoder(generator.config.encoder, tuning=generator.tuning)
    taught = told_inputs(generator.attributes, encoder, [suite[name] for name in names])
    rows, tasks = [], [task for task in suite.split("validation") if task.attributes]
    for count in COUNTS:
        right = read_right(encoder.with_attributes(taught), tasks, count)
        rows.append([str(count), *(f"{right[name]:.3f}" for name in taught.values)])
    print(lines_of(["inputs", *taught.values], rows))
    generator.attributes = taught
    with replacing_folder(known.out) as partial:
        generator.save_pretrained(partial)


if __name__ == "__main__":
    main()
