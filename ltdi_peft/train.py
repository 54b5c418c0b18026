"""Training of the generator, both stages, on Accelerate: validation, guidance, resume, report.

In: a recipe whose trajectories are collected.  Out: a `Generator` in `<output>/generator` and its report in
`<output>/training.json`.
Idea: the session owns the step; what is here is around it: the round-trip gate before, validation meanwhile,
and the guidance scale, chosen on validation tasks, after. All choices are made by the main process and told
to the others, so that every process returns the same generator or raises the same error.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ltdi_peft.attribute_fit import fit_attributes, recipe_attributes
from ltdi_peft.base import require_causal
from ltdi_peft.collect import PATIENCE, Bench, open_bench, recipe_suite, timed
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import Recipe, as_recipe
from ltdi_peft.denoiser import conditioned
from ltdi_peft.diffusion import SAMPLERS, path_loss
from ltdi_peft.encoding import Targets, held_out_runs, require_frame, tasks_with_runs, validation_targets
from ltdi_peft.files import json_bytes, read_json, replace_file, replacing_folder
from ltdi_peft.generator import CONFIG_FILE, Generator, load_generator
from ltdi_peft.generator_config import GeneratorConfig, shown_recipe
from ltdi_peft.guidance import choose_alone_share, choose_guidance
from ltdi_peft.launch import on_cpu
from ltdi_peft.origin import at_origin, recipe_origin
from ltdi_peft.prepare import Prepared, prepare, require_kept, round_trip_gate
from ltdi_peft.resume import made_from, newest_point, resume, save_point
from ltdi_peft.session import Session as Session
from ltdi_peft.spec import require_same_spec
from ltdi_peft.stages import (
    Weights,
    averaged_weights,
    best_share,
    between,
    first_stage,
    keep_first_stage,
    share_accuracies,
)
from ltdi_peft.store import Trajectory
from ltdi_peft.tuning import recipe_tuning, tune

REPORT_FILE = "training.json"
POINTS = "checkpoints"  # folder of resume points

T = TypeVar("T")


def train_generator(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    accelerator: Accelerator | None = None,
    bench: Bench | None = None,
    progress: bool = True,
) -> Generator:
    """Train on the recipe's collected runs; write `<output>/generator` and `training.json` beside it.

    `recipe`: a YAML file or a `Recipe`. `overrides`: `section.field=value`, for a file. `accelerator` and
    `bench` (suite and base model) are made unless given. Under `accelerate launch` every process calls it.
    Goes on from the newest resume point of `<output>`; what is trained already is only read. Raises
    ValueError, before the base model is loaded, for a recipe without collected runs or with runs of another
    adapter, and GateError when the codec fails its round-trip gate.
    """
    recipe = as_recipe(recipe, overrides)
    suite = bench.suite if bench else recipe_suite(recipe)
    tasks_with_runs(recipe, [task.name for task in suite.split("train")])  # ValueError without
    accelerator = accelerator or make_accelerator(recipe)
    with timed(recipe.folder, "train", write=accelerator.is_main_process):
        if bench is None:
            with accelerator.main_process_first():
                bench = open_bench(recipe, device=accelerator.device)
        generator = train_in(
            recipe, recipe.folder, accelerator, bench, gate=recipe.codec.gate, progress=progress
        )
    accelerator.end_training()
    return generator


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the recipe wants it; device and processes come from `accelerate launch`."""
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision=recipe.train.mixed_precision,
        log_with=recipe.train.log_with,
        project_dir=str(recipe.folder / "logs"),
        # The others wait while the main process scores validation tasks.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def train_in(
    recipe: Recipe, folder: Path, accelerator: Accelerator, bench: Bench, *, gate: float, progress: bool
) -> Generator:
    """Prepare, train both stages, choose the guidance scale; everything written lies in `folder`."""
    began = time.perf_counter()
    progress = progress and accelerator.is_main_process
    names = [task.name for task in bench.suite.split("train")]
    held_out = [] if recipe.train.encoded else validation_runs(recipe, bench)
    if gate > 0 or held_out or recipe.train.task_loss.steps:  # each scores answers, most only at the end
        require_causal(bench.base.model)
    require_frame(recipe, bench.spec, names, held_out)
    with accelerator.main_process_first():
        tune(bench, progress=progress)
        fit_attributes(bench, plain_encoder(bench), progress=progress)
        encoder = recipe_encoder(bench)
        prepared = prepare(recipe, encoder, bench.suite, progress=progress)
    report: dict[str, Any] = {"world_size": accelerator.num_processes}
    encoded = prepared  # round trips and validation runs are counted from the shared start
    if recipe.train.origin and not recipe.train.origin_steps:
        prepared, report["origin"] = with_origin(bench, prepared, accelerator, progress=progress)
    made, parts = made_from(recipe, prepared), trainings(recipe, folder)
    if finished(folder, made):
        return load_generator(folder / "generator")
    report |= {"made_from": made, "ridge": prepared.centre.strength, "spread": prepared.centre.spread}
    if gate > 0 and not recipe.train.encoded:
        found = told(accelerator, lambda: round_trip_gate(bench, encoded.codec, held_out))
        require_kept(found, gate, encoded.codec)
        report["gate"] = found.to_dict()
    require_resumable(parts, prepared)  # what cannot go on is said before the origin takes long
    if recipe.train.origin_steps:
        prepared, report["origin"] = with_origin(bench, prepared, accelerator, progress=progress)
    judged = [task.name for task in bench.suite.split("validation")]
    targets = validation_targets(recipe, encoded, held_out, judged)
    validation = validation_set(targets, encoder, bench) if targets else None
    sessions = run_all(parts, prepared, accelerator, bench, validation, progress=progress)
    generator, trained = joined(sessions, recipe, bench, encoder)
    report |= trained
    report |= validate(sessions[0], validation) if validation else {}
    if targets:
        two_stages = recipe.train.steps and recipe.train.task_loss.steps
        first = first_stage(folder / POINTS) if two_stages else None
        # Of all that can be scored: a run of its own, as the targets need, is not asked for here.
        scored = [name for name in judged if bench.suite[name].evaluation]
        report |= make_choices(generator, first, bench, scored, accelerator)
    if accelerator.is_main_process:
        report["seconds"] = time.perf_counter() - began
        publish(generator, report, folder)
    accelerator.wait_for_everyone()
    return generator


