"""What a few examples, and a few gradient steps, are worth from a generator that is there, without a store.

    python benchmarks/few_shot.py recipes/two_networks.yaml --before docs/results/smollm2_builtin.json \
        --evaluate.few_shot.tasks=16 --evaluate.few_shot.curve_steps=24 [--generator FOLDER]

The sections few_shot and curve of `ltdi evaluate`, on the first unseen tasks of an older result, whose lines
`base` and `oracle` they are measured against; a generator of the recipe's, the package's own unless named.
Roads from the multi-task LoRA begin at the origin that the generator adds to. Learning rates are chosen on
`evaluate.few_shot.validation` validation tasks. Written to `<recipe>_few_shot.json` and `.md` in `--results`
(docs/results). Interrupted, it goes on at the task where it was.
"""

import argparse
from pathlib import Path
from typing import Any

from common import require_unseen, write_pages
from rescore import require_same_tasks

from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import load_recipe
from ltdi_peft.evaluate import guidance_of, header
from ltdi_peft.files import read_json
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.kept import Line
from ltdi_peft.report import few_shot_table
from ltdi_peft.sections import few_shot, opened
from ltdi_peft.spec import require_same_spec
from ltdi_peft.summary import CONTEXTS, TaskScores
from ltdi_peft.tables import lines_of
from ltdi_peft.targets import few_shot as shot_target
from ltdi_peft.targets import steps, target_lines
from ltdi_peft.task import Task


def measured(
    bench: Bench, generator: Generator, before: dict[str, Any], *, progress: bool = True
) -> dict[str, Any]:
    """The two sections, under the head of a result."""
    require_same_spec(bench.spec, generator.spec, "the generator")
    require_same_tasks(bench, generator, before)
    rows = [TaskScores(**row) for row in before["per_task"].values()]
    scores = {one.task: one for one in rows if one.split == "unseen_tasks"}

    def ends(task: Task) -> Line:
        old = scores[task.name]
        return {name: {c: old.mean(c, name) for c in CONTEXTS} for name in ("base", "oracle")}

    few = opened(bench, generator, generator.codec.nothing(), bench.recipe.folder / "evaluation")
    found = few_shot(few, [bench.suite[name] for name in scores], ends, progress=progress)
    return header(bench, {"ours": guidance_of(generator)}) | found


def curve_table(curve: dict[str, Any]) -> str:
    """Accuracy after each number of steps, prompt in context, and the steps to 95 % of the oracle's gain."""
    rows = []
    for origin in ("generated", "start", "fresh"):
        row = curve[origin]
        values = [f"{value:.2f}" for value in row["accuracy"]]
        reached = "–" if row["steps_to_95"] is None else str(row["steps_to_95"])
        rows.append([f"`{origin}`", f"{row['learning_rate']:g}", *values, reached])
    head = ["from", "learning rate", *(str(point) for point in curve["points"]), "95 % of the gain after"]
    ends = f"base {curve['base']['accuracy']:.2f}, oracle {curve['oracle']['accuracy']:.2f}"
    return f"## Gradient steps\n\nAccuracy, prompt in context; {ends}.\n\n{lines_of(head, rows)}"


def page(found: dict[str, Any], command: str) -> str:
    """The result as Markdown."""
    head = ("date", "machine", "commit", "base_model", "suite", "trials")
    about = "\n".join(f"- {key.replace('_', ' ')}: {found[key]}" for key in head)
    parts = [few_shot_table(found["few_shot"])]
    parts += [curve_table(found["curve"])] if "curve" in found else []
    parts += [f"## Targets\n\n{target_lines([shot_target(found), *steps(found)])}"]
    made = f"Made by `{command}`; learning rates were chosen on validation tasks."
    return (
        "\n\n".join([f"# {found['recipe']}, a few examples", about, made, *(p.strip() for p in parts)]) + "\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--before", type=Path, required=True, help="a result of `ltdi evaluate`")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    if not recipe.evaluate.few_shot.tasks:
        raise SystemExit("how many unseen tasks? Give --evaluate.few_shot.tasks=16.")
    generator = find_generator(known.generator)
    before = read_json(known.before)
    require_unseen(generator, before["per_task"])
    found = measured(open_bench(recipe), generator, before)
    named = [f"--generator {known.generator}"] if known.generator else []
    asked = [known.recipe, f"--before {known.before}", *overrides, *named]
    text = page(found, f"python benchmarks/few_shot.py {' '.join(asked)}")
    write_pages(known.results, f"{recipe.name}_few_shot", found, text)


if __name__ == "__main__":
    main()
