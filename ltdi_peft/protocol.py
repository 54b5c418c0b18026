"""The methods, and how each task is scored.

In: what stays the same from task to task (`Protocol`).  Out: `TaskScores`, one a task.
Idea: all adapters of all methods that share a context answer one sheet of examples together. What was scored
is kept in a file named by a digest of everything that it depends on, so a killed evaluation goes on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ltdi_peft.attributes import tensors_of
from ltdi_peft.baselines import (
    NearestTask,
    RidgeRival,
    adapter_digest,
    final_adapter,
    tensor_digest,
    with_noise_like,
)
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe, to_dict
from ltdi_peft.encode import AdapterCodec, round_trip
from ltdi_peft.generator import Generator
from ltdi_peft.kept import whole_lines
from ltdi_peft.memorisation import nearest_distances, relative_errors
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.score import chance, make_sheet, pick_shots, score
from ltdi_peft.spec import Adapter, moved
from ltdi_peft.store import Trajectory
from ltdi_peft.summary import CONTEXTS, UNSEEN, TaskScores
from ltdi_peft.t2l import FOLDERS, T2LRival
from ltdi_peft.task import Task, TaskSuite
from ltdi_peft.trajectory import flat
from ltdi_peft.variants import VARIANTS

VERSION = 2  # of what a cached score means
SHOTS = {"in_context": 5}  # methods that answer with so many training examples in context


@dataclass(frozen=True)
class Protocol:
    """What stays the same from task to task."""

    recipe: Recipe
    bench: Bench
    methods: tuple[str, ...]
    encoder: PromptEncoder
    generators: dict[str, Generator]  # "ours" and the variants
    fixed: dict[str, Adapter]  # methods that answer every task with one adapter
    apart: dict[str, Bench]  # methods whose adapter has a spec of its own, with the bench laid out for it
    nearest: NearestTask
    ridge: dict[str, RidgeRival]  # of each context, guided for it
    t2l: dict[str, T2LRival]  # "t2l_recon", "t2l_sft"
    stored: tuple[Trajectory, ...]  # training runs
    oracles: dict[str, Trajectory]  # task → its own run, from the held-out store
    trials: dict[str, Any]
    folder: Path  # of the cached scores
    data: TrainingSet
    codec: AdapterCodec  # of the stored runs, from the shared start; that of `ours` may count from an origin

    def from_start(self, adapter: Adapter) -> Adapter:
        """What begins at the origin, as it were from the shared start: there stored runs and oracles are."""
        origin = self.fixed.get("origin")
        if origin is None or not all(torch.equal(adapter[site][0], a) for site, (a, _) in origin.items()):
            return adapter
        return moved(adapter, origin, self.fixed["start"])

    def prompts(self, task: Task) -> list[str]:
        """The generator's prompt for each seed: held-out paraphrases in turn."""
        return seed_prompts(task, self.recipe.evaluate.seeds)

    def generated(self, name: str, prompts: Sequence[str], context: str) -> list[Adapter]:
        """Prompt i answered with generator seed i, modulo the number of seeds, for use in this context."""
        own, seeds = self.generators[name], self.recipe.evaluate.seeds
        return one_by_one(own, self.bench, prompts, seeds, context=context)

    def noisy(self, task: Task, context: str) -> list[Adapter]:
        """The mean adapter and noise, for each seed as far from it as what `ours` generates."""
        codec, mean = self.generators["ours"].codec, self.fixed["mean"]
        generated = self.generated("ours", self.prompts(task), context)
        seeds = [f"{self.recipe.seed}/{task.name}/{index}" for index in range(len(generated))]
        return [with_noise_like(codec, mean, *pair) for pair in zip(generated, seeds, strict=True)]

    def setting(self, name: str) -> tuple[int, AdaptedBase]:
        """How a method is asked: examples in context, and the base model cut for its adapters' spec."""
        return SHOTS.get(name, 0), self.apart.get(name, self.bench).adapted

    def wrong_prompts(self, task: Task) -> list[str]:
        """Held-out paraphrases of other tasks with this task's answer format."""
        others, _ = wrong_tasks(self.bench.suite, task, self.recipe.evaluate.wrong_prompts, self.recipe.seed)
        return prompts_of(others)


def seed_prompts(task: Task, seeds: int) -> list[str]:
    """The generator's prompt for each seed: held-out paraphrases in turn."""
    return [task.held_out_prompts[seed % len(task.held_out_prompts)] for seed in range(seeds)]


def prompts_of(others: Sequence[Task]) -> list[str]:
    """A held-out paraphrase of each task, of the next one the next in turn."""
    return [other.held_out_prompts[i % len(other.held_out_prompts)] for i, other in enumerate(others)]


