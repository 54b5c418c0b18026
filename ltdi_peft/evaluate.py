"""The protocol: every method on the same unseen tasks, examples and prompts (EVALUATION).

In: a recipe whose runs are collected and whose generator is trained.
Out: `docs/results/<recipe>.json` and `.md`.
Idea: rivals and variants are made from the same runs and chosen on the same validation tasks as ours; seconds
are measured by the same program that scores, so a result needs no number from elsewhere.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ltdi_peft.base import require_causal
from ltdi_peft.baselines import (
    NearestTask,
    RidgeRival,
    fit_ridge_rival,
    mean_adapter,
    tensor_digest,
    timings,
    with_best_guidance,
)
from ltdi_peft.cards import scores_of
from ltdi_peft.collect import Bench, open_bench, recipe_suite, shared_start, timed
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe, as_recipe
from ltdi_peft.cost import costs, fine_tunes, seconds_to_generate
from ltdi_peft.figures import write_figures
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.flops import count_flops
from ltdi_peft.generator import EVALUATION_FILE, Generator, load_generator
from ltdi_peft.guidance import Guidance, validation_prompts
from ltdi_peft.memorisation import between_stored
from ltdi_peft.multi_task import (
    train_format_only,
    train_multi_task_lora,
    train_wide_multi_task_lora,
    validation_tasks,
    widened,
)
from ltdi_peft.origin import has_origin, recipe_origin
from ltdi_peft.prepare import TrainingSet, prepare, training_trajectories
from ltdi_peft.protocol import METHODS, SHOTS, Protocol, digest, score_tasks
from ltdi_peft.report import markdown
from ltdi_peft.report import table as table
from ltdi_peft.score import pick_shots
from ltdi_peft.sections import sections
from ltdi_peft.spec import moved, require_same_spec
from ltdi_peft.store import Trajectory, TrajectoryStore
from ltdi_peft.summary import CONTEXTS, UNSEEN, TaskScores, summarise
from ltdi_peft.t2l import FOLDERS, T2LRival, train_t2l
from ltdi_peft.task import TaskSuite
from ltdi_peft.train import recipe_encoder, validation_runs
from ltdi_peft.variants import VARIANTS, train_variant, variant_trials

# One LoRA for all tasks, each trained on its own bench.
MULTI_TASK = {
    "format_only": train_format_only,
    "multi_task_lora": train_multi_task_lora,
    "multi_task_lora_4x": train_wide_multi_task_lora,
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "ltdi_peft")


def evaluate(
    recipe: Recipe | str | Path,
    *,
    bench: Bench | None = None,
    generator: Generator | None = None,
    results: Path = Path("docs/results"),
    progress: bool = True,
) -> dict[str, Any]:
    """Score the recipe's methods on its unseen tasks; write and return the result (docs/formats.md).

    `recipe`: a YAML file or a `Recipe`. `bench`: suite and base model, if loaded already.

    Writes `<results>/<recipe.name>.json` and `.md`, and the figures it has data for into the folder
    `<results>/<recipe.name>`; without matplotlib a warning (UserWarning) says how to get them. The generator
    defaults to `<output>/generator`; what the rivals need is trained on the way and kept there too. Raises,
    before any model is loaded, ValueError for an unknown method or unseen tasks without their own run (`ltdi
    collect`), and FileNotFoundError when there is no generator (`ltdi train`).
    """
    recipe = as_recipe(recipe)
    methods = chosen_methods(recipe)
    suite = bench.suite if bench else recipe_suite(recipe)
    oracles = held_out_oracles(recipe, suite)
    for name in oracles:  # a task with too few examples for the context is found before anything is trained
        pick_shots(suite[name], max(SHOTS.get(method, 0) for method in methods))
    own = generator is None
    generator = generator or load_generator(recipe.generator_folder)
    bench = replace(bench or open_bench(recipe, device=str(PartialState().device)), recipe=recipe)
    require_causal(bench.base.model)
    with timed(recipe.folder, "evaluate"):
        protocol = open_protocol(recipe, bench, generator, methods, oracles, progress=progress)
        scores = score_tasks(protocol, progress=progress)
        measured = measure_once(protocol, scores)
    result = header(bench, protocol.trials)
    result |= summarise(scores, draws=recipe.evaluate.bootstrap, seed=recipe.seed)
    result["controls"]["memorisation"] |= measured["memorisation"]
    prepared = {stage: seconds for stage, seconds in timings(recipe.folder).items() if stage != "evaluate"}
    result["cost"] = costs(measured["cost"], prepared)
    result |= sections(protocol, progress=progress)
    for name, seconds in (("ours", "generate"), ("oracle", "fine_tune")):
        if name in result["methods"]:
            result["methods"][name]["seconds_per_adapter"] = result["cost"][seconds]["seconds"]
    results.mkdir(parents=True, exist_ok=True)
    replace_file(results / f"{recipe.name}.json", json_bytes(result))
    drawn = write_figures(result, results / recipe.name, protocol)
    replace_file(results / f"{recipe.name}.md", markdown(result, drawn).encode())
    if own and "ours" in result["methods"]:  # so that its page and its adapters' tell
        replace_file(recipe.generator_folder / EVALUATION_FILE, json_bytes(scores_of(result)))
    return result


def chosen_methods(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's methods in the table's order; base and oracle always (no gain without), start, origin."""
    if unknown := sorted(set(recipe.evaluate.methods) - set(METHODS)):
        raise ValueError(f"evaluate.methods names {unknown}; known methods are {list(METHODS)}.")
    always = {"base", "oracle"} | ({"start"} if recipe.collect.start not in ("fresh", "recorded") else set())
    always |= {"origin"} if has_origin(recipe) else set()
    return tuple(name for name in METHODS if name in always | set(recipe.evaluate.methods))


