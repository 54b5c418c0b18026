"""The subcommands of `ltdi`: each a thin call of the same Python function.

In: parsed arguments.  Out: an `Answer`.
Idea: heavy imports happen inside the function that needs them, so that `ltdi --help` is quick. What brings
adapters in and takes them out is in exchange_commands.py.
"""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ltdi_peft.command import Command
from ltdi_peft.exchange_commands import EXCHANGE
from ltdi_peft.serve_command import SERVE
from ltdi_peft.terminal import Answer, table

if TYPE_CHECKING:
    from ltdi_peft.task import Example

# ---- calibrate, collect, train, evaluate, plan


def recipe_argument(parser: ArgumentParser) -> None:
    """The recipe alone."""
    parser.add_argument("recipe", type=Path, help="a YAML file, see recipes/")


def evaluate_arguments(parser: ArgumentParser) -> None:
    """The recipe, and where results go."""
    recipe_argument(parser)
    results = Path("docs/results")
    parser.add_argument("--results", type=Path, default=results, help="folder for JSON and Markdown")
    other = "score this folder or Hub id instead of the recipe's own (give the result a --name=… of its own)"
    parser.add_argument("--generator", help=other)


def plan_recipe(known: Namespace) -> Answer:
    """`ltdi plan RECIPE`."""
    from ltdi_peft.config import load_recipe
    from ltdi_peft.plan import plan, plan_lines

    found = plan(load_recipe(known.recipe, known.overrides))
    return Answer([found], plan_lines(found), heads=1)


def calibrate_recipe(known: Namespace) -> Answer:
    """`ltdi calibrate RECIPE`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.calibrate import calibrate
    from ltdi_peft.collect import open_bench
    from ltdi_peft.config import load_recipe

    recipe = load_recipe(known.recipe, known.overrides)
    keep_freed_memory()
    found = calibrate(open_bench(recipe), progress=known.progress)
    rows = [{"name": name, **values} for name, values in found.items()]
    return table(rows, tuple(rows[0]))


def collect_recipe(known: Namespace) -> Answer:
    """`ltdi collect RECIPE`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.collect import collect
    from ltdi_peft.config import load_recipe

    recipe = load_recipe(known.recipe, known.overrides)
    keep_freed_memory()
    store = collect(recipe, progress=known.progress)
    runs = len(store.trajectories())
    about = {"store": str(store.path), "runs": runs, "held_out": str(recipe.held_out_folder)}
    return Answer([about], [f"{runs} finished runs in {store.path}"])


def train_recipe(known: Namespace) -> Answer:
    """`ltdi train RECIPE`: one process; several by `accelerate launch recipes/train_generator.py`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.config import load_recipe
    from ltdi_peft.train import train_generator

    recipe = load_recipe(known.recipe, known.overrides)
    keep_freed_memory()
    config = train_generator(recipe, progress=known.progress).config
    tasks, scale = len(config.training_tasks), config.guidance_scale
    about = {"generator": str(recipe.generator_folder), "tasks": tasks}
    about |= {"guidance_scale": scale, "mean_share": config.mean_share}
    return Answer([about], [f"trained on {tasks} tasks; guidance scale {scale}"])


def evaluate_recipe(known: Namespace) -> Answer:
    """`ltdi evaluate RECIPE`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.config import load_recipe
    from ltdi_peft.evaluate import evaluate
    from ltdi_peft.generator import Generator
    from ltdi_peft.report import table as results_table

    keep_freed_memory()
    recipe = load_recipe(known.recipe, known.overrides)
    other = Generator.from_pretrained(known.generator) if known.generator else None
    result = evaluate(recipe, generator=other, results=known.results, progress=known.progress)
    written = f"written to {known.results / recipe.name}.json and .md"
    return Answer([result], [*results_table(result).splitlines(), "", written], heads=1)


# ---- tasks, inspect


def tasks_arguments(parser: ArgumentParser) -> None:
    """Which suite, and what of it."""
    sources = "builtin, bigbench (fetched once), a .jsonl file or a folder of BIG-bench tasks"
    parser.add_argument("--source", default="builtin", help=sources)
    parser.add_argument("--domain", help="only this domain")


def list_tasks(known: Namespace) -> Answer:
    """`ltdi tasks`."""
    from ltdi_peft.task import CALIBRATED, load_suite

    suite = load_suite(known.source)
    if known.domain is not None:
        suite = suite.only([known.domain])
    measured = CALIBRATED if suite.calibration else ()
    return table(suite.table(), ("name", "split", "examples", *measured, "prompt", "example"))


def inspect_arguments(parser: ArgumentParser) -> None:
    """The store."""
    parser.add_argument("store", type=Path, help="folder of trajectories")
    about = "also draw the runs into this folder; pip install 'ltdi_peft[plot]'"
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help=about)


def inspect_store(known: Namespace) -> Answer:
    """`ltdi inspect STORE`."""
    from ltdi_peft.store import TrajectoryStore

    rows = TrajectoryStore(known.store, create=False).describe()
    answer = table(rows, tuple(rows[0]) if rows else ())
    if known.plot is None:
        return answer
    from ltdi_peft.figures import write_store_figures

    drawn = write_store_figures(known.store, known.plot)
    lines = [f"{known.plot / file}: {title}" for file, title in drawn.items()]
    return replace(answer, lines=[*answer.lines, *lines])


# ---- generate


