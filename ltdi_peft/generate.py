"""A sentence in, a working `PeftModel` out.

In: a task prompt, a generator, a base model, perhaps examples.  Out: an ordinary `PeftModel`.
Idea: nothing is returned that was not proved: the adapter is written to a folder, read back strictly, and
must change the model's logits. What cannot be proved is taken off the model again.
"""

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast, no_type_check

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ltdi_peft.adapter import attach, load_adapter_folder, prove_loaded, require_same_spec
from ltdi_peft.base import Base, load_base, locate, spec_fingerprint, weights_fingerprint
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.four_bit import keep_gradients
from ltdi_peft.generator import CONFIG_FILE, GeneratedAdapter, Generator
from ltdi_peft.generator_config import default_folder
from ltdi_peft.provenance import note_provenance
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import BrokenAdapterError, SpecMismatchError
from ltdi_peft.task import Example, ExampleLike

GENERATOR_VARIABLE = "LTDI_GENERATOR"
CANDIDATES_OR_NOT = (
    "num_candidates is {} with {} examples: examples choose among candidates, so give both or neither, or "
    "leave num_candidates out. (A generator trained with condition.examples above 0 reads examples itself.)"
)
OFFERED = 16  # candidates that examples choose among unless the caller says how many
PROBE = "The quick brown fox jumps over the lazy dog."


def generate_adapter(
    task_prompt: str,
    *,
    generator: Generator | str | Path | None = None,
    base_model: PreTrainedModel | PeftModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: Iterable[ExampleLike] = (),
    inputs: Iterable[str] = (),
    num_candidates: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    prompt_in_context: bool = True,
    adapter_name: str = "default",
    load_in_4bit: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    verify: bool = True,
) -> PeftModel:
    """Generate an adapter for the task that `task_prompt` describes, and return the base model with it.

    `generator`: a `Generator`, a folder or a Hub id (at `revision`); else `$LTDI_GENERATOR`, else the one in
    the package, if it has one. `base_model`: a loaded model, which is wrapped in place; a `PeftModel`, which
    gets one more adapter under `adapter_name`; a name or folder; None for the generator's own. `tokenizer`:
    of a loaded model whose own name does not say where it is. `examples`: (input, answer) pairs of the task;
    a generator that was trained to read examples reads them beside the prompt; else, and with
    `num_candidates`, they choose among so many candidates (16) by their loss: of a generator with attributes,
    as the package's, readings of the prompt, else of seeds `seed`, `seed` + 1, …. `inputs`: inputs of the
    task without answers, which tell such a generator what a short prompt leaves open. `guidance_scale`: how
    far from the mean adapter; None is the generator's own, chosen on validation tasks. `prompt_in_context`:
    whether the model will have the task prompt in its context when it is used; a generator may know a better
    adapter for one that will not. `verify`: the proof of load. `device`, `dtype`, `load_in_4bit`: of a base
    model that is loaded here.

    Raises ValueError, before anything is changed, for an empty prompt, a name in use, candidates without
    examples, examples of which nothing would be read, or options of loading beside a loaded model;
    SpecMismatchError for a base model of another architecture or tokenizer; BrokenAdapterError when the proof
    fails, and the model is then what it was before. Warns (UserWarning) when the base's weights are not those
    trained on, and when a norm had to be scaled into the training range.
    """
    require_prompt(task_prompt)
    pairs, unanswered = as_examples(examples), as_inputs(inputs)
    require_candidates(num_candidates, pairs)
    require_base_model(base_model, {"device": device, "dtype": dtype, "load_in_4bit": load_in_4bit})
    require_free_name(base_model, adapter_name)
    trained = find_generator(generator, revision=revision, token=token, cache_dir=cache_dir)
    reads = trained.config.condition_examples > 0
    count = num_candidates or (OFFERED if pairs and not reads else 1)
    if pairs and count == 1 and not reads:
        raise ValueError(CANDIDATES_OR_NOT.format(count, len(pairs)))
    if isinstance(base_model, PreTrainedModel | PeftModel):
        named = trained.config.base_model
        base = wrap_passed(base_model, tokenizer, default_name=named, token=token, cache_dir=cache_dir)
        model = base_model
    else:
        options = {"device": device or best_device(), "dtype": dtype, "load_in_4bit": load_in_4bit}
        base = load_base_of(trained, base_model, token=token, cache_dir=cache_dir, **options)
        model = base.model
    require_same_base(trained, base)
    with as_base(model):
        options = {"guidance_scale": guidance_scale, "base": base, "prompt_in_context": prompt_in_context}
        options |= {"examples": pairs} if reads else {}
        options |= {"inputs": unanswered}
        made = trained.candidates(task_prompt, count, seed=seed, **options)
        chosen = made[0] if count == 1 else best_candidate(made, base, pairs)
    if chosen.clamped:
        warnings.warn(
            f"‖ΔW‖ of {len(chosen.clamped)} of {len(chosen.adapter)} sites was scaled into the range of the "
            f"training adapters, first {chosen.clamped[0]}.",
            stacklevel=2,
        )
    if verify:
        made_model = attach_proved(model, chosen, base, trained, adapter_name)
    else:
        made_model = attach(model, chosen.spec, chosen.adapter, adapter_name)
    return note_provenance(made_model, chosen.provenance, adapter_name)


