"""Preparation: one recorded LoRA per task and seed, all from one shared start.

In: a recipe.  Out: `<output>/start` (the shared start), `<output>/trajectories` (training tasks) and
`<output>/held_out` (oracles of validation and unseen tasks, in a store of their own).
Idea: from one start adapters live in one frame, and from the multi-task adapter each task's own run is short.
Tasks are trained together, one forward pass for a group; random numbers belong to the number of the run, so
that the grouping changes nothing but the rounding.
Resumable: a finished run is never done again, an unfinished one is started anew under another run id.
"""

import hashlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ltdi_peft.adapter import fresh_adapter, load_adapter_folder, require_base, save_adapter_folder
from ltdi_peft.base import Base, load_base, require_causal
from ltdi_peft.batched import AdaptedBase, stack_adapters, unstack_adapter
from ltdi_peft.config import FitConfig, Recipe, as_recipe, to_dict
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.fit import FitState, Pool, fit_steps, joined, make_plain_pool, make_pool
from ltdi_peft.fit_point import EVERY, POINT_FILE, FitPoint
from ltdi_peft.launch import on_cpu
from ltdi_peft.recording import Schedule
from ltdi_peft.spec import Adapter, AdapterSpec
from ltdi_peft.store import RunWriter, TrajectoryStore
from ltdi_peft.strict import differing
from ltdi_peft.task import Task, TaskSuite, load_suite
from ltdi_peft.trajectory import recorded_adapter

LOWER_FOLDER = "lower"  # kept activations below the first adapted layer
HELD_OUT = ("validation", "unseen_tasks", "unseen_domains")
SETTINGS_FILE, TIMINGS_FILE, MEMORY_FILE = "collect.json", "timings.json", "memory.json"
# More seeds, larger groups or more tasks add runs; anything else would mix two kinds of run in one store.
FREE = ("seeds", "together", "keep_lower")
# The main process trains the shared start while the others wait; ten minutes, NCCL's own limit, may be too
# short.
PATIENCE = timedelta(hours=24)

Job = tuple[Task, int]  # a task and the number of its run


@dataclass
class Bench:
    """A base model with the adapter of one recipe laid out on it, and the pools of rows made so far."""

    recipe: Recipe
    suite: TaskSuite
    base: Base
    spec: AdapterSpec
    fresh: Adapter
    pools: dict[str, Pool]
    plain_pools: dict[str, Pool] = field(default_factory=dict)

    @cached_property
    def adapted(self) -> AdaptedBase:
        """The base model, cut at the first use. ValueError for one that is no causal language model."""
        return AdaptedBase(self.base, self.spec.sites)

    def pool(self, task: Task) -> Pool:
        """The task's training rows, made at the first call."""
        if task.name not in self.pools:
            rows = self.recipe.collect.rows
            self.pools[task.name] = make_pool(self.adapted, task, rows, keep=self.lower_folder)
        return self.pools[task.name]

    def plain_pool(self, task: Task) -> Pool:
        """As many rows, none with a prompt; for who never asks for `pool`."""
        if task.name not in self.plain_pools:
            rows = self.recipe.collect.rows
            self.plain_pools[task.name] = make_plain_pool(self.adapted, task, rows, keep=self.lower_folder)
        return self.plain_pools[task.name]

    @property
    def lower_folder(self) -> Path | None:
        """Where lower activations are kept; None where they are not."""
        return self.recipe.folder / LOWER_FOLDER if self.recipe.collect.keep_lower else None


def open_bench(
    recipe: Recipe, *, base: Base | None = None, device: torch.device | str | None = None
) -> Bench:
    """Load suite and base model, and lay out the recipe's adapter on it. A given `base` is left as it is.

    device: of the base model; None is Accelerate's, the accelerator of this machine if it has one.
    """
    suite = recipe_suite(recipe)
    device = device or PartialState().device or "cpu"
    if base is None:
        about = recipe.base
        options = {"dtype": about.dtype, "load_in_4bit": about.load_in_4bit, "revision": about.revision}
        base = load_base(about.model, device=device, **options)
        if base.model.device.type == "cpu":
            # Rows are some 30 tokens: at that length blockwise attention is slower than plain products.
            base.model.set_attn_implementation("eager")
    return lay_out(recipe, suite, base)


def lay_out(recipe: Recipe, suite: TaskSuite, base: Base) -> Bench:
    """A bench for the recipe's adapter on a loaded base model, which is left as it is."""
    adapter = recipe.adapter
    if recipe.collect.start == "recorded":
        runs = TrajectoryStore(recipe.store_folder, create=False).trajectories()
        spec, fresh = recorded_adapter(runs, base.name)
        require_base(base.model, spec)
        return Bench(recipe, suite, base, spec, fresh, {})
    require_causal(base.model)
    spec, fresh = fresh_adapter(
        base.model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        top_layers=adapter.layers,
        seed=recipe.seed,
    )
    return Bench(recipe, suite, base, spec, fresh, {})


