"""A generator and the rivals that need no training, on as many examples as the protocol asks for.

    python benchmarks/paired.py recipes/two_networks.yaml --evaluate.examples=100 [--generator FOLDER] \
        [--rivals RESULT | --beside RESULT] [--contexts prompt no_prompt] [--results FOLDER]

In: a recipe with encoded or collected runs; a generator of its tasks, the package's own unless named.
Out: accuracy on the recipe's unseen tasks, and paired differences with intervals (bootstrap over tasks;
unseen domains: over domains), in `<recipe>_paired.json` and `.md`. Rivals: the regression that is fitted on
the same runs and prompts and guided on the validation tasks (`ridge`), the mean of the stored adapters, and
the multi-task LoRA that all of these are added to (`origin`). `--rivals`: take their lines from an older
result of this command with the same tasks, examples and seeds. `--beside`: take every line from such a
result, ours too, and score one more rival alone, the regression on the conditions that ours has, for a recipe
whose conditions are attributes (`ridge_attributes`). Interrupted, it goes on at the task where it was.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import require_unseen, write_pages

from ltdi_peft.attribute_fit import fit_attributes
from ltdi_peft.baselines import RidgeRival, fit_ridge_rival, tensor_digest, with_best_guidance
from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe, load_recipe
from ltdi_peft.evaluate import guidance_of, header
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.guidance import Guidance, validation_prompts
from ltdi_peft.kept import Line, hashed, kept_lines, task_keys
from ltdi_peft.multi_task import validation_tasks
from ltdi_peft.origin import at_origin, has_origin, recipe_origin
from ltdi_peft.prepare import prepare
from ltdi_peft.protocol import generator_digest, one_by_one, seed_prompts
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter, require_same_spec
from ltdi_peft.statistics import mean_difference
from ltdi_peft.summary import CONTEXTS, UNSEEN
from ltdi_peft.tables import lines_of
from ltdi_peft.task import Task
from ltdi_peft.train import plain_encoder, recipe_encoder

OURS, RIDGE, MEAN, ORIGIN = "ours", "ridge", "mean", "origin"
RIVALS = (RIDGE, MEAN, ORIGIN)
TOLD = "ridge_attributes"
Compared = dict[str, Any]  # tasks, accuracy and paired differences of one split


def guided_ridges(bench: Bench, generator: Generator, contexts: Sequence[str]) -> dict[str, RidgeRival]:
    """Context → the regression on the recipe's runs, at its best guidance there by the validation tasks."""
    fit_attributes(bench, plain_encoder(bench))
    encoder = recipe_encoder(bench)
    prepared = prepare(bench.recipe, encoder, bench.suite, progress=True)
    if has_origin(bench.recipe):
        prepared = at_origin(prepared, recipe_origin(bench, prepared.codec.start)[0])
    rival, tasks = fit_ridge_rival(prepared.data, prepared.codec, generator), validation_tasks(bench)
    about = {"ridge": tensor_digest([rival.ridge.weight]), "prompts": validation_prompts(tasks)}
    return {context: guided(bench, rival, tasks, encoder, about, context) for context in contexts}


def guided(
    bench: Bench,
    rival: RidgeRival,
    tasks: Sequence[Task],
    encoder: PromptEncoder,
    about: dict[str, Any],
    context: str,
) -> RidgeRival:
    """The rival at its best guidance for a context, chosen once."""
    key = hashed({**about, "base": bench.base.weights_fingerprint, "context": context})
    file = bench.recipe.folder / "evaluation" / f"paired-guidance-{key}.json"
    if not file.is_file():
        chosen, tried = with_best_guidance(rival, bench, tasks, encoder, context=context)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json_bytes({"guidance": asdict(chosen.guidance), "validation_accuracy": tried}))
    return replace(rival, guidance=Guidance(**read_json(file)["guidance"]))


Made = dict[str, list[Adapter]]  # method → its adapters


def generated(bench: Bench, generator: Generator, task: Task, context: str) -> Made:
    """Ours, for each seed's prompt."""
    seeds = bench.recipe.evaluate.seeds
    return {OURS: one_by_one(generator, bench, seed_prompts(task, seeds), seeds, context=context)}


def rivals(bench: Bench, generator: Generator, ridge: RidgeRival, task: Task) -> Made:
    """What the rivals answer the same prompts with."""
    prompts = seed_prompts(task, bench.recipe.evaluate.seeds)
    return {
        RIDGE: ridge.adapters(generator.encode_prompts(prompts, bench.base)),
        MEAN: [ridge.codec.decode(ridge.mean)],
        ORIGIN: [ridge.codec.nothing()],
    }