def generate_arguments(parser: ArgumentParser) -> None:
    """The prompt, and how to make what of it."""
    parser.add_argument("prompt", help="the task in a sentence")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--generator", help="folder or Hub id; else $LTDI_GENERATOR")
    parser.add_argument("--base-model", help="folder or Hub id; else the generator's own")
    examples = "JSONL of [input, answer]: they choose among candidates, or are read beside the prompt"
    parser.add_argument("--examples", type=Path, help=examples)
    candidates = "so many, the best on the examples wins (16); 1: examples are for --refine-steps alone"
    parser.add_argument("--candidates", type=int, help=candidates)
    inputs = "inputs of the task without answers, one a line; they tell what a short prompt leaves open"
    parser.add_argument("--inputs", type=Path, help=inputs)
    steps = "gradient steps on the examples afterwards"
    parser.add_argument("--refine-steps", type=int, default=0, help=steps)
    parser.add_argument("--guidance-scale", type=float, help="else the generator's own")
    alone = "for a model that will not have the prompt in its context"
    parser.add_argument("--alone", action="store_true", help=alone)
    parser.add_argument("--load-in-4bit", action="store_true", help="load the base model in 4 bits (NF4)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same adapter")


def generate_folder(known: Namespace) -> Answer:
    """`ltdi generate PROMPT --out FOLDER`."""
    if known.out.exists():
        raise ValueError(f"{known.out} exists already; nothing is overwritten, choose another --out.")
    if known.refine_steps and not known.examples:
        raise ValueError(f"--refine-steps is {known.refine_steps}: give --examples to learn from.")
    from ltdi_peft.adapter import spec_of
    from ltdi_peft.cards import read_as
    from ltdi_peft.generate import find_generator, generate_adapter
    from ltdi_peft.provenance import provenance_of
    from ltdi_peft.publish import save_adapter
    from ltdi_peft.refine import refine

    examples = read_examples(known.examples) if known.examples else []
    generator, shown = known.generator, examples
    if known.refine_steps and known.candidates == 1:  # examples may be there to refine with alone
        generator = find_generator(known.generator)
        shown = examples if generator.config.condition_examples else []
    model = generate_adapter(
        known.prompt,
        generator=generator,
        base_model=known.base_model,
        examples=shown,
        inputs=read_inputs(known.inputs) if known.inputs else (),
        num_candidates=known.candidates,
        guidance_scale=known.guidance_scale,
        seed=known.seed,
        prompt_in_context=not known.alone,
        load_in_4bit=known.load_in_4bit,
    )
    if known.refine_steps:
        options = {"prompt": known.prompt, "seed": known.seed, "progress": known.progress}
        refine(model, examples, steps=known.refine_steps, **options)
    spec, origin = spec_of(model), provenance_of(model)
    save_adapter(model, known.out)
    about = {"out": str(known.out), "prompt": known.prompt, "seed": known.seed}
    about |= {"base_model": spec.base_model, "sites": len(spec.sites)}
    load = f"load it with PeftModel.from_pretrained(base_model, {str(known.out)!r})"
    read = f"; read as {read_as(origin)}" if origin and origin.reading else ""
    about |= {"reading": origin.reading} if origin and origin.reading else {}
    return Answer([about], [f"written to {known.out}{read}; {load}"])


def read_inputs(path: Path) -> list[str]:
    """Texts of a file, one a line, blank lines left out; ValueError where there is none."""
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} has no inputs: expected one a line.")
    return found


def read_examples(path: Path) -> "list[Example]":
    """Examples of a JSONL file, one a line; ValueError names the line that is none."""
    from ltdi_peft.generate import as_examples

    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found += as_examples([json.loads(line)])
        except ValueError as error:
            wanted = '["input", "answer"] or {"input": …, "answer": …}'
            raise ValueError(f"{path}:{number}: expected {wanted}, got {line!r}.") from error
    return found


COMMANDS = (
    Command("tasks", "list the tasks of a suite", "--domain animals", tasks_arguments, list_tasks),
    Command(
        "plan",
        "what a recipe will take: runs, steps, bytes, memory, time",
        "recipes/demo.yaml --suite.train=200",
        recipe_argument,
        plan_recipe,
        overrides=True,
    ),
    Command(
        "calibrate",
        "measure what a LoRA of its own gains on each task",
        "recipes/smollm2_bigbench.yaml",
        recipe_argument,
        calibrate_recipe,
        overrides=True,
    ),
    Command(
        "collect",
        "train and record one LoRA a task and seed",
        "recipes/demo.yaml --collect.seeds=2",
        recipe_argument,
        collect_recipe,
        overrides=True,
    ),
    Command(
        "inspect",
        "what a trajectory store holds",
        "runs/demo/trajectories",
        inspect_arguments,
        inspect_store,
    ),
    Command(
        "train",
        "train the generator",
        "recipes/demo.yaml --train.steps=500",
        recipe_argument,
        train_recipe,
        overrides=True,
    ),
    Command(
        "generate",
        "write an adapter for a task prompt",
        '"Answer in French." --generator runs/demo/generator --out french',
        generate_arguments,
        generate_folder,
    ),
    Command(
        "evaluate",
        "score the generator and its rivals",
        "recipes/demo.yaml --results results",
        evaluate_arguments,
        evaluate_recipe,
        overrides=True,
    ),
    SERVE,
    *EXCHANGE,
)
