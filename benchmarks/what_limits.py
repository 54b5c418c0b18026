"""What holds generated adapters back on tasks nobody trained on: the wording, the span, or the prediction.

    python benchmarks/what_limits.py RECIPE [--encoders minilm minilm_words] [--examples 32]

In: a recipe whose runs are collected, or encoded (`train.encoded`); its validation tasks. `tuned` among the
encoders is the recipe's own, after `ltdi train` tuned it.
Out: two Markdown tables, the first alone without collected runs. Error of the ridge prediction in the leading
principal directions of the training adapters, for validation tasks asked in training wordings and in held-out
ones. Accuracy of these tasks' true adapters cut to the leading directions: what a perfect prediction there
would reach.
"""

import argparse
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.baselines import final_adapter
from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import Ridge, choose_strength, fit_task_ridge
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import load_recipe
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.encoded import Encoded, recipe_encoded
from ltdi_peft.prepare import (
    TrainingSet,
    encoded_runs,
    encoded_targets,
    fit_codec,
    training_set,
    training_trajectories,
)
from ltdi_peft.score import make_sheet, score
from ltdi_peft.task import Task
from ltdi_peft.train import recipe_encoder, validation_runs
from ltdi_peft.trajectory import Trajectory

LEADING = (16, 64, 256)  # principal directions


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


def fitted(data: TrainingSet, finals: Float[Tensor, "task number"]) -> Ridge:
    """Ridge from these conditions, its strength by leave-one-task-out error."""
    return fit_task_ridge(data.conditions, finals, choose_strength(data.conditions, finals))


def prediction_errors(
    bench: Bench,
    encoded: Encoded,
    true: Float[Tensor, "task number"],
    tasks: Sequence[Task],
    names: Sequence[str],
) -> dict[str, Float[Tensor, "task number"]]:
    """Print the first table; returns each encoder's predictions from the first held-out wording.

    true: tokens of the validation tasks' own adapters.
    """
    found = {}
    print("| encoder | wording | " + " | ".join(f"first {count}" for count in LEADING) + " |")
    print("|---|---|" + "---|" * len(LEADING))
    for name in names:
        encoder = recipe_encoder(bench) if name == "tuned" else PromptEncoder(name, base=bench.base)
        data = training_set(encoded, encoder, bench.suite)
        finals = data.task_means[:, -1].flatten(1)
        ridge, mean, basis = fitted(data, finals), finals.mean(0), directions(finals)
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
        found[name] = predicted[own.cumsum(0) - own]
    return found


def accuracies(
    bench: Bench,
    codec: AdapterCodec,
    runs: Sequence[Trajectory],
    held: Sequence[Trajectory],
    predicted: dict[str, Float[Tensor, "task number"]],
    examples: int,
) -> None:
    """Print the second table."""
    finals = encoded_targets(codec, runs, 1)[:, -1].flatten(1)
    true, mean, basis = encoded_targets(codec, held, 1)[:, -1].flatten(1), finals.mean(0), directions(finals)
    rows = {"start": torch.zeros_like(true), "mean": mean.expand_as(true)}
    rows |= {f"ridge, `{name}`": one for name, one in predicted.items()}
    rows |= {f"true, first {count}": mean + cut(true - mean, basis, count) for count in LEADING}
    rows["true, through the codec"] = true
    total = torch.zeros(len(rows) + 1, 2)
    for place, run in enumerate(held):
        task = bench.suite[run.task.name]
        made = [codec.decode(row[place].view(-1, codec.width)) for row in rows.values()] + [
            final_adapter(run)
        ]
        stacked = stack_adapters(made, bench.adapted.device)
        for column, prompts in enumerate((task.held_out_prompts[:1], None)):
            sheet = make_sheet(bench.adapted, task.evaluation[:examples], prompts)
            total[:, column] += score(bench.adapted, sheet, stacked).accuracy
    print("\n| adapter | prompt in context | without |\n|---|---|---|")
    for name, (with_prompt, without) in zip([*rows, "true"], (total / len(held)).tolist(), strict=True):
        print(f"| {name} | {with_prompt:.3f} | {without:.3f} |")


def main() -> None:
    """Both tables on the recipe's validation tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--encoders", nargs="+", default=["minilm", "minilm_words"])
    parser.add_argument("--examples", type=int, default=32)
    known, overrides = parser.parse_known_args()
    bench = open_bench(load_recipe(known.recipe, overrides))
    if bench.recipe.train.encoded:
        encoded = recipe_encoded(bench.recipe, [task.name for task in bench.suite.split("train")])
        known_tasks = [task.name for task in bench.suite.split("validation")]
        held_out = encoded.held_out.of(known_tasks)
        print(f"{len(encoded.runs.tasks)} training runs, {len(held_out.tasks)} validation tasks\n")
        tasks, true = [bench.suite[name] for name in held_out.tasks], held_out.tokens[:, -1].flatten(1)
        with torch.no_grad():
            prediction_errors(bench, encoded, true, tasks, known.encoders)
        return
    runs = training_trajectories(bench.recipe, [task.name for task in bench.suite.split("train")])
    held = [run for run in validation_runs(bench.recipe, bench) if bench.suite[run.task.name].evaluation]
    codec = fit_codec(bench.recipe, runs)
    print(f"{len(runs)} training runs, {len(held)} validation tasks, {known.examples} examples each\n")
    with torch.no_grad():
        true = encoded_targets(codec, held, 1)[:, -1].flatten(1)
        tasks = [bench.suite[run.task.name] for run in held]
        encoded = encoded_runs(bench.recipe, runs)
        predicted = prediction_errors(bench, encoded, true, tasks, known.encoders)
        accuracies(bench, codec, runs, held, predicted, known.examples)


if __name__ == "__main__":
    main()