# ---- refusals that need no model


def require_prompt(task_prompt: object) -> None:
    """ValueError for an empty prompt, or what is none."""
    if not isinstance(task_prompt, str):
        raise ValueError(
            f"task_prompt is a {type(task_prompt).__name__}, {task_prompt!r}; expected one sentence. "
            f"Generator.generate takes several prompts at once."
        )
    if not task_prompt.strip():
        raise ValueError(
            "task_prompt is empty; describe the task in a sentence, e.g. 'Answer in formal French.'"
        )


def require_candidates(count: int | None, examples: Sequence[Example]) -> None:
    """ValueError unless several candidates come with examples."""
    if count is not None and (count < 1 or (count > 1 and not examples)):
        raise ValueError(CANDIDATES_OR_NOT.format(count, len(examples)))


@no_type_check  # what comes from a file is checked below, and refused by name
def as_examples(examples: Iterable[ExampleLike]) -> list[Example]:
    """(input, answer) pairs, or {"input": …, "answer": …}, as `Example`s; ValueError for anything else."""
    return [_as_example(one) for one in examples]


@no_type_check  # likewise
def as_inputs(inputs: Iterable[str]) -> list[str]:
    """Texts; ValueError for one text instead of several, for an empty one, and for what is none."""
    found = [] if isinstance(inputs, str) else list(inputs)
    if isinstance(inputs, str) or not all(isinstance(one, str) and one.strip() for one in found):
        raise ValueError(f"inputs are several texts, none of them empty, got {inputs!r}.")
    return found


@no_type_check
def _as_example(one: ExampleLike) -> Example:
    if isinstance(one, Example):
        return one
    if isinstance(one, Mapping) and set(one) == {"input", "answer"}:
        return Example(one["input"], one["answer"])
    if isinstance(one, list | tuple) and len(one) == 2:
        return Example(one[0], one[1])
    raise ValueError(
        f"an example is an (input, answer) pair, {{'input': …, 'answer': …}} or an Example, got {one!r}."
    )


def require_base_model(base_model: object, options: Mapping[str, object]) -> None:
    """ValueError for what is no model and no name of one; for a loaded one, for options of loading."""
    if isinstance(base_model, PreTrainedModel | PeftModel):
        if given := sorted(key for key, value in options.items() if value not in (None, False, "auto")):
            raise ValueError(
                f"base_model is loaded already, so {given} would change nothing: leave them out, or pass the "
                f"model's name."
            )
    elif base_model is not None and not isinstance(base_model, str | Path):
        raise ValueError(
            f"base_model is a {type(base_model).__name__}; expected a PreTrainedModel or PeftModel (unwrap "
            f"DDP and torch.compile), a folder, a Hub id or None."
        )


def require_free_name(base_model: object, adapter_name: str) -> None:
    """ValueError for a name that PEFT cannot use, and when the model has an adapter of this name."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name is {adapter_name!r}; expected a name, without dots.")
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; choose another adapter_name (in use: "
            f"{sorted(base_model.peft_config)}) or delete it first."
        )


# ---- generator and base model


def find_generator(
    generator: Generator | str | Path | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Generator:
    """The argument, else `$LTDI_GENERATOR`, else the package's own; ValueError when there is none."""
    if isinstance(generator, Generator):
        return generator
    shipped = default_folder() if (default_folder() / CONFIG_FILE).is_file() else None
    name = generator or os.environ.get(GENERATOR_VARIABLE) or shipped
    if not name:
        raise ValueError(
            f"no generator: pass generator=<folder or Hub id> or set ${GENERATOR_VARIABLE}. `make demo` "
            f"trains one in runs/demo/generator. This ltdi_peft has none of its own."
        )
    return Generator.from_pretrained(name, revision=revision, token=token, cache_dir=cache_dir)


