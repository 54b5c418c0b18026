"""What more training tasks are worth: the linear prediction fitted on some of them.

In: what the few-shot ladder has, the training set.
Out: {"split": "validation", …, "rows": [{"training_tasks": 60, "method": "linear", "G": …, …}, …]}.
Idea: only the map from prompt to adapter (the ridge centre with the generator's guidance, no network) is
fitted again, on random subsets of the training tasks. The shared start, the codec, the limits of ‖ΔW‖ and the
guidance have seen all training tasks at every point, so the curve is of the map alone: fewer tasks in earnest
are likely to do worse than it shows. `start` is the shared start without any map, `ours` the whole generator.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.baselines import fit_ridge_rival, tensor_digest
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.few_shot import FewShot
from ltdi_peft.guidance import Guidance
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.spec import Adapter
from ltdi_peft.sweep import gain_row, header, sampled, validation_lines, validation_oracles
from ltdi_peft.task import Task

SUBSETS = 3  # random subsets of each number of tasks; of all tasks there is one

Pick = tuple[int, int]  # number of training tasks, number of the subset


def task_curve(
    few: FewShot,
    data: TrainingSet,
    encoder: PromptEncoder,
    start: Adapter,
    counts: Sequence[int],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """G on validation tasks against the number of training tasks; for a result's "training_tasks".

    G_subsets are the single subsets' gains, of which G is the gain of the mean. Raises ValueError for a count
    below 2 or above the number of training tasks.
    """
    total = len(data.names)
    if wrong := [count for count in counts if not 2 <= count <= total]:
        raise ValueError(
            f"evaluate.training_tasks has {wrong}; this recipe has {total} training tasks, so give numbers "
            f"from 2 to {total}."
        )
    picks = [(n, draw) for n in sorted(set(counts)) for draw in range(1 if n == total else SUBSETS)]
    names = list(validation_oracles(few))
    conditions = encoder([few.bench.suite[name].held_out_prompts[0] for name in names])

    @cache
    def predicted(pick: Pick) -> Tensor:
        return prediction(few, data, subset(few.bench.recipe.seed, total, pick), conditions)

    def make(task: Task) -> dict[str, Adapter]:
        row, codec, clamp = names.index(task.name), few.generator.codec, few.generator.clamp
        made = {key_of(pick): clamp(codec.decode(predicted(pick)[row]))[0] for pick in picks}
        own = few.generator.config
        return {**made, "start": start, "ours": sampled(few, few.generator, task, own.sampler, own.steps, 0)}

    about = {"training_tasks": picks, "subsets": [subset(few.bench.recipe.seed, total, p) for p in picks]}
    about |= {"names": data.names, "data": tensor_digest([data.task_means, data.conditions])}
    found = validation_lines(few, about, make, desc="training tasks", progress=progress)
    rows = []
    for count in sorted(set(counts)):
        keys = [key_of(pick) for pick in picks if pick[0] == count]
        row = {"training_tasks": count, "method": "linear", "subsets": len(keys)}
        row |= gain_row(few, found, keys)
        single = [gain_row(few, found, [key]) for key in keys]
        rows.append(row | {f"{g}_subsets": [one[g] for one in single] for g in ("G", "G_no_prompt")})
    rows.append({"training_tasks": total, "method": "ours"} | gain_row(few, found, ["ours"]))
    about = {"start_and_codec_saw": total, "start": gain_row(few, found, ["start"])}
    return header(few, found) | about | {"rows": rows}


def key_of(pick: Pick) -> str:
    """The key of a subset's adapters in the kept lines."""
    return f"{pick[0]}/{pick[1]}"


def subset(seed: int, total: int, pick: Pick) -> list[int]:
    """The training tasks of a subset, ascending; the same for the same seed, in every process."""
    count, draw = pick
    return sorted(random.Random(f"{seed}/{count}/{draw}").sample(range(total), count))


def prediction(
    few: FewShot, data: TrainingSet, picked: Sequence[int], conditions: Float[Tensor, "prompt condition"]
) -> Float[Tensor, "prompt site width"]:
    """Tokens that a ridge on the picked tasks alone gives, strength chosen among them, as ours is guided."""
    place = torch.full((len(data.names),), -1)
    place[list(picked)] = torch.arange(len(picked))
    runs = place[data.task] >= 0
    part = TrainingSet(
        tuple(data.names[i] for i in picked),
        data.tokens[runs],
        place[data.task[runs]],
        data.conditions[list(picked)],
    )
    config = few.generator.config
    rival = fit_ridge_rival(part, few.generator.codec, few.generator)
    return replace(rival, guidance=Guidance(config.guidance_scale, config.mean_share)).tokens(conditions)
