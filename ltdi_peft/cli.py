"""`ltdi`: each subcommand a thin call of the same Python function.

Idea: heavy imports happen inside the subcommand that needs them, so that `ltdi --help` is quick. Bad input
ends with one line on stderr and exit status 2; an interrupt with 130, and everything recorded so far is kept.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ltdi_peft.quiet import drop_kernel_notice

OVERRIDES = "overrides of recipe fields, e.g. --train.steps=500"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = make_parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and not known.takes_overrides:
        parser.error(f"unknown arguments {rest}")
    drop_kernel_notice()
    try:
        known.run(known, rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ltdi tasks | head` is no error; what is left unwritten must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"ltdi {known.command}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def one_line(error: Exception) -> str:
    """The message without line breaks; a KeyError's without its quotes."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def make_parser() -> argparse.ArgumentParser:
    """All subcommands, each with an example in its help."""
    about = "Record LoRA fine-tunes, train a generator, generate adapters."
    parser = argparse.ArgumentParser(prog="ltdi", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add_recipe_commands(commands)
    tasks = add(commands, "tasks", list_tasks, "list the tasks of a suite", "ltdi tasks --domain animals")
    tasks.add_argument("--source", default="builtin", help="builtin, a .jsonl file or a BIG-bench folder")
    tasks.add_argument("--domain", help="only this domain")
    tasks.add_argument("--json", action="store_true", help="one JSON object a line")
    example = "ltdi inspect runs/demo/trajectories"
    inspect = add(commands, "inspect", inspect_store, "what a trajectory store holds", example)
    inspect.add_argument("store", type=Path)
    inspect.add_argument("--json", action="store_true", help="one JSON object a line")
    add_generate(commands)
    return parser


def add_generate(commands: argparse._SubParsersAction) -> None:
    """`ltdi generate`."""
    example = 'ltdi generate "Answer in French." --out french'
    generate = add(commands, "generate", generate_folder, "write an adapter for a task prompt", example)
    generate.add_argument("prompt", help="the task in a sentence")
    generate.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    generate.add_argument("--generator", help="folder or Hub id; else $LTDI_GENERATOR")
    generate.add_argument("--base-model", help="folder or Hub id; else the generator's own")
    generate.add_argument("--load-in-4bit", action="store_true", help="load the base model in 4 bits (NF4)")
    examples = "JSONL of [input, answer]; for --candidates and --refine-steps"
    generate.add_argument("--examples", type=Path, help=examples)
    generate.add_argument("--candidates", type=int, default=1, help="so many, the best on the examples wins")
    steps = "gradient steps on the examples afterwards"
    generate.add_argument("--refine-steps", type=int, default=0, help=steps)
    generate.add_argument("--guidance-scale", type=float)
    generate.add_argument("--seed", type=int, default=0)


def add_recipe_commands(commands: argparse._SubParsersAction) -> None:
    """Subcommands whose first argument is a recipe."""
    for name, run, about in (
        ("collect", collect_recipe, "train and record one LoRA a task and seed"),
        ("train", train_recipe, "train the generator"),
        ("evaluate", evaluate_recipe, "score the generator and its rivals"),
    ):
        command = add(commands, name, run, about, f"ltdi {name} recipes/demo.yaml", overrides=True)
        command.add_argument("recipe", type=Path)
        if name == "evaluate":
            results = Path("docs/results")
            command.add_argument("--results", type=Path, default=results, help="folder for JSON and Markdown")


def add(
    commands: argparse._SubParsersAction,
    name: str,
    run: object,
    about: str,
    example: str,
    *,
    overrides: bool = False,
) -> argparse.ArgumentParser:
    """One subcommand; `overrides` lets --section.field=value through."""
    epilog = f"example: {example}" + (f"\n{OVERRIDES}" if overrides else "")
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, takes_overrides=overrides)
    return parser


def collect_recipe(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi collect RECIPE`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.collect import collect
    from ltdi_peft.config import load_recipe

    recipe = load_recipe(known.recipe, rest)
    keep_freed_memory()
    store = collect(recipe)
    print(f"{len(store.trajectories())} finished runs in {store.path}")


def train_recipe(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi train RECIPE`: one process; several by `accelerate launch recipes/train_generator.py`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.train import train_generator

    keep_freed_memory()
    generator = train_generator(known.recipe, rest)
    tasks, scale = len(generator.config.training_tasks), generator.config.guidance_scale
    print(f"trained on {tasks} tasks; guidance scale {scale}")


def evaluate_recipe(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi evaluate RECIPE`."""
    from ltdi_peft.base import keep_freed_memory
    from ltdi_peft.config import load_recipe
    from ltdi_peft.evaluate import evaluate
    from ltdi_peft.report import table

    keep_freed_memory()
    recipe = load_recipe(known.recipe, rest)
    result = evaluate(recipe, results=known.results)
    print(table(result))
    print(f"\nwritten to {known.results / recipe.name}.json and .md")


def list_tasks(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi tasks`."""
    from ltdi_peft.task import load_suite

    suite = load_suite(known.source)
    if known.domain is not None:
        suite = suite.only([known.domain])
    show(suite.table(), ("name", "split", "examples", "prompt", "example"), as_json=known.json)


def inspect_store(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi inspect STORE`."""
    from ltdi_peft.store import TrajectoryStore

    rows = TrajectoryStore(known.store, create=False).describe()
    show(rows, tuple(rows[0]) if rows else (), as_json=known.json)


def generate_folder(known: argparse.Namespace, rest: list[str]) -> None:
    """`ltdi generate PROMPT --out FOLDER`."""
    if known.out.exists():
        raise ValueError(f"{known.out} exists already; nothing is overwritten, choose another --out.")
    if known.refine_steps and not known.examples:
        raise ValueError(f"--refine-steps is {known.refine_steps}: give --examples to learn from.")
    from ltdi_peft.adapter import read_adapter, save_adapter_folder, spec_of
    from ltdi_peft.generate import generate_adapter
    from ltdi_peft.refine import refine

    examples = read_examples(known.examples) if known.examples else []
    model = generate_adapter(
        known.prompt,
        generator=known.generator,
        base_model=known.base_model,
        # One candidate is enough to refine; else generate_adapter says that examples need several.
        examples=[] if known.refine_steps and known.candidates == 1 else examples,
        num_candidates=known.candidates,
        guidance_scale=known.guidance_scale,
        seed=known.seed,
        load_in_4bit=known.load_in_4bit,
    )
    if known.refine_steps:
        refine(model, examples, steps=known.refine_steps, prompt=known.prompt, seed=known.seed)
    # PEFT's own save_pretrained writes target_modules in the order of a set: other bytes in every process.
    save_adapter_folder(known.out, spec_of(model), read_adapter(model))
    print(f"written to {known.out}; load it with PeftModel.from_pretrained(base_model, {str(known.out)!r})")


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(input, answer) pairs of a JSONL file; ValueError names the line that is none."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            text, answer = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{path}:{number}: expected ["input", "answer"], got {line!r}.') from error
        pairs.append((str(text), str(answer)))
    return pairs


def show(rows: Sequence[dict[str, object]], columns: Sequence[str], *, as_json: bool) -> None:
    """Rows as JSON lines, or as aligned columns with a count."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max([len(column), *(len(line[i]) for line in cells)]) for i, column in enumerate(columns)]
    for line in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{len(rows)} rows")


if __name__ == "__main__":  # for `accelerate launch -m ltdi_peft.cli collect RECIPE`
    raise SystemExit(main())