def best_device() -> torch.device:
    """The accelerator of this machine, else its CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def load_base_of(
    generator: Generator,
    name: str | Path | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str,
    load_in_4bit: bool,
    token: str | None,
    cache_dir: str | Path | None,
) -> Base:
    """The base model of this name, or the generator's own at the revision that it was trained on."""
    config = generator.config
    return load_base(
        config.base_model if name is None else str(name),
        revision=config.base_revision if name is None else None,
        device=device,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        token=token,
        cache_dir=cache_dir,
    )


def wrap_passed(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    default_name: str,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Base:
    """A model that the caller loaded, as `Base`; nothing of it is changed, its name neither.

    But 4-bit layers are kept in the layout that gradients come through (`keep_gradients`).
    default_name: where the tokenizer of a model without a name is looked for.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"base_model is a {type(inner).__name__}; expected a transformers PreTrainedModel.")
    keep_gradients(inner)
    name = inner.name_or_path or default_name
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                locate(name, token=token, cache_dir=cache_dir), token=token
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the tokenizer of base model {name!r} cannot be found ({error}): pass tokenizer=."
            ) from error
    found = cast(PreTrainedTokenizerBase, tokenizer)
    return Base(inner, found, name, spec_fingerprint(inner, found), weights_fingerprint(inner))


def require_same_base(generator: Generator, base: Base) -> None:
    """SpecMismatchError for another architecture, shape or vocabulary; a warning for other weights."""
    config = generator.config
    if base.spec_fingerprint != config.spec_fingerprint:
        raise SpecMismatchError(
            f"base model {base.name!r} has spec fingerprint {base.spec_fingerprint}, the generator was "
            f"trained for {config.base_model!r} with {config.spec_fingerprint} (architecture, shapes and "
            f"tokenizer). Pass that base model, or train a generator on adapters of this one."
        )
    if base.weights_fingerprint != config.weights_fingerprint:
        warnings.warn(
            f"the weights of base model {base.name!r} are not those that the generator was trained on: "
            f"another copy, a 4-bit load or another fine-tune of {config.base_model!r}. The adapter may do "
            f"less on them.",
            stacklevel=3,
        )


@contextmanager
def as_base(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the block the model is in evaluation mode, its adapters off; afterwards it is as it was."""
    modes = {module: module.training for module in model.modules()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, wanted in trained:  # PEFT asks for gradients of whatever it switches on again
            parameter.requires_grad_(wanted)


# ---- choosing and proving


def best_candidate(
    made: Sequence[GeneratedAdapter], base: Base, examples: Sequence[Example]
) -> GeneratedAdapter:
    """The candidate with the least mean loss on the examples, with the prompt in context if made for that.

    Of equal ones the first.
    """
    adapted, about = AdaptedBase(base, made[0].spec.sites), made[0].origin
    prompts = [about.task_prompt] if about.prompt_in_context else None
    sheet = make_sheet(adapted, examples, prompts)
    found = score(adapted, sheet, stack_adapters([one.adapter for one in made], adapted.device))
    return made[int(found.loss.mean(1).argmin())]


def attach_proved(
    model: PreTrainedModel | PeftModel,
    made: GeneratedAdapter,
    base: Base,
    generator: Generator,
    adapter_name: str,
) -> PeftModel:
    """Write, read back strictly, attach and prove that it acts; if it does not, the model is as it was."""
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        spec, adapter = load_adapter_folder(Path(folder))
    require_same_spec(made.spec, spec, "the generated adapter, written and read back")
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = attach(model, spec, adapter, adapter_name)
    probe = base.tokenizer(PROBE, return_tensors="pt")["input_ids"]
    try:
        prove_loaded(
            wrapped, spec, adapter, probe, norm_range=generator.config.norm_range, adapter_name=adapter_name
        )
    except BrokenAdapterError:
        if isinstance(model, PeftModel):
            model.base_model.set_adapter(active)  # pyright: ignore[reportCallIssue]  # else PEFT chooses one itself
            model.delete_adapter(adapter_name)
        else:
            wrapped.unload()
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        raise
    return wrapped
