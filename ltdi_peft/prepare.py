"""From stored trajectories to what the network sees: codec, tokens, conditions, centre, round-trip gate.

In: a recipe whose trajectories are collected, or encoded in a file (`train.encoded`).  Out: `Prepared`.
Idea: everything that is fitted is fitted on training tasks only; what a training task gets as its centre
comes from a fit that left it out, so what the network learns to add is what it will have to add on unseen
tasks.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import INTERCEPT, Ridge, choose_strength, fit_task_ridge, left_out_mixture
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import DiffusionConfig, Recipe
from ltdi_peft.encode import FORMAT_VERSION as CODEC_VERSION
from ltdi_peft.encode import AdapterCodec, round_trip
from ltdi_peft.encoded import Encoded, Runs, recipe_encoded
from ltdi_peft.files import replace_file
from ltdi_peft.kept import hashed
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import Sites, require_same_spec, site_norms
from ltdi_peft.store import Trajectory, TrajectoryStore
from ltdi_peft.task import Example, Task, TaskSuite

EXAMPLE_POOL = 32  # first training examples of a task that its conditions are drawn from


@dataclass(frozen=True)
class TrainingSet:
    """Local targets and conditions of the training tasks."""

    names: tuple[str, ...]
    tokens: Float[Tensor, "run k site width"]  # encoded local targets, the last = final weights
    task: Int[Tensor, " run"]  # index into names
    conditions: Float[Tensor, "task prompt condition"]  # training paraphrases, then those beside examples
    evidence: int = 0  # numbers of a condition that are of examples, its last

    @property
    def prompt_conditions(self) -> Float[Tensor, "task prompt said"]:
        """What the prompts alone make of a condition."""
        if not self.evidence:
            return self.conditions
        return self.conditions[:, : self.conditions.shape[1] // 2, : -self.evidence]

    @property
    def task_means(self) -> Float[Tensor, "task k site width"]:
        """Mean over the runs of each task."""
        return torch.stack([self.tokens[self.task == index].mean(0) for index in range(len(self.names))])


@dataclass(frozen=True)
class Centre:
    """What the chain is centred on, for training tasks (left out) and, as a linear map, for new prompts."""

    mixture: Float[Tensor, "task prompt task"]  # a training task's centre as a mixture of the others' targets
    targets: Float[Tensor, "task k site width"]
    weight: Float[Tensor, "input feature"]  # of a `centre.Ridge` from condition to all k targets
    mean: Float[Tensor, "k site width"]
    spread: float  # root mean square of the training residuals
    strength: float | None  # ridge strength; None for the mean

    def training(
        self, task: Int[Tensor, " row"], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, "row k site width"]:
        """The centre of training tasks, each predicted from one of its paraphrases by the fit without it."""
        mixed = self.mixture[task, prompt] @ self.targets.flatten(1)
        return mixed.view(-1, *self.targets.shape[1:])

    @property
    def last_weight(self) -> Float[Tensor, "input feature"]:
        """The map to the last local target alone: what generation needs."""
        return self.weight.view(len(self.weight), len(self.mean), -1)[:, -1].contiguous()

    def predict(self, conditions: Float[Tensor, "row condition"]) -> Float[Tensor, "row k site width"]:
        """The full fit at new conditions, for all k targets."""
        return Ridge(self.weight)(conditions).view(-1, *self.mean.shape)


@dataclass(frozen=True)
class Prepared:
    """All that training needs beside the network."""

    codec: AdapterCodec
    data: TrainingSet
    centre: Centre
    norm_range: dict[str, tuple[float, float]]


def training_trajectories(recipe: Recipe, task_names: Sequence[str]) -> list[Trajectory]:
    """Finished runs of the training tasks, in one frame. ValueError when fewer than two tasks have any."""
    store = TrajectoryStore(recipe.store_folder)
    runs = [run for run in store.trajectories() if run.task.name in set(task_names)]
    tasks = {run.task.name for run in runs}
    if len(tasks) < 2:
        raise ValueError(
            f"{recipe.store_folder} holds finished runs of {len(tasks)} training tasks of this recipe, at "
            f"least 2 are needed. Run `ltdi collect` with the same recipe first, or record your own runs "
            f"there."
        )
    require_one_frame(runs, recipe)
    return runs


def require_one_frame(runs: Sequence[Trajectory], recipe: Recipe) -> None:
    """All of one spec, and from one start unless the gauge forgets it; else ValueError names the odd run."""
    for run in runs[1:]:
        require_same_spec(runs[0].spec, run.spec, str(run.path))
        if recipe.collect.gauge != "canonical" and run.start_path.name != runs[0].start_path.name:
            raise ValueError(
                f"{run.path} starts from {run.start_path.name}, {runs[0].path} from "
                f"{runs[0].start_path.name}: in gauge {recipe.collect.gauge!r} all runs need one start. Use "
                f"collect.gauge: canonical, or a store for each start."
            )


def fit_codec(recipe: Recipe, runs: Sequence[Trajectory], *, progress: bool = False) -> AdapterCodec:
    """The codec of all snapshots of these runs, kept in `cache/` by a digest of what it was fitted on.

    Of all, not only of the local targets: more directions cost nothing, and what lies outside them is lost.
    """

    def stream() -> Iterator[Sites]:
        for run in runs:
            for snapshot in run.snapshots:
                yield run.mapped(snapshot)

    file = cache_file(recipe, runs, "codec")
    if not file.exists():
        gauge = recipe.collect.gauge
        codec = AdapterCodec.fit(
            stream,
            runs[0].spec,
            None if gauge == "canonical" else runs[0].start(),
            gauge=gauge,
            width=recipe.codec.width,
            basis_dtype=recipe.codec.dtype,
            progress=progress,
        )
        codec.save(file)
    return AdapterCodec.load(file)


def cache_file(recipe: Recipe, runs: Sequence[Trajectory], what: str) -> Path:
    """A file under the run's `cache/` whose name changes with the runs, the codec's choices and k."""
    about = {
        # The losses, all their digits, tell two runs of one name apart.
        "runs": [
            (run.run_id, run.start_path.name, [(s.step, s.loss) for s in run.snapshots]) for run in runs
        ],
        "codec": [recipe.codec.width, recipe.codec.dtype, CODEC_VERSION],
        "gauge": recipe.collect.gauge,
        "k": recipe.diffusion.k,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = recipe.folder / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{what}-{digest}.safetensors"


def encode_targets(
    recipe: Recipe, codec: AdapterCodec, runs: Sequence[Trajectory]
) -> Float[Tensor, "run k site width"]:
    """Tokens of every local target of every run, cached beside the codec."""
    file = cache_file(recipe, runs, "tokens")
    if not file.exists():
        replace_file(file, save({"tokens": encoded_targets(codec, runs, recipe.diffusion.k)}))
    return load_file(file)["tokens"]


def encoded_targets(
    codec: AdapterCodec, runs: Sequence[Trajectory], k: int
) -> Float[Tensor, "run k site width"]:
    """Tokens of the k local targets of every run."""
    tokens = codec.encode_many(run.mapped(s) for run in runs for s in run.local_targets(k))
    return tokens.view(len(runs), k, *tokens.shape[1:])


def encoded_runs(recipe: Recipe, runs: Sequence[Trajectory], *, progress: bool = False) -> Encoded:
    """Codec and tokens of the training runs, and what else of them the training reads."""
    codec = fit_codec(recipe, runs, progress=progress)
    own = runs_with(encode_targets(recipe, codec, runs), runs)
    tasks = {run.task.name: run.task for run in runs}
    return Encoded(codec, own, runs_with(own.tokens[:0], ()), tasks, norm_range(runs))


def runs_with(tokens: Float[Tensor, "run k site width"], runs: Sequence[Trajectory]) -> Runs:
    """Encoded runs, from their tokens."""
    return Runs(tokens, tuple(run.task.name for run in runs), tuple(run.seed for run in runs))


def training_set(
    encoded: Encoded,
    encoder: PromptEncoder,
    suite: TaskSuite,
    *,
    keep: Path | None = None,
    progress: bool = False,
) -> TrainingSet:
    """Tokens, and conditions of the suite's prompts: a run does not care how its task is asked for later.

    A task with fewer paraphrases than another has some of its own twice. Where the encoder reads examples,
    there is a second condition of each prompt, with examples beside it. keep: a folder to keep conditions in.
    """
    runs, names = encoded.runs, tuple(sorted(set(encoded.runs.tasks)))
    tasks = [suite[name] for name in names]
    conditions = prompt_conditions(encoder, tasks, keep=keep, progress=progress)
    task = torch.tensor([names.index(name) for name in runs.tasks])
    return TrainingSet(names, runs.tokens, task, conditions, encoder.evidence_width)


def prompt_conditions(
    encoder: PromptEncoder, tasks: Sequence[Task], *, keep: Path | None = None, progress: bool = False
) -> Float[Tensor, "task prompt condition"]:
    """Of as many prompts as a task has at most. What is kept is from before any attributes are told."""
    plain, count = encoder.with_attributes(None), max(len(task.prompts) for task in tasks)
    conditions = all_conditions(plain, tasks, count, keep, progress=progress)
    return encoder.attributes(conditions) if encoder.attributes else conditions


def all_conditions(
    encoder: PromptEncoder, tasks: Sequence[Task], count: int, keep: Path | None, *, progress: bool
) -> Float[Tensor, "task prompt condition"]:
    """`task_conditions` of every task; with `keep` bit for bit what was computed first.

    Tens of thousands of prompts take minutes on a CPU, and a training that goes on needs the same bits.
    """
    if keep is None:
        bar = tqdm(tasks, desc="prompts", unit="task", disable=not progress)
        return torch.stack([task_conditions(encoder, task, count) for task in bar])
    texts = [[task.name, list(task.prompts)] for task in tasks]
    if encoder.examples:
        texts += [[asdict(example) for example in task.train[:EXAMPLE_POOL]] for task in tasks]
    about = {"encoder": encoder.identity(), "count": count, "texts": texts}
    file = keep / f"conditions-{hashed(about)}.safetensors"
    if not file.is_file():
        keep.mkdir(parents=True, exist_ok=True)
        found = all_conditions(encoder, tasks, count, None, progress=progress)
        replace_file(file, save({"conditions": found}))
    return load_file(file)["conditions"]


def task_conditions(encoder: PromptEncoder, task: Task, count: int) -> Float[Tensor, "prompt condition"]:
    """Of `count` training prompts, some twice if there are fewer; then of each beside examples, if read.

    Raises ValueError for a task without training examples where the encoder reads them.
    """
    turns = torch.arange(count) % len(task.prompts)
    alone = encoder(task.prompts)[turns]
    if not encoder.examples:
        return alone
    drawn = [drawn_examples(task, index, encoder.examples) for index in range(count)]
    return torch.cat([alone, encoder([task.prompts[turn] for turn in turns], drawn)])


def drawn_examples(task: Task, index: int, most: int) -> list[Example]:
    """1 … `most` of the task's first training examples; depends on its name and `index` alone."""
    if not task.train:
        raise ValueError(
            f"condition.examples is {most}, but task {task.name!r} has no training examples. Give it some, "
            f"or set condition.examples: 0."
        )
    rng, pool = random.Random(f"{task.name}/{index}"), task.train[:EXAMPLE_POOL]
    return rng.sample(pool, min(rng.randint(1, most), len(pool)))