def recipe_suite(recipe: Recipe) -> TaskSuite:
    """The recipe's tasks, cut to the domains and numbers it asks for."""
    about = recipe.suite
    suite = load_suite(about.source, about.split_file, about.wordings)
    suite = suite if about.fold is None else suite.fold(about.fold)
    suite = suite.only(about.domains, about.match)
    counts = {
        "train": about.train,
        "validation": about.validation,
        "unseen_tasks": about.unseen_tasks,
        "unseen_domains": about.unseen_domains,
    }
    return suite.parts(**{name: count for name, count in counts.items() if count is not None})


def collect(
    recipe: Recipe | str | Path, *, bench: Bench | None = None, progress: bool = True
) -> TrajectoryStore:
    """Train and record what is missing; return the store of the training tasks.

    `recipe`: a YAML file or a `Recipe`. `bench`: suite and base model, if loaded already.
    Under `accelerate launch` the runs are split over the processes; the shared start is trained by the main
    one. Raises ValueError, before the base model is loaded, for a suite that cannot be trained on and for an
    `output` that holds runs of other settings.
    """
    recipe = as_recipe(recipe)
    state = PartialState(cpu=on_cpu(), timeout=PATIENCE)
    suite = bench.suite if bench else recipe_suite(recipe)
    require_examples(suite)
    if recipe.collect.start == "recorded":
        raise ValueError(
            "collect.start is 'recorded': the runs come from elsewhere, and there is nothing to collect. "
            "Name another start, or go on with `ltdi train`."
        )
    if given := recipe.collect.start_folder:
        load_adapter_folder(given)  # whether it fits is known later; whether it is there, now
    require_same_settings(recipe, write=state.is_main_process)
    state.wait_for_everyone()
    with timed(recipe.folder, "collect", write=state.is_main_process):
        if bench is None:
            with state.main_process_first():  # a model that is not in the cache yet is converted once
                bench = open_bench(recipe, device=str(state.device))
        if state.is_main_process:
            shared_start(bench, progress=progress)
        state.wait_for_everyone()
        start = shared_start(bench, progress=False)
        store, held_out = TrajectoryStore(recipe.store_folder), TrajectoryStore(recipe.held_out_folder)
        jobs = [(task, seed) for task in suite.split("train") for seed in range(recipe.collect.seeds)]
        record_jobs(bench, store, start, jobs, "training tasks", progress)
        jobs = [(task, 0) for split in HELD_OUT for task in suite.split(split)]
        record_jobs(bench, held_out, start, jobs, "held-out tasks", progress)
        state.wait_for_everyone()
    return store


def require_examples(suite: TaskSuite) -> None:
    """ValueError for a suite without training tasks, or with a task that has nothing to train on."""
    if not suite.split("train"):
        raise ValueError(f"suite {suite.name!r} has no training tasks; set suite.train above 0.")
    if without := [task.name for task in suite.tasks.values() if not task.train]:
        raise ValueError(
            f"{len(without)} tasks of suite {suite.name!r} have no training examples, first {without[0]!r}; "
            f"collecting needs them. Give them examples, or leave them out by a split file."
        )


def require_same_settings(recipe: Recipe, *, write: bool = True) -> None:
    """Refuse an `output` whose runs were collected with other settings; note the settings of a new one."""
    about = {key: to_dict(recipe)[key] for key in ("seed", "base", "adapter", "collect")}
    about["collect"] = {key: value for key, value in about["collect"].items() if key not in FREE}
    file = recipe.folder / SETTINGS_FILE
    if not file.is_file():
        if write:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, json_bytes(about))
        return
    if changed := differing(read_json(file), json.loads(json.dumps(about))):
        raise ValueError(
            f"{recipe.folder} holds runs that were collected with other {changed} (see {file}). Give this "
            f"recipe another `output`, or remove the folder."
        )


@contextmanager
def timed(folder: Path, stage: str, *, write: bool = True) -> Iterator[None]:
    """Add the block's seconds to `timings.json`, which the cost table reads; an interrupted stage adds up.

    The process's peak memory goes to `memory.json`, in MB.
    """
    began = time.perf_counter()
    files = (folder / TIMINGS_FILE, folder / MEMORY_FILE)
    # Read before the work: a damaged file must not cost it.
    seconds, peaks = (read_json(file) if write and file.is_file() else {} for file in files)
    try:
        yield
    finally:
        if write:
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - began, 1)
            # Kilobytes on Linux; of the whole process up to here, so a stage run apart is the stage's own.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            peaks[stage] = max(peak, peaks.get(stage, 0))
            for file, table in zip(files, (seconds, peaks), strict=True):
                replace_file(file, json_bytes(dict(sorted(table.items()))))


