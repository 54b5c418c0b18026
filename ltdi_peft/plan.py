"""What a recipe will take, before anything starts: runs, steps, bytes, memory, time.

In: a recipe; of the base model only its configuration.  Out: a table as JSON, and as lines.
Idea: bytes are those of files that the same code would write, with zeros in them; memory and time are meant
to be right within a factor of two, on a machine that has nothing else to do.
"""

from typing import Any

import torch
from safetensors.torch import save

from ltdi_peft.attributes import known_values
from ltdi_peft.base import dtype_named
from ltdi_peft.collect import HELD_OUT
from ltdi_peft.condition import WORDS
from ltdi_peft.config import Recipe
from ltdi_peft.denoiser import Denoiser, DenoiserConfig
from ltdi_peft.encode import BASIS_DTYPES
from ltdi_peft.files import json_bytes
from ltdi_peft.forecast import Forecast, multi_task_steps
from ltdi_peft.launch import on_cpu
from ltdi_peft.recording import Schedule, kept_steps
from ltdi_peft.resume import KEPT
from ltdi_peft.score import SCORE_TOKENS
from ltdi_peft.shapes import Shapes, dtype_bytes, shapes
from ltdi_peft.speed import measured
from ltdi_peft.store import DTYPES as STORED
from ltdi_peft.task import SPLITS
from ltdi_peft.trajectory import FINISHED, FORMAT_VERSION, snapshot_header, task_table

MINILM_WIDTH, MINILM_MLP = 384, 1536
FLOAT = 4  # bytes of a float32

# Memory, from memory.json of runs/demo and runs/smollm2_builtin (2.6, 2.5 and 4.7 GB; 5.3, 3.1 and 6.6 GB):
PROCESS = 0.9e9  # Python with torch, transformers, peft and the sentence encoder
LOADED = 4  # bytes a parameter: the file's float32, mapped while it is read
POOL = 2.5  # a kept row is a small block between large ones that come and go: so much more than its numbers
PIECE_TENSORS = 60  # numbers that a trained layer keeps a token for the way back, in hidden widths
SCORING = 13  # times the logits of a scoring batch: several adapters', float32, and what is made of them


def plan(recipe: Recipe) -> dict[str, Any]:
    """Numbers of tasks, runs and steps; bytes of files; peak bytes of memory and seconds of each stage.

    Raises ValueError for a suite that cannot be collected, OSError for a base model of which there is not
    even a configuration.
    """
    about = shapes(recipe)
    device = torch.device("cpu" if on_cpu() else torch.accelerator.current_accelerator() or "cpu")
    files, network, bases = file_bytes(about)
    with torch.device("meta"):
        weights = sum(p.numel() for p in Denoiser(network).parameters())
    snapshots = about.training_runs * snapshots_a_run(recipe)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    forecast = Forecast(about, measured(about, network, device), threads, weights, bases, network.width)
    seconds = {
        "collect": forecast.collect(files["trajectories"] + files["held_out"]),
        "train": forecast.train(snapshots),
        "evaluate": forecast.evaluate(),
    }
    return {
        "recipe": recipe.name,
        "base_model": recipe.base.model,
        "machine": f"{device.type}, {threads} threads" if device.type == "cpu" else device.type,
        "tasks": {split: len(about.tasks(split)) for split in SPLITS},
        "runs": {"training": about.training_runs, "held_out": about.held_out_runs},
        "adapter": {"sites": len(about.spec.sites), "numbers": about.spec.numbers},
        "steps": steps(about),
        "bytes": files,
        "memory_bytes": memory(about, forecast, device),
        "seconds": {stage: round(forecast.elapsed(one), 1) for stage, one in seconds.items()},
        "assumed": [*about.assumed, *not_counted(recipe)],
    }


def steps(about: Shapes) -> dict[str, int]:
    """Optimiser steps of each kind."""
    recipe, start = about.recipe, about.recipe.collect.start == "multi_task"
    return {
        "shared_start": recipe.collect.multi_task.steps if start else 0,
        "a_run": recipe.collect.single.steps,
        "all_runs": recipe.collect.single.steps * (about.training_runs + about.held_out_runs),
        "encoder": recipe.condition.tuning.steps,
        "generator": sum(recipe.train.steps + one.steps for one in recipe.train.task_loss.trainings()),
        "multi_task_lora": multi_task_steps(about),
    }


def not_counted(recipe: Recipe) -> list[str]:
    """Sentences about parts of the evaluation that have no figure here."""
    about = recipe.evaluate.few_shot
    return ["the curve over gradient steps is not counted"] if about.tasks and about.curve_steps else []


