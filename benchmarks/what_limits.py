"""What holds generated adapters back on tasks nobody trained on: the wording, the span, or the prediction.

    python benchmarks/what_limits.py RECIPE [--encoders minilm minilm_words] [--examples 32]

In: a recipe whose runs are collected; its validation tasks.
Out: two Markdown tables. Error of the ridge prediction in the leading principal directions of the training
adapters, for validation tasks asked in a training wording and in a held-out one. Accuracy of these tasks'
true adapters cut to the leading directions: what a perfect prediction there would reach.
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
from ltdi_peft.prepare import (
    TrainingSet,
    encoded_runs,
    encoded_targets,
    fit_codec,
    training_set,
    training_trajectories,
)
from ltdi_peft.score import make_sheet, score
from ltdi_peft.train import validation_runs
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
    codec: AdapterCodec,
    runs: Sequence[Trajectory],
    held: Sequence[Trajectory],
    names: Sequence[str],
) -> dict[str, Float[Tensor, "task number"]]:
    """Print the first table; returns each encoder's predictions from held-out wordings."""
    true, encoded = encoded_targets(codec, held, 1)[:, -1].flatten(1), encoded_runs(bench.recipe, runs)
    found = {}
    print("| encoder | wording | " + " | ".join(f"first {count}" for count in LEADING) + " |")
    print("|---|---|" + "---|" * len(LEADING))
    for name in names:
        encoder = PromptEncoder(name, base=bench.base)
        data = training_set(encoded, encoder, bench.suite)
        finals = data.task_means[:, -1].flatten(1)
        ridge, mean, basis = fitted(data, finals), finals.mean(0), directions(finals)
        tasks = [bench.suite[run.task.name] for run in held]
        asked = {
            "training": [t.prompts[0] for t in tasks],
            "held out": [t.held_out_prompts[0] for t in tasks],
        }
        for wording, prompts in asked.items():
            predicted = ridge(encoder(prompts))
            errors = []
            for count in LEADING:
                off, all_ = (cut(one, basis, count) for one in (predicted - true, true - mean))
                errors.append((off.square().sum() / all_.square().sum()).item())
            print(f"| `{name}` | {wording} | " + " | ".join(f"{one:.2f}" for one in errors) + " |")
        found[name] = predicted
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
    runs = training_trajectories(bench.recipe, [task.name for task in bench.suite.split("train")])
    held = [run for run in validation_runs(bench.recipe, bench) if bench.suite[run.task.name].evaluation]
    codec = fit_codec(bench.recipe, runs)
    print(f"{len(runs)} training runs, {len(held)} validation tasks, {known.examples} examples each\n")
    with torch.no_grad():
        predicted = prediction_errors(bench, codec, runs, held, known.encoders)
        accuracies(bench, codec, runs, held, predicted, known.examples)


if __name__ == "__main__":
    main()