def held_out_oracles(recipe: Recipe, suite: TaskSuite) -> dict[str, Trajectory]:
    """Unseen task → its own run. ValueError where one is missing or cannot be scored."""
    names = [task.name for split in UNSEEN for task in suite.split(split)]
    if not names:
        raise ValueError(
            f"suite {suite.name!r} has no unseen tasks with this recipe; set suite.unseen_tasks above 0."
        )
    store = recipe.held_out_folder
    runs = TrajectoryStore(store).trajectories() if (store / "store.json").is_file() else []
    found = {run.task.name: run for run in sorted(runs, key=lambda run: -run.seed)}
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{store} holds no finished run of {len(missing)} of {len(names)} unseen tasks, first "
            f"{missing[0]!r}. Run `ltdi collect` with this recipe first: it goes on where it stopped."
        )
    if empty := [name for name in names if not suite[name].evaluation]:
        raise ValueError(f"task {empty[0]!r} has no evaluation examples, so nothing can be scored on it.")
    return {name: found[name] for name in names}


def open_protocol(
    recipe: Recipe,
    bench: Bench,
    generator: Generator,
    methods: tuple[str, ...],
    oracles: dict[str, Trajectory],
    *,
    progress: bool,
) -> Protocol:
    """Make, or read, all that the methods need: codec and conditions, rivals, variants."""
    require_same_spec(bench.spec, generator.spec, "the generator")
    for run in oracles.values():
        require_same_spec(bench.spec, run.spec, f"{recipe.held_out_folder}, run {run.run_id}")
    names = [task.name for task in bench.suite.split("train")]
    encoder = recipe_encoder(bench)
    runs = training_trajectories(recipe, names)
    prepared = prepare(recipe, encoder, bench.suite, progress=progress)
    generators, trials = {"ours": generator}, {"ours": guidance_of(generator)}
    for name in VARIANTS:
        if name in methods:
            generators[name] = train_variant(recipe, bench, name, progress=progress)
            trials[name] = guidance_of(generators[name]) | variant_trials(recipe, name)
    fitted = fit_ridge_rival(prepared.data, generator.codec, generator)
    ridge: dict[str, RidgeRival] = dict.fromkeys(CONTEXTS, fitted)
    if "ridge" in methods:
        # Guided for either context apart where ours is.
        ridge, trials["ridge"] = tuned_ridges(fitted, bench, encoder, generator.alone is not None)
    start, move = runs[0].start(), None
    fixed = {"base": bench.fresh, "start": start, "mean": mean_adapter(runs, recipe.collect.gauge)}
    if has_origin(recipe):  # what answers from stored runs does so from where ours begins
        origin, trials["origin"] = recipe_origin(bench, start, progress=progress)
        move = partial(moved, start=start, origin=origin)
        fixed |= {"origin": origin, "mean": move(fixed["mean"])}
    apart = {"multi_task_lora_4x": widened(bench)} if "multi_task_lora_4x" in methods else {}
    for name, train in MULTI_TASK.items():
        if name in methods:
            fixed[name], trials[name] = train(apart.get(name, bench), progress=progress)
    t2l = trained_t2l(bench, prepared.data, runs, encoder, methods, progress=progress)
    trials |= {name: tried for name, (_, tried) in t2l.items()}
    hypernetworks = {name: rival for name, (rival, _) in t2l.items()}
    nearest, folder = NearestTask(prepared.data, runs, move), recipe.folder / "evaluation"
    made = (generators, fixed, apart, nearest, ridge, hypernetworks)
    return Protocol(
        recipe,
        bench,
        methods,
        encoder,
        *made,
        tuple(runs),
        oracles,
        trials,
        folder,
        prepared.data,
        prepared.codec,
    )


