"""Every domain unseen once: a generator for each fold of domains, and one table over all of them.

    python benchmarks/domain_folds.py recipes/domain_folds.yaml [--folds 1 2 …] [--results FOLDER]

For each fold `collect`, training and `evaluate` of the recipe with `suite.fold`, in `<output>/<fold>`; what
is made is kept, so a killed run goes on. The table resamples domains (EVALUATION, "unseen domains").
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import write_pages

from ltdi_peft.collect import collect
from ltdi_peft.config import Recipe, load_recipe
from ltdi_peft.evaluate import evaluate
from ltdi_peft.report import paired_table, table
from ltdi_peft.summary import TaskScores, columns_of, domain_row, summarise
from ltdi_peft.tables import lines_of
from ltdi_peft.task import load_suite
from ltdi_peft.train import train_generator

KEPT = ("recipe", "commit", "date", "machine", "versions", "seeds", "base_model")


def fold_result(recipe: Recipe, fold: int) -> dict[str, Any]:
    """The evaluation of a generator that saw no task of the fold's domains."""
    folder = recipe.folder / str(fold)
    about = replace(recipe, output=str(folder), suite=replace(recipe.suite, fold=fold))
    collect(about)
    train_generator(about)
    return evaluate(about, results=folder / "results")


def domain_table(scores: list[TaskScores], methods: list[str], draws: int) -> str:
    """Accuracy of each method in each domain, with the prompt in context and without."""
    pair = columns_of(scores, draws=draws, seed=0)["unseen_domains"]
    rows = []
    for domain in sorted({one.domain for one in scores}):
        found = {method: domain_row(pair, method, domain) for method in methods}
        cells = [f"{row['accuracy']:.2f} / {row['accuracy_no_prompt']:.2f}" for row in found.values()]
        rows.append([domain, *cells])
    return lines_of(["domain", *(f"`{method}`" for method in methods)], rows)


def main() -> None:
    """All folds, then the table over their domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--folds", type=int, nargs="+")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    suite = load_suite(recipe.suite.source, recipe.suite.split_file, recipe.suite.wordings)
    folds = known.folds or sorted(set(suite.folds.values()))
    results = [fold_result(recipe, fold) for fold in folds]
    scores = [TaskScores(**row) for result in results for row in result["per_task"].values()]
    draws = recipe.evaluate.bootstrap
    found = {key: results[-1][key] for key in KEPT} | {
        "folds": folds,
        "trials": [r["trials"] for r in results],
    }
    found |= summarise(scores, draws=draws, seed=recipe.seed)
    by_domain = domain_table(scores, list(found["methods"]), draws)
    about = "\n".join(
        f"- {key.replace('_', ' ')}: {found[key]}" for key in ("date", "machine", "commit", "folds")
    )
    text = "\n".join(
        [
            f"# {recipe.name}\n\n{about}\n",
            f"Made by `python benchmarks/domain_folds.py {known.recipe}`: each domain's tasks are scored "
            "with a generator that saw none of them; intervals are 95 %, bootstrapped over domains.\n",
            table(found),
            f"## Paired differences\n\n{paired_table(found)}",
            f"## By domain\n\nAccuracy with the prompt in context / without.\n\n{by_domain}",
        ]
    )
    write_pages(known.results, recipe.name, found, text)


if __name__ == "__main__":
    main()
