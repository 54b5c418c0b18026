"""A generator on the unseen tasks of an evaluation that was made before: no store, no rival is trained again.

    python benchmarks/rescore.py recipes/two_purposes.yaml --before docs/results/smollm2_builtin.json \
        --wide docs/results/smollm2_builtin_wide.json [--generator FOLDER] [--rivals] [--results FOLDER]

`ours` and `ours_wrong_prompt` are scored now, with the examples, prompts and seeds of the result `--before`,
and no more wrong prompts than the recipe has;
every other line is that result's own, task by task, so differences are paired. `origin` is scored again too:
how far it is from its old line is what another machine and other rounding do. `--wide`: a result of
wide_rival.py, whose rival joins the table. `--rivals`: for a recipe with other prompts or another origin than
`--before` had, the rivals that need no training are scored again too: the regression that the recipe's
generator starts from, guided for each context on the validation tasks of ours (`ridge`; `ridge_tuned` on a
tuned encoder, beside the old `ridge`), the mean of the stored adapters and the nearest task's (`mean`,
`nearest`), and the origin as `multi_task_lora`, where the recipe trains it: on the same prompts, its
best step by the same validation tasks. Interrupted, it goes on at the task where it was.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import require_unseen, write_pages

from ltdi_peft.baselines import RidgeRival, with_best_guidance
from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import Ridge
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import load_recipe
from ltdi_peft.cost import costs, fine_tunes, seconds_to_generate
from ltdi_peft.encoded import recipe_encoded
from ltdi_peft.evaluate import guidance_of, header
from ltdi_peft.files import read_json
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator, nearest_conditions
from ltdi_peft.kept import Line, hashed, kept_lines, task_keys
from ltdi_peft.multi_task import validation_tasks
from ltdi_peft.protocol import generator_digest, one_by_one, prompts_of, seed_prompts
from ltdi_peft.report import figures, paired_table, table
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter, require_same_spec
from ltdi_peft.summary import CONTEXTS, TaskScores, summarise
from ltdi_peft.targets import targets_table
from ltdi_peft.task import Task
from ltdi_peft.train import REPORT_FILE, recipe_encoder

OURS, WRONG, ORIGIN, RIDGE = "ours", "ours_wrong_prompt", "origin", "ridge"
TUNED = "ridge_tuned"  # the regression from conditions of the generator's own, tuned encoder
AGAIN = (RIDGE, TUNED, "mean", "nearest", "multi_task_lora")  # what --rivals scores
WIDE = "multi_task_lora_4x"


def accuracies(bench: Bench, task: Task, adapters: Sequence[Adapter], context: str) -> list[float]:
    """Of each adapter, on the task's evaluation examples."""
    examples = task.evaluation[: bench.recipe.evaluate.examples]
    sheet = make_sheet(bench.adapted, examples, task.held_out_prompts if context == "prompt" else None)
    found = score(bench.adapted, sheet, stack_adapters(adapters, bench.adapted.device))
    return [round(value, 6) for value in found.accuracy.tolist()]


def scored(bench: Bench, generator: Generator, task: Task, seeds: int, wrong: Sequence[str]) -> Line:
    """Ours, ours with wrong prompts, and the origin, on the task's evaluation examples."""
    origin, found = generator.codec.nothing(), {}
    for context in CONTEXTS:
        made = [
            adapter
            for prompts in (seed_prompts(task, seeds), wrong)
            for adapter in one_by_one(generator, bench, prompts, seeds, context=context)
        ]
        *generated, own = accuracies(bench, task, [*made, origin], context)
        found[context] = {OURS: generated[:seeds], WRONG: generated[seeds:], ORIGIN: [own]}
    return found


def guided_ridges(full: Generator, bench: Bench) -> dict[str, RidgeRival]:
    """Context → the ridge regression that the chain of `full` starts from, guided on validation tasks."""
    strength = read_json(bench.recipe.folder / REPORT_FILE)["ridge"]
    rival = RidgeRival(full.codec, Ridge(full.centre), full.mean, strength, full)
    encoder, tasks = recipe_encoder(bench), validation_tasks(bench)
    return {
        context: with_best_guidance(rival, bench, tasks, encoder, context=context)[0] for context in CONTEXTS
    }


