"""Choose a generator's guidance anew, as training does, on the validation tasks of a recipe.

    python benchmarks/guide.py recipes/two_networks.yaml --suite.validation=59 --out FOLDER [--alone-share]

In: a generator of the recipe's (`--generator FOLDER`; the package's own unless named). More validation tasks
than it was trained with tell its trials further apart.
Out: for adapters beside their prompt and for those alone, the accuracy of each trial and what the chosen one
is ahead of it by, mean and standard error over the tasks; then, of a generator with a network for adapters
alone, how much of that one helps beside a prompt; and the generator, guided so, in the new folder FOLDER.
Nothing else of it changes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.config import load_recipe
from ltdi_peft.files import replacing_folder
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.guidance import Tried, choose_alone_share, choose_guidance, mean_over
from ltdi_peft.multi_task import validation_tasks
from ltdi_peft.tables import lines_of


def guided(generator: Generator, bench: Bench) -> dict[str, Tried]:
    """Context → what its trials scored; the generator has the best guidance of each afterwards."""
    names, found = [task.name for task in validation_tasks(bench)], {}
    if generator.alone is not None:
        twin = generator.purposed(prompt_in_context=False)
        found["no_prompt"] = choose_guidance(twin, bench, names, context="no_prompt")
        best = found["no_prompt"].best()
        alone = {"guidance_scale": best.scale, "mean_share": best.mean_share}
        generator.config = replace(generator.config, alone=alone)
    found["prompt"] = choose_guidance(generator, bench, names)
    best = found["prompt"].best()
    generator.config = replace(generator.config, guidance_scale=best.scale, mean_share=best.mean_share)
    return found


def shared(generator: Generator, bench: Bench) -> str:
    """Choose how much of the network for adapters alone is in those beside a prompt; a row a trial."""
    names = [task.name for task in validation_tasks(bench)]
    share, tried = choose_alone_share(generator, bench, names)
    generator.config = replace(generator.config, alone_share=share)
    rows = [[s, f"{accuracy:.4f}", "chosen" if float(s) == share else ""] for s, accuracy in tried.items()]
    head = ["share of the network for adapters alone", "accuracy", ""]
    return f"prompt in context, {len(names)} validation tasks\n\n{lines_of(head, rows)}"


def table(tried: Tried) -> str:
    """A row a trial, the chosen one marked."""
    best = tried.trials.index(tried.best())
    rows = []
    lines = zip(tried.trials, mean_over(tried.accuracy), tried.behind(best), strict=True)
    for place, (one, accuracy, (gap, error)) in enumerate(lines):
        ahead = "chosen" if place == best else f"{gap:+.4f} ± {error:.4f}"
        rows.append([f"{one.scale:g}", f"{one.mean_share:g}", f"{accuracy:.4f}", ahead])
    return lines_of(["scale", "share of the mean", "accuracy", "the chosen one − it"], rows)


def main() -> None:
    """Choose, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the generator")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    only = "leave scale and mean as they are, choose the share of the network for adapters alone"
    parser.add_argument("--alone-share", action="store_true", help=only)
    known, overrides = parser.parse_known_args()
    if known.out.exists():
        raise SystemExit(f"{known.out} exists already; nothing is overwritten. Choose another --out.")
    generator = find_generator(known.generator)
    generator.scores = None  # they are of its old guidance
    bench = open_bench(load_recipe(known.recipe, overrides))
    for context, tried in ({} if known.alone_share else guided(generator, bench)).items():
        titles = {"prompt": "prompt in context", "no_prompt": "without prompt"}
        print(f"{titles[context]}, {tried.accuracy.shape[1]} validation tasks\n\n{table(tried)}")
    if generator.alone is not None:
        print(shared(generator, bench))
    with replacing_folder(known.out) as partial:
        generator.save_pretrained(partial)


if __name__ == "__main__":
    main()
