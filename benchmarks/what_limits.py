"""What holds generated adapters back on tasks nobody trained on: the wording, the span, or the prediction.

    python benchmarks/what_limits.py RECIPE [--encoders minilm minilm_words] [--examples 32]

In: a recipe whose runs are collected, or encoded (`train.encoded`); its validation tasks. `tuned` among the
encoders is the recipe's own, after `ltdi train` tuned it.
Out: two Markdown tables. Error of the ridge prediction in the leading principal directions of the training
adapters, for validation tasks asked in training wordings and in held-out ones. Accuracy of what is predicted,
and of these tasks' true adapters, in part or cut to the leading directions: what a perfect prediction there
would reach. Differences are added to the recipe's origin, if it has one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.baselines import final_adapter
from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import Ridge, choose_strength, fit_task_ridge
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import load_recipe
from ltdi_peft.encoded import Encoded
from ltdi_peft.origin import has_origin, recipe_origin
from ltdi_peft.prepare import (
    TrainingSet,
    encoded_of,
    encoded_targets,
    runs_with,
    training_set,
)
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.task import Task
from ltdi_peft.train import recipe_encoder, validation_runs

LEADING = (16, 64, 256)  # principal directions
PARTS = (0.25, 0.5)


def directions(tokens: Float[Tensor, "task number"]) -> Float[Tensor, "direction number"]:
    """Orthonormal principal directions of the tasks' deviations from their mean, the strongest first."""
    off = (tokens - tokens.mean(0)).double()
    energy, vectors = torch.linalg.eigh(off @ off.mT)
    kept = energy > 1e-9 * energy[-1]
    return ((vectors[:, kept] / energy[kept].sqrt()).mT @ off).flip(0).float()


def cut(
    tokens: Float[Tensor, "task number"], basis: Float[Tensor, "direction number"], count: int
) -> Float[Tensor, "task number"]:
    """What lies in the first `count` directions."""
    return tokens @ basis[:count].mT @ basis[:count]


def fitted(data: TrainingSet, finals: Float[Tensor, "task number"], strength: float | None) -> Ridge:
    """Ridge from these conditions; without a strength by leave-one-task-out error."""
    return fit_task_ridge(data.conditions, finals, strength or choose_strength(data.conditions, finals))


def prediction_errors(
    bench: Bench,
    encoded: Encoded,
    true: Float[Tensor, "task number"],
    tasks: Sequence[Task],
    names: Sequence[str],
) -> dict[str, Float[Tensor, "task number"]]:
    """Print the first table; returns each encoder's predictions from the first wording of either kind.

    true: tokens of the validation tasks' own adapters.
    """
    found = {}
    print("| encoder | wording | " + " | ".join(f"first {count}" for count in LEADING) + " |")
    print("|---|---|" + "---|" * len(LEADING))
    for name in names:
        encoder = recipe_encoder(bench) if name == "tuned" else PromptEncoder(name, base=bench.base)
        data = training_set(encoded, encoder, bench.suite)
        finals = data.task_means[:, -1].flatten(1)
        mean, basis = finals.mean(0), directions(finals)
        ridge = fitted(data, finals, bench.recipe.diffusion.ridge)
        asked = {
            "training": [t.prompts[:4] for t in tasks],
            "held out": [t.held_out_prompts[:4] for t in tasks],
        }
        for wording, prompts in asked.items():
            predicted = ridge(encoder([prompt for own in prompts for prompt in own]))
            own = torch.tensor([len(one) for one in prompts])
            errors = []
            for count in LEADING:
                off, all_ = (
                    cut(one, basis, count)
                    for one in (predicted - true.repeat_interleave(own, 0), true - mean)
                )
                wanted = all_.square().sum(1).repeat_interleave(own).sum()
                errors.append((off.square().sum() / wanted).item())
            print(f"| `{name}` | {wording} | " + " | ".join(f"{one:.2f}" for one in errors) + " |")
            found[f"`{name}`, {wording} wording"] = predicted[own.cumsum(0) - own]
    return found


def accuracies(
    bench: Bench,
    encoded: Encoded,
    true: Float[Tensor, "task number"],
    tasks: Sequence[Task],
    predicted: dict[str, Float[Tensor, "task number"]],
    examples: int,
    own: Sequence[Adapter] = (),
) -> None:
    """Print the second table; `own` are the tasks' adapters as they were before the codec."""
    codec, finals = encoded.codec, encoded.runs.tokens[:, -1].flatten(1)
    if has_origin(bench.recipe):
        codec = replace(codec, origin=recipe_origin(bench, codec.start)[0])
    mean, basis = finals.mean(0), directions(finals)
    rows = {"nothing added": torch.zeros_like(true), "mean": mean.expand_as(true)}
    rows |= {f"ridge, {name}": one for name, one in predicted.items()}
    rows |= {f"{part} of the way from the mean to true": mean + part * (true - mean) for part in PARTS}
    rows |= {f"true, first {count}": mean + cut(true - mean, basis, count) for count in LEADING}
    rows["true, through the codec"] = true
    names = [*rows, *(["true"] if own else [])]
    total = torch.zeros(len(names), 2)
    for place, task in enumerate(tasks):
        made = [codec.decode(row[place].view(-1, codec.width)) for row in rows.values()]
        stacked = stack_adapters([*made, *own[place : place + 1]], bench.adapted.device)
        for column, prompts in enumerate((task.held_out_prompts[:1], None)):
            sheet = make_sheet(bench.adapted, task.evaluation[:examples], prompts)
            total[:, column] += score(bench.adapted, sheet, stacked).accuracy
    print("\n| adapter | prompt in context | without |\n|---|---|---|")
    for name, (with_prompt, without) in zip(names, (total / len(tasks)).tolist(), strict=True):
        print(f"| {name} | {with_prompt:.3f} | {without:.3f} |")


def tables(bench: Bench, encoders: Sequence[str], examples: int) -> None:
    """Print both tables on the recipe's validation tasks."""
    encoded, own = encoded_of(bench.recipe, bench.suite), []
    if bench.recipe.train.encoded:
        held_out = encoded.held_out.of([task.name for task in bench.suite.split("validation")])
    else:
        held = [run for run in validation_runs(bench.recipe, bench) if bench.suite[run.task.name].evaluation]
        held_out = runs_with(encoded_targets(encoded.codec, held, 1), held)
        own = [final_adapter(run) for run in held]
    tasks, true = [bench.suite[name] for name in held_out.tasks], held_out.tokens[:, -1].flatten(1)
    runs = len(encoded.runs.tasks)
    print(f"{runs} training runs, {len(tasks)} validation tasks, {examples} examples each\n")
    with torch.no_grad():
        predicted = prediction_errors(bench, encoded, true, tasks, encoders)
        accuracies(bench, encoded, true, tasks, predicted, examples, own)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--encoders", nargs="+", default=["minilm", "minilm_words"])
    parser.add_argument("--examples", type=int, default=32)
    known, overrides = parser.parse_known_args()
    tables(open_bench(load_recipe(known.recipe, overrides)), known.encoders, known.examples)


if __name__ == "__main__":
    main()