def ridge_name(full: Generator) -> str:
    """Of the regression's line: a tuned encoder is a part of the method, not of the rival."""
    return TUNED if full.config.tuned else RIDGE


def last_tokens(bench: Bench, full: Generator) -> dict[str, torch.Tensor]:
    """Training task → tokens of its stored adapter (first seed); {} for a recipe without encoded runs."""
    names = full.config.training_tasks
    runs = recipe_encoded(bench.recipe, names).runs if bench.recipe.train.encoded else None
    found = zip(runs.tasks, runs.seeds, runs.tokens[:, -1], strict=True) if runs else ()
    return {task: tokens for task, _, tokens in sorted(found, key=lambda one: -one[1])}


def scored_rivals(
    bench: Bench,
    ridges: dict[str, RidgeRival],
    stored: dict[str, torch.Tensor],
    full: Generator,
    task: Task,
    seeds: int,
) -> Line:
    """The rivals that need no training, with the prompts that ours has."""
    conditions = full.encode_prompts(seed_prompts(task, seeds), bench.base)
    decode, found = full.codec.decode, {}
    near = [full.config.training_tasks[i] for i in nearest_conditions(conditions, full.conditions).tolist()]
    for context, ridge in ridges.items():
        made = {ridge_name(full): ridge.adapters(conditions), "mean": [decode(full.mean)]}
        if stored:
            made["nearest"] = [decode(stored[name]) for name in near]
        if bench.recipe.train.origin_steps:
            made["multi_task_lora"] = [full.codec.nothing()]
        values = iter(accuracies(bench, task, [one for own in made.values() for one in own], context))
        found[context] = {name: [next(values) for _ in own] for name, own in made.items()}
    return found


def joined(before: TaskScores, line: Line, wide: dict[str, Any]) -> TaskScores:
    """The task's scores with ours in place of the old ones, and without distances of the old ones."""
    accuracy = {}
    for context in CONTEXTS:
        more = {WIDE: [wide[before.task][context][WIDE]]} if wide else {}
        new = {name: line[context][name] for name in (OURS, WRONG, *AGAIN) if name in line[context]}
        accuracy[context] = before.accuracy[context] | more | new
    error = {name: value for name, value in before.error.items() if name not in line[CONTEXTS[0]]}
    return dataclasses.replace(
        before, accuracy=accuracy, error=error, nearest={"oracle": before.nearest["oracle"]}
    )


def origin_gap(before: Sequence[TaskScores], lines: dict[str, Line]) -> dict[str, float]:
    """The origin's accuracy, prompt in context, then and now, and the mean difference of a task."""
    name = ORIGIN if ORIGIN in before[0].accuracy["prompt"] else "start"  # what tokens of 0 decode to
    pairs = [(one.mean("prompt", name), lines[one.task]["prompt"][ORIGIN][0]) for one in before]
    then, now = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    return {"then": then, "now": now, "task_difference": statistics.fmean(abs(x - y) for x, y in pairs)}


def require_same_tasks(bench: Bench, generator: Generator, before: dict[str, Any]) -> None:
    """SystemExit unless the result is of this base, these tasks and as many examples, none trained on."""
    unseen, examples = before["per_task"], bench.recipe.evaluate.examples
    if bench.base.name != before["base_model"] or not set(unseen) <= set(bench.suite.tasks):
        raise SystemExit(f"--before: {before['recipe']!r} has another base model or tasks than the recipe.")
    if odd := [name for name, row in unseen.items() if row["examples"] != examples]:
        count = unseen[odd[0]]["examples"]
        raise SystemExit(f"--before has {count} examples of {odd[0]}: give --evaluate.examples={count}.")
    require_unseen(generator, unseen)