def one_by_one(
    generator: Generator, bench: Bench, prompts: Sequence[str], seeds: int, *, context: str
) -> list[Adapter]:
    """Prompt i answered with generator seed i modulo `seeds`; an adapter's bytes depend on its batch.

    context: where the adapters are to work, "prompt" or "no_prompt".
    """
    made, options = [], {"base": bench.base, "prompt_in_context": context == "prompt"}
    for index, prompt in enumerate(prompts):
        made += generator.generate([prompt], seed=index % seeds, **options)
    return [one.adapter for one in made]


Maker = Callable[[Protocol, Task, str], list[Adapter]]
"""A task's adapters, one a seed, for one context."""


def one_for_all(name: str) -> Maker:
    """The same adapter for every task."""
    return lambda protocol, task, context: [protocol.fixed[name]]


def generator_of(name: str) -> Maker:
    """What the generator of this name makes of each seed's prompt."""
    return lambda protocol, task, context: protocol.generated(name, protocol.prompts(task), context)


def hypernetwork_of(name: str) -> Maker:
    """What the T2L rival of this name makes of each seed's prompt."""
    return lambda protocol, task, context: protocol.t2l[name].adapters(
        protocol.encoder(protocol.prompts(task))
    )


METHODS: dict[str, Maker] = {
    "base": one_for_all("base"),
    "in_context": one_for_all("base"),
    "start": one_for_all("start"),
    "origin": one_for_all("origin"),
    "format_only": one_for_all("format_only"),
    "multi_task_lora": one_for_all("multi_task_lora"),
    "multi_task_lora_4x": one_for_all("multi_task_lora_4x"),
    "mean": one_for_all("mean"),
    "mean_noise": lambda p, task, context: p.noisy(task, context),
    "nearest": lambda p, task, context: p.nearest.adapters(p.encoder(p.prompts(task))),
    "ridge": lambda p, task, context: p.ridge[context].adapters(p.encoder(p.prompts(task))),
    **{name: hypernetwork_of(name) for name in FOLDERS.values()},
    **{name: generator_of(name) for name in VARIANTS},
    "ours": generator_of("ours"),
    "ours_wrong_prompt": lambda p, task, context: p.generated("ours", p.wrong_prompts(task), context),
    "oracle_codec": lambda p, task, context: [round_trip(p.codec, final_adapter(p.oracles[task.name]))],
    "oracle": lambda p, task, context: [final_adapter(p.oracles[task.name])],
}


# ---- scores, task after task


def wrong_tasks(suite: TaskSuite, task: Task, count: int, seed: int) -> tuple[list[Task], bool]:
    """Other unseen or training tasks of the same answer format and another question; whether there are such.

    Built-in names are domain/question/format. Where the name tells no format, or nobody shares it, any other
    tasks. The pick depends on suite, seed and task alone.
    """
    others = [t for split in (*UNSEEN, "train") for t in suite.split(split) if t.name != task.name]
    if not others:
        raise ValueError(
            f"suite {suite.name!r} has no task but {task.name!r}: there is no wrong prompt to give."
        )
    parts = task.name.split("/")
    same = [t for t in others if len(parts) == 3 and same_format(parts, t.name.split("/"))]
    pool = sorted(same or others, key=lambda t: t.name)
    return random.Random(f"{seed}/{task.name}").sample(pool, min(count, len(pool))), bool(same)


