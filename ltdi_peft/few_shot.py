"""The few-shot ladder: what N examples of an unseen task are worth, by five roads (EVALUATION, "Few-shot").

In: a bench, a generator, an adapter to start from, unseen and validation tasks.
Out: {"16": {"refined": {"accuracy": …, "accuracy_no_prompt": …, "per_task": {…}}, …}, …}.
Idea: all roads read the same first N training examples, and all gradient roads take equally many steps from
the same draws; each has its learning rate chosen on validation tasks from a grid of equal size. The ladder is
climbed: what is refined is the candidate that the examples chose. What is generated is made for each context;
a road with gradients has examples with and without a prompt, and one adapter. Tasks share a forward pass, and
a killed evaluation goes on (`kept_lines`).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ltdi_peft.baselines import adapter_digest
from ltdi_peft.batched import stack_adapters, unstack_adapter
from ltdi_peft.collect import Bench, run_seed
from ltdi_peft.config import FitConfig
from ltdi_peft.fit import Pool, fit_steps
from ltdi_peft.generate import OFFERED
from ltdi_peft.generator import Generator
from ltdi_peft.kept import Line, hashed, kept_lines
from ltdi_peft.protocol import generator_digest
from ltdi_peft.refine import example_pool
from ltdi_peft.score import Sheet, make_sheet, score
from ltdi_peft.spec import Adapter
from ltdi_peft.statistics import mean_difference, recovered_gain
from ltdi_peft.summary import interval, number
from ltdi_peft.task import Example, Task

VERSION = 2  # of what a cached line means
# Road with gradient steps → the adapter that it begins at: of the generated ones the best on the examples.
ORIGINS = {"refined": "generated", "lora": "fresh", "lora_from_start": "start"}
METHODS = ("generated", "best_of", *ORIGINS)
READ = "in_condition"  # one more method, of a generator that reads examples beside the prompt
SHOWN = "start_in_context"  # and one of examples that stand in the model's context, solved
# Peak learning rates that are tried: B = 0 has further to go, so its grid lies higher.
RATES = {
    "refined": (1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "lora_from_start": (1e-3, 2e-3, 4e-3, 8e-3),
}
# Candidates of a generator without attributes: seed and guidance scale; None is its own scale, so that the
# first one is the zero-shot adapter. Seeds alone hardly differ.
CANDIDATES = ((0, None), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.25), (5, 1.5), (6, 1.75), (7, 2.0))
CONTEXTS = ("prompt", "no_prompt")


@dataclass(frozen=True)
class FewShot:
    """What stays the same from task to task."""

    bench: Bench
    generator: Generator
    start: Adapter  # of `lora_from_start`: the multi-task start, or the multi-task LoRA
    folder: Path  # of the cached lines
    counts: tuple[int, ...] = (4, 16, 64)  # N
    steps: int = 24  # of every road with gradients
    batch_size: int = 8
    examples: int = 100  # evaluation examples of an unseen task
    in_context: bool = False  # whether the start answers with the examples in its context, too
    validation_examples: int = 32  # of each validation task, to choose learning rates by
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(RATES))

    def __post_init__(self) -> None:
        if set(self.rates) != set(ORIGINS) or not all(self.rates.values()):
            raise ValueError(f"rates are needed for {list(ORIGINS)}, at least one each, got {self.rates}.")
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"counts are numbers of examples, at least one number ≥ 1, got {self.counts}.")


@dataclass(frozen=True)
class Fit:
    """One road with gradient steps: its method, number of examples and learning rate."""

    method: str
    count: int
    rate: float


Made = dict[str, dict[str, Adapter]]  # "<count>/<method>" → context → its adapter


@dataclass(frozen=True)
class Group:
    """Tasks that are trained together: pools of their first examples, and what those chose."""

    pools: list[Pool]
    chosen: list[Made]  # of the methods without gradient steps


def ladder(
    few: FewShot, tasks: Sequence[Task], validation: Sequence[Task], *, progress: bool = True
) -> dict[str, Any]:
    """Accuracy of every method with every number of examples, in both contexts; for a result's "few_shot".

    Raises ValueError, before anything is trained, for a task with fewer training examples than the largest
    count or without evaluation examples, and where rates are to be chosen without validation tasks.
    """
    require_enough(few, tasks)
    chosen = chosen_rates(few, validation, progress=progress)
    fits = {key: Fit(*split_key(key), one["learning_rate"]) for key, one in chosen.items()}
    about = {"ladder": {key: vars(fit) for key, fit in fits.items()}, "examples": few.examples}
    about |= {"candidates": CANDIDATES, "readings": OFFERED}

    def lines(group: list[Task]) -> list[Line]:
        made = ladder_adapters(few, group, fits)
        return [accuracies(few, t, one, few.examples) for t, one in zip(group, made, strict=True)]

    found = lines_of(few, about, tasks, lines, desc="few-shot", progress=progress)
    methods = (*METHODS, READ) if few.generator.config.condition_examples else METHODS
    if few.in_context:
        solved = in_context(few, tasks, progress=progress)
        found = {name: line | solved[name] for name, line in found.items()}
        methods = (*methods, SHOWN)
    return {str(n): {m: method_row(found, f"{n}/{m}", chosen) for m in methods} for n in few.counts}


def in_context(few: FewShot, tasks: Sequence[Task], *, progress: bool) -> dict[str, Line]:
    """Task → accuracy of `few.start` with the examples in its context, solved, for each count."""
    adapted, start = few.bench.adapted, stack_adapters([few.start], few.bench.adapted.device)

    def answered(task: Task, count: int, context: str) -> float:
        prompts = task.held_out_prompts if context == "prompt" else None
        sheet = make_sheet(adapted, task.evaluation[: few.examples], prompts, shots=task.train[:count])
        return round(score(adapted, sheet, start).accuracy.item(), 6)

    def lines(group: list[Task]) -> list[Line]:
        keys = [(f"{count}/{SHOWN}", count) for count in few.counts]
        return [{k: {c: answered(task, n, c) for c in CONTEXTS} for k, n in keys} for task in group]

    about = {"in_context": few.counts, "examples": few.examples}
    return lines_of(few, about, tasks, lines, desc="examples in context", progress=progress)


def with_gains(rungs: dict[str, Any], ends: Mapping[str, Line], *, draws: int, seed: int) -> dict[str, Any]:
    """The ladder's rows with G, and with how far each is over a LoRA trained on the same examples.

    ends: task → accuracy of base and oracle. Prompt in context; 95 % intervals, bootstrapped over tasks.
    """

    def column(row: Mapping[str, Any]) -> Float[Tensor, " task"]:
        return torch.tensor([row["per_task"][name]["accuracy"] for name in ends], dtype=torch.float64)

    names, options = list(ends), {"draws": draws, "seed": seed}
    base, oracle = (
        torch.tensor([line[end]["prompt"] for line in ends.values()], dtype=torch.float64)
        for end in ("base", "oracle")
    )
    found: dict[str, Any] = {}
    for count, rows in rungs.items():
        found[count], lora = {}, column(rows["lora"])
        for method, row in rows.items():
            gain = recovered_gain(column(row), base, oracle, names, **options)
            over = mean_difference(column(row), lora, names, **options)
            about = {"G": number(gain.value), "ci": interval(gain)}
            about |= {"over_lora": number(over.value), "over_lora_ci": interval(over)}
            found[count][method] = row | about
    return found


def require_enough(few: FewShot, tasks: Sequence[Task]) -> None:
    """ValueError for a task that the ladder cannot be climbed on."""
    for task in tasks:
        if len(task.train) < max(few.counts) or not task.evaluation:
            raise ValueError(
                f"task {task.name!r} has {len(task.train)} training and {len(task.evaluation)} evaluation "
                f"examples; the largest of counts={few.counts} must be there. Leave it out, or lower counts."
            )


def split_key(key: str) -> tuple[str, int]:
    """(method, count) of "<count>/<method>"."""
    count, method = key.split("/")
    return method, int(count)


def method_row(found: dict[str, Line], key: str, chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the tasks, each task, and how the learning rate was chosen."""
    rows = {
        name: {"accuracy": line[key]["prompt"], "accuracy_no_prompt": line[key]["no_prompt"]}
        for name, line in found.items()
    }
    means = {
        k: round(statistics.fmean(row[k] for row in rows.values()), 6)
        for k in ("accuracy", "accuracy_no_prompt")
    }
    return means | chosen.get(key, {}) | {"per_task": rows}