def fit_centre(data: TrainingSet, config: DiffusionConfig) -> Centre:
    """The mean adapter per local target, or the cross-fitted ridge (strength by leave-one-task-out error)."""
    targets = data.task_means
    tasks, prompts, width = data.conditions.shape
    mean = targets.mean(0)
    if config.centre == "mean":
        mixture = torch.full((tasks, prompts, tasks), 1 / tasks)
        weight = torch.zeros(width + 1, mean.numel())
        weight[-1] = mean.flatten() / INTERCEPT
        strength = None
    else:
        strength = config.ridge or choose_strength(data.conditions, targets.flatten(1))
        mixture = left_out_mixture(data.conditions, strength)
        weight = fit_task_ridge(data.conditions, targets.flatten(1), strength).weight
    centres = (mixture.mean(1) @ targets.flatten(1)).view_as(targets)
    spread = (data.tokens - centres[data.task]).square().mean().sqrt().clamp_min(1e-8).item()
    return Centre(mixture, targets, weight, mean, spread, strength)


def norm_range(runs: Sequence[Trajectory]) -> dict[str, tuple[float, float]]:
    """Least and largest ‖ΔW‖ of each site over the final adapters."""
    return least_and_largest([site_norms(run.spec, run.adapter(run.snapshots[-1])) for run in runs])