def scored(bench: Bench, task: Task, made: Mapping[str, Made]) -> Line:
    """Context → method → accuracy on the task's evaluation examples, mean over the method's adapters."""
    found: Line = {}
    for context, methods in made.items():
        asked = task.held_out_prompts if context == "prompt" else None
        sheet = make_sheet(bench.adapted, task.evaluation[: bench.recipe.evaluate.examples], asked)
        every = [adapter for own in methods.values() for adapter in own]
        accuracy = score(bench.adapted, sheet, stack_adapters(every, bench.adapted.device)).accuracy
        values = iter(accuracy.tolist())
        found[context] = {
            method: round(statistics.fmean(next(values) for _ in own), 6) for method, own in methods.items()
        }
    return found


def compared(
    ours: str, split: str, tasks: Sequence[Task], lines: Mapping[str, Line], recipe: Recipe
) -> Compared:
    """Mean accuracies over the tasks, and how far method `ours` is above each other one, with intervals."""
    clusters = [task.domain if split == "unseen_domains" else task.name for task in tasks]
    options = {"draws": recipe.evaluate.bootstrap, "seed": recipe.seed}
    found: Compared = {"tasks": len(tasks), "accuracy": {}, "paired": {}}
    for context, methods in lines[tasks[0].name].items():
        columns = {
            method: torch.tensor([lines[task.name][context][method] for task in tasks], dtype=torch.float64)
            for method in methods
        }
        found["accuracy"][context] = {method: float(values.mean()) for method, values in columns.items()}
        found["paired"][context] = {
            method: asdict(mean_difference(columns[ours], values, clusters, **options))
            for method, values in columns.items()
            if method != ours
        }
    return found


def table(ours: str, split: str, found: Compared) -> str:
    """One split as Markdown."""
    contexts = [context for context in CONTEXTS if context in found["accuracy"]]
    titles = {"prompt": "prompt in context", "no_prompt": "without prompt"}
    rows = []
    for method in found["accuracy"][contexts[0]]:
        row = [method]
        for context in contexts:
            gap = found["paired"][context].get(method)
            row.append(f"{found['accuracy'][context][method]:.3f}")
            row.append(f"{gap['value']:+.4f} [{gap['low']:.4f}, {gap['high']:.4f}]" if gap else "")
        rows.append(row)
    head = ["method", *(title for context in contexts for title in (titles[context], f"{ours} − it"))]
    return f"## {split.replace('_', ' ')} ({found['tasks']})\n\n{lines_of(head, rows)}".strip()


@dataclass(frozen=True)
class Scorer:
    """Scores methods on tasks in some contexts, and keeps the lines."""

    bench: Bench
    tasks: Sequence[Task]
    contexts: Sequence[str]
    progress: bool

    def lines(self, name: str, about: dict[str, Any], make: Callable[[Task, str], Made]) -> dict[str, Line]:
        """Task → its line, of what `make` makes; `about` is all that this depends on beside the task."""
        recipe = self.bench.recipe
        same = {"seeds": recipe.evaluate.seeds, "base": self.bench.base.weights_fingerprint}
        file = recipe.folder / "evaluation" / f"paired-{name}-{hashed(same | about)}.jsonl"

        def scored_lines(group: list[Task]) -> list[Line]:
            return [scored(self.bench, task, {c: make(task, c) for c in self.contexts}) for task in group]

        keys = task_keys(self.tasks, recipe.evaluate.examples)
        options = {"together": 1, "desc": name, "progress": self.progress}
        return kept_lines(file, self.tasks, keys, scored_lines, **options)


def scored_rivals(scorer: Scorer, generator: Generator) -> tuple[dict[str, Line], dict[str, Any]]:
    """The rivals' lines, and the guidance of the regression."""
    ridges = guided_ridges(scorer.bench, generator, scorer.contexts)
    chosen = {context: asdict(ridge.guidance) for context, ridge in ridges.items()}
    weights = tensor_digest([next(iter(ridges.values())).ridge.weight])
    about = {"ridge": weights, "guidance": chosen}

    def make(task: Task, context: str) -> Made:
        return rivals(scorer.bench, generator, ridges[context], task)

    return scorer.lines("rivals", about, make), chosen