# ---- learning rates


def chosen_rates(
    few: FewShot, validation: Sequence[Task], *, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """ "<count>/<method>" → the rate with the best mean accuracy on validation tasks, and the accuracies.

    Prompt in context, the headline column, as guidance is chosen; of equal rates the lowest.
    """
    fits = {f"{n}/{m}/{r}": Fit(m, n, r) for n in few.counts for m in ORIGINS for r in few.rates[m]}
    if len(fits) == len(few.counts) * len(ORIGINS):
        return {key.rpartition("/")[0]: {"learning_rate": fit.rate} for key, fit in fits.items()}
    require_enough(few, validation)

    def lines(group: list[Task]) -> list[Line]:
        made = fit_adapters(few, open_group(few, group, CONTEXTS[:1]), fits)
        options = {"examples": few.validation_examples, "contexts": CONTEXTS[:1]}
        return [accuracies(few, t, one, **options) for t, one in zip(group, made, strict=True)]

    about = {"trials": few.rates, "counts": few.counts, "examples": few.validation_examples}
    found = lines_of(few, about, validation, lines, desc="few-shot rates", progress=progress)
    return {
        f"{n}/{m}": best_rate(found, {r: f"{n}/{m}/{r}" for r in few.rates[m]})
        for n in few.counts
        for m in ORIGINS
    }


def best_rate(found: dict[str, Line], keys: dict[float, str]) -> dict[str, Any]:
    """The learning rate whose lines are best on average (over points too, where a line is a curve)."""
    if not found:
        raise ValueError("there are no validation tasks to choose learning rates by; give one rate a method.")
    accuracy = {
        rate: round(statistics.fmean(mean_of(line[key]["prompt"]) for line in found.values()), 6)
        for rate, key in keys.items()
    }
    best = min(accuracy, key=lambda rate: (-accuracy[rate], rate))
    return {"learning_rate": best, "validation_accuracy": {str(r): value for r, value in accuracy.items()}}


def mean_of(value: float | list[float]) -> float:
    """An accuracy, or the mean of a curve of them."""
    return statistics.fmean(value) if isinstance(value, list) else value


# ---- adapters


def open_group(few: FewShot, tasks: list[Task], contexts: Sequence[str] = CONTEXTS) -> Group:
    """Rows of the first max(counts) training examples, with training paraphrases, and what they choose."""
    most = max(few.counts)
    pools = [example_pool(few.bench.adapted, task.train[:most], task.prompts) for task in tasks]
    return Group(pools, [chosen(few, *one, contexts) for one in zip(tasks, pools, strict=True)])


def chosen(few: FewShot, task: Task, pool: Pool, contexts: Sequence[str]) -> Made:
    """What is generated for each context, and what the examples make of it without gradient steps."""
    made: Made = {}
    for context in contexts:
        offered = candidates(few, task, context)
        for count in few.counts:
            found = {"generated": offered[0]}
            found["best_of"] = best_of(few, offered, first_of(pool, count), context)
            if few.generator.config.condition_examples:
                found[READ] = candidate(few, task, context, *CANDIDATES[0], task.train[:count])
            for method, adapter in found.items():
                made.setdefault(f"{count}/{method}", {})[context] = adapter
    return made


def candidates(few: FewShot, task: Task, context: str) -> list[Adapter]:
    """What examples choose among, the zero-shot adapter first; of the task's first held-out paraphrase."""
    if few.generator.attributes is None:
        return [candidate(few, task, context, *one) for one in CANDIDATES]
    options = {"base": few.bench.base, "prompt_in_context": context == "prompt"}
    made = few.generator.candidates(task.held_out_prompts[0], OFFERED, **options)
    return [one.adapter for one in made]


def candidate(
    few: FewShot,
    task: Task,
    context: str,
    seed: int,
    scale: float | None,
    examples: Sequence[Example] = (),
) -> Adapter:
    """One generated adapter; `examples` are read beside the prompt."""
    options = {"seed": seed, "guidance_scale": scale, "base": few.bench.base}
    options |= {"prompt_in_context": context == "prompt", "examples": [examples] if examples else ()}
    (one,) = few.generator.generate(task.held_out_prompts[:1], **options)
    return one.adapter


def origins(few: FewShot, task: Task) -> dict[str, Adapter]:
    """Where roads begin that saw no examples before."""
    generated = candidate(few, task, "prompt", *CANDIDATES[0])
    return {"generated": generated, "fresh": few.bench.fresh, "start": few.start}


def ladder_adapters(few: FewShot, tasks: list[Task], fits: dict[str, Fit]) -> list[Made]:
    """Per task, every method's adapters."""
    group = open_group(few, tasks)
    made = fit_adapters(few, group, fits)
    return [own | one for own, one in zip(group.chosen, made, strict=True)]


def fit_adapters(few: FewShot, group: Group, fits: dict[str, Fit]) -> list[Made]:
    """Per task, the adapter of every fit, the same in each context. A and B are trained, as `refine` does."""
    device, seed = few.bench.adapted.device, run_seed(few.bench.recipe.seed, 0)
    made: list[Made] = [{} for _ in group.pools]
    for key, fit in fits.items():
        own = [one[f"{fit.count}/best_of"]["prompt"] for one in group.chosen]
        begin = {"generated": own, "fresh": [few.bench.fresh] * len(own), "start": [few.start] * len(own)}
        stacked = stack_adapters(begin[ORIGINS[fit.method]], device)
        pools = [first_of(pool, fit.count) for pool in group.pools]
        config = FitConfig(steps=few.steps, batch_size=few.batch_size, learning_rate=fit.rate)
        for _ in fit_steps(
            few.bench.adapted, stacked, pools, config, seeds=[seed] * len(pools), train_a=True
        ):
            pass
        for index, one in enumerate(made):
            one[key] = in_each(unstack_adapter(stacked, index))
    return made


def in_each(adapter: Adapter) -> dict[str, Adapter]:
    """The same one in every context."""
    return dict.fromkeys(CONTEXTS, adapter)


def first_of(pool: Pool, count: int) -> Pool:
    """The rows of the first `count` examples, with and without a prompt."""
    kept = (*pool.prompted[:count], *pool.plain[:count])
    prompted = tuple(range(len(pool.prompted[:count])))
    plain = tuple(range(len(prompted), len(kept)))
    return Pool(tuple(pool.rows[i] for i in kept), tuple(pool.inputs[i] for i in kept), prompted, plain)


def best_of(few: FewShot, offered: Sequence[Adapter], pool: Pool, context: str) -> Adapter:
    """The candidate with the least mean loss on the pool's rows of this context."""
    places = pool.prompted if context == "prompt" else pool.plain
    rows, inputs = tuple(pool.rows[i] for i in places), tuple(pool.inputs[i] for i in places)
    sheet = Sheet(rows, inputs, tuple(range(len(rows))), (True,) * len(rows))
    stacked = stack_adapters(offered, few.bench.adapted.device)
    return offered[int(score(few.bench.adapted, sheet, stacked).loss.mean(1).argmin())]


def accuracies(
    few: FewShot, task: Task, made: Made, examples: int, contexts: Sequence[str] = CONTEXTS
) -> Line:
    """Accuracy of every adapter on the task's evaluation examples; one under two keys is scored once."""
    adapted = few.bench.adapted
    line: Line = {key: {} for key in made}
    for context in contexts:
        distinct = {id(own[context]): own[context] for own in made.values()}
        stacked = stack_adapters(list(distinct.values()), adapted.device)
        prompts = task.held_out_prompts if context == "prompt" else None
        values = score(adapted, make_sheet(adapted, task.evaluation[:examples], prompts), stacked).accuracy
        found = dict(zip(distinct, values.tolist(), strict=True))
        for key, own in made.items():
            line[key][context] = round(found[id(own[context])], 6)
    return line


def digest(few: FewShot, about: dict[str, Any]) -> str:
    """16 hex digits of all that a line depends on, but its task."""
    bench = few.bench
    same = {
        "version": VERSION,
        "base": [bench.base.spec_fingerprint, bench.base.weights_fingerprint, bench.spec.to_dict()],
        "generator": generator_digest(few.generator),
        "adapters": [adapter_digest(bench.fresh), adapter_digest(few.start)],
        "fit": [few.steps, few.batch_size, bench.recipe.seed],
    }
    return hashed(same | about)


def lines_of(
    few: FewShot,
    about: dict[str, Any],
    tasks: Sequence[Task],
    make: Callable[[list[Task]], list[Line]],
    *,
    keys: dict[str, str] | None = None,
    desc: str,
    progress: bool,
) -> dict[str, Line]:
    """Task → its line, made or kept; `about` is what the lines depend on beside few and task."""
    file = few.folder / f"few_shot-{digest(few, about)}.jsonl"
    keys = keys or {task.name: hashed(task.to_dict()) for task in tasks}
    together = few.bench.recipe.collect.together
    return kept_lines(file, tasks, keys, make, together=together, desc=desc, progress=progress)