def trained_t2l(
    bench: Bench,
    data: TrainingSet,
    runs: Sequence[Trajectory],
    encoder: PromptEncoder,
    methods: Sequence[str],
    *,
    progress: bool,
) -> dict[str, tuple[T2LRival, dict[str, Any]]]:
    """The hypernetworks among the methods, with their trials."""
    wanted = {mode: name for mode, name in FOLDERS.items() if name in methods}
    return {
        name: train_t2l(bench, data, runs, encoder, mode=mode, progress=progress)
        for mode, name in wanted.items()
    }


def guidance_of(generator: Generator) -> dict[str, Any]:
    """The guidance that was chosen on validation tasks."""
    own = {"scale": generator.config.guidance_scale, "mean_share": generator.config.mean_share}
    if generator.alone is None:
        return own
    alone = guidance_of(generator.purposed(prompt_in_context=False))
    return own | {"alone": alone, "alone_share": generator.config.alone_share}


def tuned_ridges(
    ridge: RidgeRival, bench: Bench, encoder: PromptEncoder, apart: bool
) -> tuple[dict[str, RidgeRival], dict[str, Any]]:
    """The rival for each context, at its best guidance there, or at that with the prompt, and its trials."""
    best, tried = tuned_ridge(ridge, bench, encoder)
    if not apart:
        return dict.fromkeys(CONTEXTS, best), tried
    alone, more = tuned_ridge(ridge, bench, encoder, context="no_prompt")
    return dict(zip(CONTEXTS, (best, alone), strict=True)), tried | {"alone": more}


def tuned_ridge(
    ridge: RidgeRival, bench: Bench, encoder: PromptEncoder, *, context: str = "prompt"
) -> tuple[RidgeRival, dict[str, Any]]:
    """The rival at its best guidance for a context, and its trials; chosen once, kept beside the scores."""
    held_out = {run.task.name for run in validation_runs(bench.recipe, bench)}
    # In the suite's order, as ours was chosen: a task's place says in which words it is asked.
    tasks = [task for task in validation_tasks(bench) if task.name in held_out]
    about = f"{bench.base.weights_fingerprint} {bench.base.name} {validation_prompts(tasks)}"
    about += " paired" if context == "prompt" else f" paired {context}"  # how it is chosen
    key = hashlib.sha256(f"{tensor_digest([ridge.ridge.weight, ridge.mean])} {about}".encode()).hexdigest()
    file = bench.recipe.folder / "evaluation" / f"ridge-{key[:16]}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        chosen, tried = with_best_guidance(ridge, bench, tasks, encoder, context=context)
        about = {**vars(chosen.guidance), "strength": ridge.strength, "validation_accuracy": tried}
        replace_file(file, json_bytes(about))
    found = read_json(file)
    return replace(ridge, guidance=Guidance(found["scale"], found["mean_share"])), found


# ---- cost, and the head of the file


def measure_once(protocol: Protocol, scores: Sequence[TaskScores]) -> dict[str, Any]:
    """Seconds and distances that belong to no task, kept beside the scores."""
    file = protocol.folder / f"{digest(protocol)}-measured.json"
    if not file.is_file():
        start = shared_start(protocol.bench, progress=False)
        memorisation = between_stored(protocol.bench.spec, protocol.stored)
        generate = seconds_to_generate(protocol.generators["ours"], protocol.bench)
        flops = count_flops(protocol.generators["ours"], protocol.bench)
        replace_file(
            file,
            json_bytes(
                {
                    "memorisation": memorisation,
                    "cost": {**generate, "flops": flops, "runs": fine_tunes(protocol.bench, start, scores)},
                }
            ),
        )
    return read_json(file)


def header(bench: Bench, trials: dict[str, Any]) -> dict[str, Any]:
    """Where, when and from what the result was made."""
    recipe, suite = bench.recipe, bench.suite
    return {
        "recipe": recipe.name,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(bench.base.model.device),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "seeds": list(range(recipe.evaluate.seeds)),
        "base_model": bench.base.name,
        "suite": {split: len(tasks) for split, tasks in suite.splits.items()},
        "trials": trials,
    }


def commit() -> str | None:
    """The checkout's commit, with "-dirty" for changed files; None outside a git checkout.

    Warns (UserWarning) where git refuses to say.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None  # no git on this machine
    if done.returncode and "not a git repository" not in done.stderr:
        warnings.warn(f"the result has no commit, git says: {done.stderr.strip()}", stacklevel=2)
    return done.stdout.strip() or None


def machine(device: torch.device) -> str:
    """Processor, threads, and the accelerator in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    text = f"{cpu}, {torch.get_num_threads()} threads"
    return f"{text}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else text