def trainings(recipe: Recipe, folder: Path) -> dict[Path, Recipe]:
    """Folder of resume points → what is trained there: the network, and one of its own for adapters alone.

    Each is a recipe that could be trained by itself. The second repeats the first stage, which takes a small
    part of the time and ends where it did before.
    """
    folders = (folder / POINTS, folder / "alone" / POINTS)
    stages = recipe.train.task_loss.trainings()
    parts = [replace(recipe, train=replace(recipe.train, task_loss=stage)) for stage in stages]
    return dict(zip(folders, parts, strict=False))


def require_resumable(parts: dict[Path, Recipe], prepared: Prepared) -> None:
    """ValueError where resume points are of other settings or runs."""
    for points, part in parts.items():
        newest_point(points, made_from(part, prepared))


def run_all(
    parts: dict[Path, Recipe],
    prepared: Prepared,
    accelerator: Accelerator,
    bench: Bench,
    validation: "Validation | None",
    *,
    progress: bool,
) -> list[Session]:
    """Train each part to its end, from its newest resume point on."""
    sessions = []
    for points, part in parts.items():
        # An Accelerator saves and loads all that it ever prepared, so each part has its own.
        own = make_accelerator(part) if sessions else accelerator
        session = Session(part, prepared, own, bench)
        resume(session, points)
        run_session(session, validation, points, progress=progress)
        sessions.append(session)
    return sessions


def joined(
    sessions: Sequence[Session], recipe: Recipe, bench: Bench, encoder: PromptEncoder
) -> tuple[Generator, dict[str, Any]]:
    """The generator of what was trained, and how that went. Every process must call it."""
    own = sessions[0]
    report: dict[str, Any] = {"losses": own.losses, "final_loss": own.losses[-1][1]}
    report["stage_seconds"] = own.seconds
    generator = build_generator(own, bench, guidance=1.0, encoder=encoder)
    generator.config = replace(generator.config, recipe=shown_recipe(recipe))
    for alone in sessions[1:]:
        report["alone_training"] = {"losses": alone.losses, "stage_seconds": alone.seconds}
        add_alone(generator, averaged_weights(alone))
    return generator, report


def add_alone(generator: Generator, weights: Weights) -> None:
    """A second network, with these weights and guided as the first is, for adapters that work alone."""
    own = generator.config
    generator.alone = copy.deepcopy(generator.denoiser)
    generator.alone.load_state_dict(weights)
    generator.config = replace(
        own, alone={"guidance_scale": own.guidance_scale, "mean_share": own.mean_share}
    )