def shared_start(bench: Bench, *, progress: bool = True) -> Adapter:
    """The adapter that every run starts from: fresh, given, or trained on all training tasks, in `start/`.

    Raises BrokenAdapterError or SpecMismatchError for a given one that cannot be read or is of another spec.
    """
    if given := bench.recipe.collect.start_folder:
        return load_adapter_folder(given, expected=bench.spec)[1]
    if bench.recipe.collect.start != "multi_task":
        return bench.fresh
    folder = bench.recipe.folder / "start"
    # The configuration is written last: a folder without it is what a killed process left.
    if not (folder / "adapter_config.json").is_file():
        tasks = tqdm(bench.suite.split("train"), desc="lower layers", disable=not progress, unit="task")
        pools = [bench.pool(task) for task in tasks]
        config = bench.recipe.collect.multi_task
        # What else it depends on must not change between two collections (`require_same_settings`).
        plan = {"fit": to_dict(config), "seed": bench.recipe.seed}
        plan["tasks"] = [task.name for task in bench.suite.split("train")]
        point = FitPoint(folder / POINT_FILE, plan)
        adapter = multi_task_fit(bench, joined(pools), config, point, progress=progress)
        save_adapter_folder(folder, bench.spec, adapter, overwrite=True)
        point.remove()
    return load_adapter_folder(folder, expected=bench.spec)[1]


def multi_task_fit(
    bench: Bench, pool: Pool, config: FitConfig, point: FitPoint, *, progress: bool = True
) -> Adapter:
    """One LoRA on all training tasks, A and B trained, from the fresh adapter; goes on from `point`."""
    stacked, state = stack_adapters([bench.fresh], bench.adapted.device), FitState()
    point.load(state, stacked)
    seeds = [bench.recipe.seed]
    steps = fit_steps(bench.adapted, stacked, [pool], config, seeds=seeds, train_a=True, state=state)
    bar = tqdm(
        steps,
        initial=state.step,
        total=config.steps,
        desc="multi-task adapter",
        disable=not progress,
        unit="step",
    )
    for step in bar:
        if step.index % EVERY == 0:
            point.save(state, stacked, {}, [])
        if step.index % 20 == 0:
            bar.set_postfix(loss=f"{step.loss.item():.3f}")
    return unstack_adapter(stacked, 0)


def record_jobs(
    bench: Bench, store: TrajectoryStore, start: Adapter, jobs: Sequence[Job], what: str, progress: bool
) -> None:
    """Record this process's share of the jobs that the store does not hold finished."""
    state, together = PartialState(), bench.recipe.collect.together
    done = {(run.task.name, run.seed) for run in store.trajectories()}
    missing = [job for job in jobs if (job[0].name, job[1]) not in done]
    # All have to read the store before one adds to it, or they would not share out the same list.
    state.wait_for_everyone()
    first, after = (
        len(missing) * i // state.num_processes for i in (state.process_index, state.process_index + 1)
    )
    own = missing[first:after]
    with tqdm(total=len(own), desc=what, disable=not progress or not own, unit="run") as bar:
        for place in range(0, len(own), together):
            group = own[place : place + together]
            record_group(bench, store, start, group)
            bar.update(len(group))
            wanted = {task.name for task, _ in own[place + together :]}
            for task, _ in group:  # kept activations of a task are some MB: let go what is recorded
                if task.name not in wanted:
                    bench.pools.pop(task.name, None)


def record_group(bench: Bench, store: TrajectoryStore, start: Adapter, group: Sequence[Job]) -> None:
    """Train a group's adapters in one forward pass a step, each recorded as a run of its own."""
    collect = bench.recipe.collect
    config, train_a = collect.single, collect.gauge != "shared_a"
    stacked = stack_adapters([start] * len(group), bench.adapted.device)
    pools = [bench.pool(task) for task, _ in group]
    seeds = [run_seed(bench.recipe.seed, seed) for _, seed in group]
    schedule = Schedule.equal_parts(collect.equal_parts)
    frozen = () if train_a else tuple(f"{site.name}.lora_A" for site in bench.spec.sites)
    about = {"planned_steps": config.steps, "frozen": frozen, "dtype": collect.snapshot_dtype, "start": start}
    writers = [store.start_run(bench.spec, task, seed=seed, **about) for task, seed in group]
    with interrupted_if_left(writers):
        for step in fit_steps(bench.adapted, stacked, pools, config, seeds=seeds, train_a=train_a):
            if schedule.keeps(step.index, config.steps):
                for index, writer in enumerate(writers):
                    adapter, loss = unstack_adapter(stacked, index), step.loss[index].item()
                    writer.write(step.index, adapter, loss=loss, learning_rate=step.learning_rate)
        for writer in writers:
            writer.finish(config.steps)


@contextmanager
def interrupted_if_left(writers: Sequence[RunWriter]) -> Iterator[None]:
    """Runs cut short by an error or Ctrl-C say so in their manifest; after kill -9 they stay "recording"."""
    try:
        yield
    except BaseException as error:
        for writer in (one for one in writers if not one.finished):
            try:
                writer.interrupt(repr(error))
            except OSError as failed:
                error.add_note(f"{writer.path} could not be marked as interrupted: {failed}")
        raise


def run_seed(recipe_seed: int, seed: int) -> int:
    """The seed of every task's run number `seed`, the same in every process and Python.

    One for all tasks: where tasks share their inputs they then draw the same ones in the same order, and the
    noise of the draws is common to their adapters instead of hiding how these differ.
    """
    digest = hashlib.sha256(f"{recipe_seed}/{seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