def scored_told(scorer: Scorer, generator: Generator) -> tuple[dict[str, Line], dict[str, Any]]:
    """The lines of the regression on attributes, and its guidance."""
    ridges = guided_ridges(scorer.bench, generator, scorer.contexts)
    chosen = {context: asdict(ridge.guidance) for context, ridge in ridges.items()}
    encoder, seeds = recipe_encoder(scorer.bench), scorer.bench.recipe.evaluate.seeds
    weights = tensor_digest([next(iter(ridges.values())).ridge.weight])

    def make(task: Task, context: str) -> Made:
        return {TOLD: ridges[context].adapters(encoder(seed_prompts(task, seeds)))}

    return scorer.lines(TOLD, {"ridge": weights, "guidance": chosen}, make), chosen


def lines_from(before: dict[str, Any], scorer: Scorer, methods: Sequence[str]) -> dict[str, Line]:
    """Lines of an older result; SystemExit for one of other tasks, seeds or examples."""
    evaluate, names = scorer.bench.recipe.evaluate, [task.name for task in scorer.tasks]
    lines = before["per_task"]
    has = {name: sorted(lines.get(name, {})) for name in names}
    same = before["seeds"] == list(range(evaluate.seeds)) and before["examples"] == evaluate.examples
    if not same or any(contexts != sorted(scorer.contexts) for contexts in has.values()):
        raise SystemExit(
            "an older result of other tasks, contexts, seeds or examples cannot be taken over; score it anew."
        )
    return {name: {c: {m: lines[name][c][m] for m in methods} for c in scorer.contexts} for name in names}


def measured(
    bench: Bench,
    generator: Generator,
    contexts: Sequence[str],
    *,
    before: dict[str, Any] | None = None,
    beside: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The result: where and how, and for each split what `compared` finds.

    before: an older result of this command whose rivals are taken over. beside: one that gets the regression
    on attributes as well.
    """
    recipe = bench.recipe
    require_same_spec(bench.spec, generator.spec, "the generator")
    tasks = {split: bench.suite.split(split) for split in UNSEEN if bench.suite.split(split)}
    every = [task for part in tasks.values() for task in part]
    require_unseen(generator, (task.name for task in every))
    scorer = Scorer(bench, every, contexts, progress)
    if beside:
        ours = lines_from(beside, scorer, (OURS, *RIVALS))
        theirs, told = scored_told(scorer, generator)
        trials = beside["trials"] | {TOLD: told}
    else:
        taken = (lines_from(before, scorer, RIVALS), before["trials"][RIDGE]) if before else None
        theirs, chosen = taken or scored_rivals(scorer, generator)
        about = {"generator": generator_digest(generator), "contexts": list(contexts)}
        ours = scorer.lines(OURS, about, lambda task, context: generated(bench, generator, task, context))
        trials = {OURS: guidance_of(generator), RIDGE: chosen}
    lines = {name: {c: line[c] | theirs[name][c] for c in contexts} for name, line in ours.items()}
    splits = {split: compared(OURS, split, part, lines, recipe) for split, part in tasks.items()}
    head = header(bench, trials)
    return {**head, "examples": recipe.evaluate.examples, "splits": splits, "per_task": lines}


def page(found: dict[str, Any], command: str) -> str:
    """The result as Markdown."""
    head = ("date", "machine", "commit", "base_model", "suite", "seeds", "trials")
    about = "\n".join(f"- {key.replace('_', ' ')}: {found[key]}" for key in head)
    made = (
        f"Made by `{command}`; intervals are 95 %, bootstrapped over tasks (unseen domains: over domains). "
        f"Up to {found['examples']} evaluation examples a task, prompts in held-out words."
    )
    parts = [table(OURS, split, one) for split, one in found["splits"].items()]
    return "\n\n".join([f"# {found['recipe']}, paired", about, made, *parts]) + "\n"


def main() -> None:
    """Score, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    older = parser.add_mutually_exclusive_group()
    older.add_argument("--rivals", type=Path, help="an older result of this command, to take them from")
    older.add_argument("--beside", type=Path, help="an older result, which gets the regression on attributes")
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    if known.beside and not recipe.condition.attributes:
        raise SystemExit("--beside is for a recipe whose conditions are attributes (condition.attributes).")
    taken = {"before": known.rivals, "beside": known.beside}
    results = {name: read_json(file) if file else None for name, file in taken.items()}
    found = measured(open_bench(recipe), find_generator(known.generator), known.contexts, **results)
    options = ("generator", "rivals", "beside")
    named = [f"--{name} {vars(known)[name]}" for name in options if vars(known)[name]]
    asked = [known.recipe, *overrides, *named, "--contexts", *known.contexts]
    text = page(found, f"python benchmarks/paired.py {' '.join(asked)}")
    write_pages(known.results, f"{recipe.name}_paired", found, text)


if __name__ == "__main__":
    main()