def plain_encoder(bench: Bench) -> PromptEncoder:
    """The recipe's encoder before any attributes are told."""
    about = bench.recipe.condition
    tuning = recipe_tuning(bench.recipe)
    return PromptEncoder(about.encoder, base=bench.base, examples=about.examples, tuning=tuning)


def recipe_encoder(bench: Bench) -> PromptEncoder:
    """The recipe's encoder of prompts and examples."""
    return plain_encoder(bench).with_attributes(recipe_attributes(bench.recipe))


def with_origin(
    bench: Bench, prepared: Prepared, accelerator: Accelerator, *, progress: bool
) -> tuple[Prepared, dict[str, Any]]:
    """What was prepared, counted from the origin, and where that is from; made by the main process."""
    with accelerator.main_process_first():
        origin, about = recipe_origin(bench, prepared.codec.start, progress=progress)
    return at_origin(prepared, origin), about


def make_choices(
    generator: Generator, first: Weights | None, bench: Bench, names: Sequence[str], accelerator: Accelerator
) -> dict[str, Any]:
    """Choose how much of the second stage is kept, then the guidance, on tasks `names`; what was tried.

    `first`: the weights after the first stage, where there were two. Task loss pulls adapters that work
    without the prompt in context further than those beside it, so both choices are then made for each, with
    a network of its own for those alone, if there is one.
    """
    if generator.alone is None:
        if first is None:
            return chosen(generator, None, bench, names, accelerator, context="prompt")
        add_alone(generator, generator.denoiser.state_dict())
    twin = generator.purposed(prompt_in_context=False)
    tried = {"alone": chosen(twin, first, bench, names, accelerator, context="no_prompt")}
    found = {key: vars(twin.config)[key] for key in ("guidance_scale", "mean_share")}
    generator.config = replace(generator.config, alone=found)
    tried |= chosen(generator, first, bench, names, accelerator, context="prompt")
    share, tried["alone_share"] = told(accelerator, lambda: choose_alone_share(generator, bench, names))
    generator.config = replace(generator.config, alone_share=share)
    return tried


def chosen(
    generator: Generator,
    first: Weights | None,
    bench: Bench,
    names: Sequence[str],
    accelerator: Accelerator,
    *,
    context: str,
) -> dict[str, Any]:
    """Both choices for one context, put into the generator."""
    tried: dict[str, Any] = {}
    if first:
        shares = told(accelerator, lambda: share_accuracies(generator, first, bench, names, context=context))
        tried["task_loss_share"], share = shares, best_share(shares)
        generator.denoiser.load_state_dict(between(first, generator.denoiser.state_dict(), share))
    found = told(accelerator, lambda: choose_guidance(generator, bench, names, context=context))
    tried["guidance"], best = found.table(), found.best()
    generator.config = replace(generator.config, guidance_scale=best.scale, mean_share=best.mean_share)
    return tried