def rescored(
    bench: Bench,
    generator: Generator,
    before: dict[str, Any],
    wide: dict[str, Any],
    *,
    full: Generator | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The new result, as `ltdi evaluate` would write it but for what needs stored runs.

    full: the generator before it was shrunk, whose rivals without training are scored too.
    """
    require_same_spec(bench.spec, generator.spec, "the generator")
    require_same_tasks(bench, generator, before)
    recipe, seeds = bench.recipe, len(before["seeds"])
    old = [TaskScores(**row) for row in before["per_task"].values()]
    count = recipe.evaluate.wrong_prompts
    wrong = {one.task: prompts_of([bench.suite[name] for name in one.wrong_tasks[:count]]) for one in old}
    tasks = [bench.suite[one.task] for one in old]
    key = hashed({"generator": generator_digest(generator), "seeds": seeds, "wrong": wrong})
    keys = task_keys(tasks, recipe.evaluate.examples)
    trials = {OURS: guidance_of(generator)}

    def kept(name: str, key: str, one: Callable[[Task], Line]) -> dict[str, Line]:
        file = recipe.folder / "evaluation" / f"{name}-{key}.jsonl"
        about = {"together": 1, "desc": name, "progress": progress}
        return kept_lines(file, tasks, keys, lambda group: [one(task) for task in group], **about)

    lines = kept("rescore", key, lambda task: scored(bench, generator, task, seeds, wrong[task.name]))
    if full is not None:
        ridges, stored = guided_ridges(full, bench), last_tokens(bench, full)
        guided = {context: dataclasses.asdict(ridge.guidance) for context, ridge in ridges.items()}
        trials[ridge_name(full)] = guided
        key = hashed({"rivals": generator_digest(full), "trials": guided, "seeds": seeds})
        own = kept("rivals", key, lambda task: scored_rivals(bench, ridges, stored, full, task, seeds))
        for name, line in lines.items():
            lines[name] = {context: line[context] | own[name][context] for context in CONTEXTS}
    again = [name for name in AGAIN if name in lines[old[0].task][CONTEXTS[0]]]
    start = generator.codec.start or bench.fresh
    cost = seconds_to_generate(generator, bench) | {"runs": fine_tunes(bench, start, old), "flops": {}}
    return {
        **header(bench, trials),
        "seeds": before["seeds"],
        "shrunk": generator.config.shrunk is not None,
        "rivals_again": again,
        "before": {key: before[key] for key in ("recipe", "commit", "date", "machine")},
        "origin": origin_gap(old, lines),
        "cost": costs(cost, {}),
        **summarise(
            [joined(one, lines[one.task], wide) for one in old],
            draws=recipe.evaluate.bootstrap,
            seed=recipe.seed,
        ),
    }


def page(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The result as Markdown."""
    there, named = arguments.before.stem, ("before", "wide", "generator")
    options = [f"--{name} {getattr(arguments, name)}" for name in named if getattr(arguments, name)]
    options += ["--rivals"] if arguments.rivals else []
    also = "".join(f", `{name}`" for name in found["rivals_again"])
    gap = found["origin"]
    head = ("date", "machine", "commit", "base_model", "suite", "seeds", "trials", "shrunk")
    about = "\n".join(f"- {key.replace('_', ' ')}: {found[key]}" for key in head)
    return "\n".join(
        [
            f"# {found['recipe']}\n\n{about}\n",
            f"Made by `python benchmarks/rescore.py {arguments.recipe} {' '.join(options)}`. `{OURS}`, "
            f"`{WRONG}`{also} were scored for it; the other lines are those of [{there}]({there}.md), same "
            f"tasks, examples and prompts. The origin, scored again, has {gap['now']:.3f} with the prompt in "
            f"context ({gap['then']:.3f} there; mean difference of a task {gap['task_difference']:.3f}).\n",
            table(found),
            f"## Targets\n\n{targets_table(found)}",
            f"## Paired differences\n\n{paired_table(found)}",
            figures("Cost (seconds)", found["cost"]),
        ]
    )


def main() -> None:
    """Score, join, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--before", type=Path, required=True, help="a result of `ltdi evaluate`")
    parser.add_argument("--wide", type=Path, help="a result of wide_rival.py on the same tasks")
    parser.add_argument("--generator", type=Path, help="a folder; the recipe's own by default")
    parser.add_argument("--rivals", action="store_true", help="rivals without training again too")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    generator = find_generator(known.generator or recipe.generator_folder)
    wide = read_json(known.wide)["per_task"] if known.wide else {}
    full = find_generator(recipe.generator_folder) if known.rivals else None
    found = rescored(open_bench(recipe), generator, read_json(known.before), wide, full=full)
    text = page(found, known)
    write_pages(known.results, recipe.name, found, text)


if __name__ == "__main__":
    main()