# ---- bytes


def snapshots_a_run(recipe: Recipe) -> int:
    """Snapshots that a run keeps."""
    planned = recipe.collect.single.steps
    return len(kept_steps(Schedule.equal_parts(recipe.collect.equal_parts), planned) | {planned})


def adapter_bytes(about: Shapes, dtype: torch.dtype, *, frozen_a: bool, header: dict[str, str]) -> int:
    """Bytes of one adapter's file, written with zeros."""
    table = {}
    for site in about.spec.sites:
        if not frozen_a:
            table[f"{site.name}.lora_A"] = torch.zeros(site.rank, site.fan_in, dtype=dtype)
        table[f"{site.name}.lora_B"] = torch.zeros(site.fan_out, site.rank, dtype=dtype)
    return len(save(table, metadata=header))


def run_bytes(about: Shapes, *splits: str) -> int:
    """Bytes of one run of every task of these splits: snapshots and run.json."""
    collect, frozen_a = about.recipe.collect, about.recipe.collect.gauge == "shared_a"
    loss = 1.2345678901234567  # all its digits
    header = snapshot_header(collect.single.steps, loss, collect.single.learning_rate)
    one = adapter_bytes(about, STORED[collect.snapshot_dtype], frozen_a=frozen_a, header=header)
    frozen = [f"{site.name}.lora_A" for site in about.spec.sites] if frozen_a else []
    manifest = {
        "format_version": FORMAT_VERSION,
        "status": FINISHED,
        "seed": 0,
        "start": "0" * 16,
        "frozen": frozen,
        "planned_steps": collect.single.steps,
        "last_step": collect.single.steps,
        "dtype": collect.snapshot_dtype,
        "spec": about.spec.to_dict(),
        "about": {},
    }
    tasks = [task_table(task, keep_examples=False) for task in about.tasks(*splits)]
    manifests = [json_bytes({**manifest, "run_id": f"{task['name']}-s0", "task": task}) for task in tasks]
    return len(tasks) * snapshots_a_run(about.recipe) * one + sum(map(len, manifests))


def file_bytes(about: Shapes) -> tuple[dict[str, int], DenoiserConfig, int]:
    """Bytes of everything that is written, the generator's network, and the numbers of the codec's bases."""
    recipe = about.recipe
    own = adapter_bytes(about, torch.float32, frozen_a=False, header={})
    started = own if recipe.collect.start == "multi_task" else 0
    network = network_config(about)
    bases = sum(rows * dim for rows, dim in codec_bases(about))
    codec = bases * dtype_bytes(BASIS_DTYPES[recipe.codec.dtype])
    codec += own if recipe.collect.gauge != "canonical" else 0
    with torch.device("meta"):
        weights = sum(p.numel() for p in Denoiser(network).parameters())
    tokens = network.sites * network.width
    # The centre's map with its intercept, the mean, and the conditions of the training tasks.
    buffers = (network.condition_width + 2) * tokens + len(about.tasks("train")) * network.condition_width
    read = tuned_numbers(recipe) + classifier_numbers(about)
    files = {
        "trajectories": recipe.collect.seeds * run_bytes(about, "train") + own,
        "held_out": run_bytes(about, *HELD_OUT) + (own if about.held_out_runs else 0),
        "start": started,
        "codec": codec,
        "tokens": about.training_runs * recipe.diffusion.k * tokens * FLOAT,
        "generator": codec + FLOAT * (networks(recipe) * weights + buffers + read),
        # Of each resume point: weights, averaged weights, AdamW's two. And each training's first stage.
        "checkpoints": (4 * resume_points(recipe) + first_stages(recipe)) * FLOAT * weights,
    }
    return {**files, "total": sum(files.values())}, network, bases


def tuned_numbers(recipe: Recipe) -> int:
    """Of what tuning adds to the sentence encoder: A and B of four square layers and two of an MLP each."""
    about = recipe.condition.tuning
    each = 4 * 2 * MINILM_WIDTH + 2 * (MINILM_WIDTH + MINILM_MLP)
    return about.layers * about.rank * each if about.steps else 0


def first_stages(recipe: Recipe) -> int:
    """Networks that are kept as the first of two stages left them."""
    two = recipe.train.steps and recipe.train.task_loss.steps
    return len(recipe.train.task_loss.trainings()) if two else 0


def networks(recipe: Recipe) -> int:
    """Of the generator: one for adapters alone too, where task loss pulls the purposes apart."""
    return 2 if first_stages(recipe) or recipe.train.task_loss.alone_steps else 1