def told(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What the main process finds out, in every process; its error too, or the others would wait."""
    found: list[Any] = [None, None]
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = [work(), None]
        except Exception as error:  # noqa: BLE001  raised again below, in every process
            failed, found = error, [None, error if isinstance(error, ValueError) else repr(error)]
    answer, trouble = broadcast_object_list(found)
    if failed is not None:
        raise failed
    if isinstance(trouble, ValueError):
        raise trouble
    if trouble is not None:
        raise RuntimeError(f"the main process failed: {trouble}")
    return answer


def finished(folder: Path, made: dict[str, Any]) -> bool:
    """Whether `folder` holds a generator of these settings and runs."""
    report = folder / REPORT_FILE
    if not (report.is_file() and (folder / "generator" / CONFIG_FILE).is_file()):
        return False
    return read_json(report).get("made_from") == made


def publish(generator: Generator, report: dict[str, Any], folder: Path) -> None:
    """The generator's folder, put in place of an older one when it is whole; then the report."""
    with replacing_folder(folder / "generator") as partial:
        generator.save_pretrained(partial)
    replace_file(folder / REPORT_FILE, json_bytes(report))


def run_session(session: Session, validation: "Validation | None", points: Path, *, progress: bool) -> None:
    """Train to the end with logging, validation and resume points."""
    train, accelerator = session.recipe.train, session.accelerator
    if train.log_with:
        accelerator.init_trackers("ltdi_peft")
    bar = tqdm(total=session.total, initial=session.done, desc="generator", disable=not progress, unit="step")
    for step in session.steps():
        bar.update()
        ended = step.index == session.total
        if step.index % train.log_every == 0 or ended:
            loss = cast(Tensor, accelerator.reduce(step.loss, reduction="mean")).item()
            session.losses.append((step.index, loss))
            bar.set_postfix(loss=f"{loss:.4f}", stage=step.stage)
            accelerator.log({"loss": loss, "learning_rate": step.learning_rate}, step=step.index)
        if validation and step.index % train.validate_every == 0:
            accelerator.log(validate(session, validation), step=step.index)
        if step.index == train.steps and not ended:
            keep_first_stage(session, points)
        if step.index % train.checkpoint_every == 0 or ended:
            save_point(session, points)
    bar.close()


def build_generator(
    session: Session, bench: Bench, guidance: float, encoder: PromptEncoder | None = None
) -> Generator:
    """The averaged network with codec and centre. Every process must call it: shards are gathered."""
    recipe, prepared = session.recipe, session.prepared
    data, diffusion = prepared.data, recipe.diffusion
    config = GeneratorConfig(
        base_model=bench.base.name,
        base_revision=recipe.base.revision,
        spec_fingerprint=bench.base.spec_fingerprint,
        weights_fingerprint=bench.base.weights_fingerprint,
        encoder=recipe.condition.encoder,
        condition_width=data.conditions.shape[-1],
        condition_examples=recipe.condition.examples,
        tuned=bool(recipe.condition.tuning.steps),
        attributes=recipe.condition.attributes,
        loss=diffusion.loss,
        law=diffusion.law,
        k=diffusion.k,
        steps=diffusion.steps,
        sampler=diffusion.sampler,
        guidance_scale=guidance,
        mean_share=1.0,
        denoiser=dict(vars(session.plain_network.config)),
        training_tasks=data.names,
        norm_range=prepared.norm_range,
        recipe=shown_recipe(recipe),
    )
    weights = averaged_weights(session)
    generator = Generator(
        config,
        prepared.codec,
        centre=prepared.centre.last_weight,
        mean=prepared.centre.mean[-1],
        spread=torch.tensor(prepared.centre.spread),
        conditions=torch.nn.functional.normalize(data.prompt_conditions.mean(1), dim=-1),
        encoder=encoder,
        tuning=recipe_tuning(recipe),
        attributes=recipe_attributes(recipe),
    )
    generator.denoiser.load_state_dict(weights)
    return generator.eval()


# ---- validation tasks


def validation_runs(recipe: Recipe, bench: Bench) -> list[Trajectory]:
    """Finished held-out runs of the recipe's validation tasks, one a task, all of `bench`'s adapter."""
    runs = held_out_runs(recipe, [task.name for task in bench.suite.split("validation")])
    for run in runs:
        require_same_spec(bench.spec, run.spec, str(run.path))
    return runs


@dataclass(frozen=True)
class Validation:
    """Validation tasks in token space: true local targets, and the condition of a held-out paraphrase."""

    tokens: Float[Tensor, "task k site width"]
    conditions: Float[Tensor, "task condition"]


def validation_set(targets: Targets, encoder: PromptEncoder, bench: Bench) -> Validation:
    """From the local targets of validation tasks."""
    prompts = [bench.suite[name].held_out_prompts[0] for name in targets]
    return Validation(torch.stack(list(targets.values())), encoder(prompts))


@torch.no_grad()
def validate(session: Session, validation: Validation) -> dict[str, float]:
    """Loss on the sampler's own path, and the squared error of what is generated over the mean adapter's.

    Of the averaged weights; the session is left as it was. Every process must call it.
    """
    centre, like = session.prepared.centre, session.plain_network.null
    predicted = centre.predict(validation.conditions)
    z = ((validation.tokens - predicted) / centre.spread).to(like)
    rng = torch.Generator().manual_seed(session.recipe.seed)
    start = torch.randn(1, *z.shape[2:], generator=rng).to(z).expand(len(z), -1, -1)
    with session.averaged() as network:
        predict = conditioned(network, validation.conditions.to(z))
        on_path = path_loss(predict, z, start, session.chain).mean().item()
        end = SAMPLERS[session.recipe.diffusion.sampler](predict, start, session.chain, rng)
    off = (end - z[:, -1]).square().mean().item() * centre.spread**2
    scale = (validation.tokens[:, -1] - centre.mean[-1]).square().mean().item()
    return {"validation/path_loss": on_path, "validation/relative_error": off / max(scale, 1e-12)}