def same_format(parts: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two names domain/question/format ask different questions in one format."""
    return len(other) == 3 and other[2] == parts[2] and tuple(other[:2]) != tuple(parts[:2])


def score_tasks(protocol: Protocol, *, progress: bool) -> list[TaskScores]:
    """Every unseen task's scores; what the cache holds is not scored again."""
    file = protocol.folder / f"{digest(protocol)}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {one.task: one for one in (TaskScores(**line) for line in whole_lines(file))}
    tasks = [(split, task) for split in UNSEEN for task in protocol.bench.suite.split(split)]
    with tqdm(tasks, desc="evaluation", disable=not progress, unit="task") as bar:
        for split, task in bar:
            if task.name not in known:
                known[task.name] = score_task(protocol, task, split)
                with file.open("a") as out:
                    out.write(json.dumps(asdict(known[task.name])) + "\n")
    return [known[task.name] for _, task in tasks]


def digest(protocol: Protocol) -> str:
    """16 hex digits of everything that a score depends on."""
    recipe, bench = protocol.recipe, protocol.bench
    about = {
        "version": VERSION,
        "recipe": {k: v for k, v in to_dict(recipe).items() if k in ("seed", "base", "collect", "condition")},
        "evaluate": [recipe.evaluate.examples, recipe.evaluate.seeds, recipe.evaluate.wrong_prompts],
        "methods": protocol.methods,
        "shots": SHOTS,
        "base": [bench.base.spec_fingerprint, bench.base.weights_fingerprint, bench.spec.to_dict()],
        "suite": {
            split: [task.to_dict() for task in bench.suite.split(split)] for split in bench.suite.splits
        },
        "generators": {name: generator_digest(one) for name, one in protocol.generators.items()},
        "fixed": {name: adapter_digest(adapter) for name, adapter in protocol.fixed.items()},
        "apart": {name: one.spec.to_dict() for name, one in protocol.apart.items()},
        "t2l": {name: rival.digest() for name, rival in protocol.t2l.items()},
        "ridge": [
            [asdict(one.guidance), tensor_digest([one.ridge.weight, one.mean])]
            for one in protocol.ridge.values()
        ],
        # The loss of the last step, all its digits, tells two runs of one name apart.
        "runs": [
            (run.run_id, run.snapshots[-1].step, run.snapshots[-1].loss)
            for run in (*protocol.stored, *protocol.oracles.values())
        ],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def generator_digest(generator: Generator) -> str:
    """16 hex digits of weights, codec and how adapters are drawn."""
    config = {key: value for key, value in asdict(generator.config).items() if key != "recipe"}
    weights = tensor_digest(
        [
            *generator.state_dict().values(),
            generator.codec.scale,
            generator.codec.energy_kept,
            *(flat(generator.tuning).values() if generator.tuning else ()),
            *(tensors_of(generator.attributes).values() if generator.attributes else ()),
        ]
    )
    return hashlib.sha256(f"{weights}{json.dumps(config, sort_keys=True)}".encode()).hexdigest()[:16]


def score_task(protocol: Protocol, task: Task, split: str) -> TaskScores:
    """All methods on one task, in both contexts, with ΔW distances."""
    evaluate_, bench = protocol.recipe.evaluate, protocol.bench
    examples, accuracy, made = task.evaluation[: evaluate_.examples], {}, {}
    for context in reversed(CONTEXTS):  # what is made last, for the headline column, is measured below too
        made = {name: METHODS[name](protocol, task, context) for name in protocol.methods}
        prompts = task.held_out_prompts if context == "prompt" else None
        accuracy[context] = accuracies(protocol, task, made, prompts)
    others, same = wrong_tasks(bench.suite, task, evaluate_.wrong_prompts, protocol.recipe.seed)
    alike = {
        name: [protocol.from_start(one) for one in adapters]
        for name, adapters in made.items()
        if name not in (*SHOTS, *protocol.apart)
    }
    finals = [one for name in ("ours", "oracle") for one in alike.get(name, ())]
    nearest = nearest_distances(bench.spec, finals, protocol.stored)
    return TaskScores(
        task=task.name,
        split=split,
        domain=task.domain,
        examples=len(examples),
        chance=chance(examples),
        accuracy=accuracy,
        nearest={"ours": nearest[:-1], "oracle": nearest[-1:]} if "ours" in made else {"oracle": nearest},
        error=relative_errors(bench.spec, alike),
        wrong_tasks=[other.name for other in others],
        same_format=same,
    )


def accuracies(
    protocol: Protocol, task: Task, made: dict[str, list[Adapter]], prompts: Sequence[str] | None
) -> dict[str, list[float]]:
    """Method → accuracy of each of its adapters, in one context; `prompts` None leaves the prompt out."""
    bench, settings = protocol.bench, {name: protocol.setting(name) for name in made}
    examples, found = task.evaluation[: protocol.recipe.evaluate.examples], {}
    # Specs differ in the rank alone, not in the sites, so one sheet's lower activations serve them all.
    sheets = {
        shots: make_sheet(bench.adapted, examples, prompts, shots=pick_shots(task, shots))
        for shots in {shots for shots, _ in settings.values()}
    }
    for shots, adapted in set(settings.values()):
        names = [name for name in made if settings[name] == (shots, adapted)]
        # An adapter that answers for several methods or seeds is scored once.
        distinct = {id(adapter): adapter for name in names for adapter in made[name]}
        stacked = stack_adapters(list(distinct.values()), bench.adapted.device)
        values = score(adapted, sheets[shots], stacked).accuracy.tolist()
        by_id = {key: round(value, 6) for key, value in zip(distinct, values, strict=True)}
        found |= {name: [by_id[id(adapter)] for adapter in made[name]] for name in names}
    return {name: found[name] for name in made}
