"""The paper's ablation in weight space: each loss, plain and under REPTILE; k and T swept.

    python benchmarks/weight_space.py recipes/demo.yaml [--steps 600] [--seeds 3] [--out STEM]

On collected runs, at equal gradient steps, around the mean adapter (no ridge centre does the work). A row's
figure is the squared error of the generated tokens of validation tasks over the mean adapter's (1 = the
mean), under the sampler that is best there, mean over seeds. Lines are kept in `<output>/weight_space.jsonl`,
so a killed run goes on.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ltdi_peft.collect import recipe_suite
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import LOSSES, Recipe, load_recipe
from ltdi_peft.diffusion import SAMPLERS
from ltdi_peft.encoding import held_out_runs, validation_targets
from ltdi_peft.evaluate import commit, machine
from ltdi_peft.files import json_bytes, replace_file
from ltdi_peft.kept import whole_lines
from ltdi_peft.prepare import Prepared, prepare
from ltdi_peft.session import Session
from ltdi_peft.tables import lines_of
from ltdi_peft.train import Validation, validate
from ltdi_peft.variants import variant_recipe

K, T, OTHER_K, OTHER_T = 3, 20, (1, 5), (5, 50)
HEAD = ("generator", "network", "k", "T", "sampler", "error", "± over seeds", "training loss", "seconds")


@dataclass(frozen=True)
class Setting:
    """One generator: `name` is that of a variant."""

    name: str
    network: str  # "linear" or "transformer"
    k: int
    T: int
    steps: int
    seed: int


def settings(steps: int, seeds: int) -> Iterator[Setting]:
    """The ablation at k = 3 and T = 20, then k and T one at a time, with the linear path and one seed."""
    names = [f"{loss}{meta}" for loss in LOSSES for meta in ("", "+reptile")]
    for network in ("linear", "transformer"):
        for name in names:
            yield from (Setting(name, network, K, T, steps, seed) for seed in range(seeds))
    for name in names:
        yield from (Setting(name, "linear", K, other, steps, 0) for other in OTHER_T)
        if name.startswith("local"):
            yield from (Setting(name, "linear", other, T, steps, 0) for other in OTHER_K)


def generator_recipe(recipe: Recipe, one: Setting) -> Recipe:
    """The recipe of a setting: a variant's, with equal gradient steps."""
    about = replace(
        recipe,
        seed=one.seed,
        diffusion=replace(recipe.diffusion, k=one.k, steps=one.T),
        denoiser=replace(recipe.denoiser, nonlinear=one.network == "transformer"),
        train=replace(recipe.train, steps=one.steps),
        meta=replace(recipe.meta, method="plain"),
    )
    return variant_recipe(about, one.name)


def measured(recipe: Recipe, prepared: Prepared, validation: Validation) -> dict[str, float]:
    """Train one generator; sampler → relative error on validation tasks, and the training loss."""
    session = Session(recipe, prepared, Accelerator(cpu=True))
    losses = [float(step.loss) for step in session.steps()]
    found = {}
    for sampler in SAMPLERS:
        session.recipe = replace(recipe, diffusion=replace(recipe.diffusion, sampler=sampler))
        found[sampler] = validate(session, validation)["validation/relative_error"]
    last = max(1, len(losses) // 10)
    return found | {"loss": statistics.fmean(losses[-last:]), "seconds": session.seconds["weights"]}


def open_runs(recipe: Recipe, k: int) -> tuple[Prepared, Validation]:
    """What all settings with k local targets share."""
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, k=k, centre="mean"))
    suite, encoder = recipe_suite(recipe), PromptEncoder(recipe.condition.encoder)
    prepared = prepare(recipe, encoder, suite)
    names = [task.name for task in suite.split("validation")]
    targets = validation_targets(recipe, prepared, held_out_runs(recipe, names), names)
    prompts = [suite[name].held_out_prompts[0] for name in targets]
    return prepared, Validation(torch.stack(list(targets.values())), encoder(prompts))


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting but for its seeds: the best sampler's error, mean and deviation over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        key = {name: value for name, value in line["setting"].items() if name != "seed"}
        groups.setdefault(json.dumps(key), []).append(line["found"])
    rows = []
    for key, found in groups.items():
        errors = {s: [one[s] for one in found] for s in SAMPLERS}
        sampler = min(SAMPLERS, key=lambda s: statistics.fmean(errors[s]))
        row = json.loads(key) | {"sampler": sampler, "seeds": len(found)}
        row["error"] = round(statistics.fmean(errors[sampler]), 4)
        row["deviation"] = round(statistics.stdev(errors[sampler]), 4) if len(found) > 1 else None
        row |= {name: round(statistics.fmean(one[name] for one in found), 4) for name in ("loss", "seconds")}
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, under `HEAD`."""
    k = row["k"] if row["name"].startswith("local") else 1
    spread = "–" if row["deviation"] is None else f"{row['deviation']:.3f}"
    figures = [f"{row['error']:.3f}", spread, f"{row['loss']:.3f}", f"{row['seconds']:.0f}"]
    return [f"`{row['name']}`", row["network"], str(k), str(row["T"]), row["sampler"], *figures]


def main() -> None:
    """All settings, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=600, help="gradient steps of every setting")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/weight_space"))
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.recipe, overrides)
    wanted = [asdict(one) for one in settings(known.steps, known.seeds)]
    file, opened = recipe.folder / "weight_space.jsonl", {}
    done = {json.dumps(line["setting"]): line for line in whole_lines(file)}
    for about in tqdm(wanted, desc="weight space", unit="generator"):
        if json.dumps(about) not in done:
            one = Setting(**about)
            if one.k not in opened:
                opened[one.k] = open_runs(recipe, one.k)
            line = {"setting": about, "found": measured(generator_recipe(recipe, one), *opened[one.k])}
            done[json.dumps(about)] = line
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
    rows = rows_of([done[json.dumps(about)] for about in wanted])
    head = {"recipe": recipe.name, "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    head |= {"machine": machine(torch.device("cpu")), "steps": known.steps, "seeds": known.seeds}
    text = lines_of(HEAD, [cells(row) for row in rows])
    about = "\n".join(f"- {key}: {value}" for key, value in head.items())
    command = f"python benchmarks/weight_space.py {known.recipe}"
    title = f"# Weight space: {recipe.name}\n\n{about}\n\nMade by `{command}`."
    replace_file(known.out.with_suffix(".json"), json_bytes(head | {"rows": rows}))
    replace_file(known.out.with_suffix(".md"), f"{title} Error: of the mean adapter = 1.\n\n{text}".encode())
    print(text)


if __name__ == "__main__":
    main()