def resume_points(recipe: Recipe) -> int:
    """How many lie there after training, the last step's included."""
    totals = [recipe.train.steps + one.steps for one in recipe.train.task_loss.trainings()]
    return sum(min(KEPT, -(-total // recipe.train.checkpoint_every)) for total in totals)


def codec_bases(about: Shapes) -> list[tuple[int, int]]:
    """(directions, coordinates) of every site whose coordinates do not all fit into a token."""
    recipe, found = about.recipe, []
    count = about.training_runs * snapshots_a_run(recipe)
    for site in about.spec.sites:
        dim = about.coordinates(site)
        if recipe.codec.width is not None and dim > recipe.codec.width:
            found.append((min(recipe.codec.width, count), dim))
    return found


def network_config(about: Shapes) -> DenoiserConfig:
    """The generator's network."""
    recipe, sites = about.recipe, about.spec.sites
    widest = max(map(about.coordinates, sites))
    condition = told_values(about) if recipe.condition.attributes else encoder_width(about)
    sizes = {"sites": len(sites), "width": recipe.codec.width or widest, "condition_width": condition}
    return DenoiserConfig(**sizes, **vars(recipe.denoiser))


def encoder_width(about: Shapes) -> int:
    """Numbers of a condition before any attributes are told."""
    widths = {"minilm": MINILM_WIDTH, "minilm_words": MINILM_WIDTH + WORDS, "base": about.hidden}
    return widths[about.recipe.condition.encoder]


def told_values(about: Shapes) -> int:
    """Values of all attributes of the training tasks."""
    return sum(map(len, known_values([task.attributes for task in about.tasks("train")]).values()))


def classifier_numbers(about: Shapes) -> int:
    """Of the attribute classifier, with its intercept."""
    return (encoder_width(about) + 1) * told_values(about) if about.recipe.condition.attributes else 0


# ---- memory


def memory(about: Shapes, forecast: Forecast, device: torch.device) -> dict[str, int]:
    """Peak bytes of each stage, of the whole process."""
    recipe = about.recipe
    size = dtype_bytes(dtype_named(recipe.base.dtype, device))
    model = about.parameters * (size + LOADED) + PROCESS
    kept = about.hidden * size if forecast.cut else 8  # a token's activation, or its id
    pools = POOL * kept * sum(forecast.pool(task, recipe.collect.rows) for task in about.tasks("train"))
    together = max(recipe.collect.multi_task.batch_size, 32)
    layers = about.layers - forecast.cut
    piece = min(together, 32) * about.rows.prompted * layers * PIECE_TENSORS * about.hidden * size
    logits = 4 * FLOAT * 32 * about.rows.answer * int(about.config.vocab_size)
    scoring = SCORING * FLOAT * SCORE_TOKENS * (about.rows.answer / about.rows.prompted)
    runs = about.training_runs * recipe.diffusion.k * FLOAT
    tokens = runs * forecast.width * len(about.spec.sites)
    trained = 6 * FLOAT * forecast.weights + 3 * tokens + 4 * forecast.bases * FLOAT
    fitting = 2**30 if forecast.bases else 0  # the codec's memory budget (AdapterCodec.fit)
    return {
        "collect": round(model + pools + piece + logits),
        "train": round(model + max(fitting, trained) + tokens),
        "evaluate": round(model + pools + piece + logits + trained + scoring * int(about.config.vocab_size)),
    }


# ---- for people


def plan_lines(found: dict[str, Any]) -> list[str]:
    """The plan as a page."""
    tasks, runs, count = found["tasks"], found["runs"], found["steps"]
    per_stage = [
        f"  {stage:9} {clock(seconds):>8} {size(found['memory_bytes'][stage]):>10} of memory"
        for stage, seconds in found["seconds"].items()
    ]
    return [
        f"{found['recipe']}: {found['base_model']} on {found['machine']}",
        "tasks     " + ", ".join(f"{number} {split}" for split, number in tasks.items()),
        f"runs      {runs['training']} of training tasks, {runs['held_out']} held out; "
        f"{found['adapter']['sites']} sites, {found['adapter']['numbers']:,} numbers an adapter",
        f"steps     {count['shared_start']} of the shared start, {count['all_runs']} of runs "
        f"({count['a_run']} each), {count['generator']} of the generator",
        "disk      " + ", ".join(f"{name} {size(number)}" for name, number in found["bytes"].items()),
        "time and memory, right within a factor of two on a machine with nothing else to do:",
        *per_stage,
        *(f"assumed   {sentence}" for sentence in found["assumed"]),
    ]


def size(number: int | float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def clock(seconds: int | float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