def least_and_largest(norms: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each site, over adapters."""
    return {site: (min(n[site] for n in norms), max(n[site] for n in norms)) for site in norms[0]}


def prepare(recipe: Recipe, encoder: PromptEncoder, suite: TaskSuite, *, progress: bool = False) -> Prepared:
    """Codec, tokens, conditions and centre of the training runs, from the store or from `train.encoded`."""
    encoded = encoded_of(recipe, suite, progress=progress)
    data = training_set(encoded, encoder, suite, keep=recipe.folder / "cache", progress=progress)
    return Prepared(encoded.codec, data, fit_centre(data, recipe.diffusion), encoded.norm_range)


def encoded_of(recipe: Recipe, suite: TaskSuite, *, progress: bool = False) -> Encoded:
    """The training runs encoded: as `train.encoded` holds them, or from the store."""
    names = [task.name for task in suite.split("train")]
    if recipe.train.encoded:
        return recipe_encoded(recipe, names)
    return encoded_runs(recipe, training_trajectories(recipe, names), progress=progress)


class GateError(ValueError):
    """The codec loses more than codec.gate allows; the message has the numbers."""


@dataclass(frozen=True)
class Gate:
    """Mean accuracy of validation adapters before and after the codec, and of base and start."""

    base: float
    start: float
    before: float
    after: float

    @property
    def kept(self) -> float:
        """Share of the gain over the base model that survives; 0 where there is no gain to keep."""
        gain = self.before - self.base
        return (self.after - self.base) / gain if gain > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """The figures and `kept`."""
        return {**asdict(self), "kept": self.kept}


def round_trip_gate(
    bench: Bench, codec: AdapterCodec, held_out: Sequence[Trajectory], examples: int = 48
) -> Gate:
    """Score validation adapters, which the codec never saw, before and after it, prompt in context.

    Raises ValueError without any validation run that can be scored.
    """
    scored = [run for run in held_out if bench.suite[run.task.name].evaluation]
    if not scored:
        raise ValueError(
            "the round-trip gate needs runs of validation tasks with evaluation examples, and there are "
            "none. Run `ltdi collect` with the same recipe, or set codec.gate: 0 to train without it."
        )
    rows = []
    for run in scored:
        task = bench.suite[run.task.name]
        sheet = make_sheet(bench.adapted, task.evaluation[:examples], task.held_out_prompts)
        adapter = run.adapter(run.snapshots[-1])
        candidates = [bench.fresh, run.start(), adapter, round_trip(codec, adapter)]
        rows.append(score(bench.adapted, sheet, stack_adapters(candidates, bench.adapted.device)).accuracy)
    return Gate(*torch.stack(rows).mean(0).tolist())


def require_kept(gate: Gate, least: float, codec: AdapterCodec) -> None:
    """GateError with the numbers when less than `least` of the gain is kept.

    Nothing generated could be better than what the codec lets through.
    """
    if gate.kept < least:
        raise GateError(
            f"the codec keeps {gate.kept:.3f} of the accuracy gain of validation adapters "
            f"({gate.before:.3f} before, {gate.after:.3f} after, start {gate.start:.3f}, base "
            f"{gate.base:.3f}), codec.gate asks for {least}. Raise codec.width (now {codec.width}), collect "
            f"more tasks, or train the runs for longer."
        )
