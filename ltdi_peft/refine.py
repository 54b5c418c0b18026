"""A few gradient steps on an adapter, from a handful of examples.

In: a `PeftModel` and (input, answer) examples.  Out: the same model, the weights of one adapter moved.
Idea: a generated adapter is close to the task already, so a few steps go far. They are the steps that the
runs were collected with (`fit_steps`, float32 factors on a frozen base), and the model is touched once, at
the end: what fails on the way leaves it as it was.
"""

from collections.abc import Iterable, Sequence

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ltdi_peft.adapter import read_adapter, set_adapter_weights, spec_of
from ltdi_peft.batched import AdaptedBase, make_row, stack_adapters, unstack_adapter
from ltdi_peft.config import FitConfig
from ltdi_peft.fit import Pool, fit_steps
from ltdi_peft.generate import as_base, as_examples, wrap_passed
from ltdi_peft.spec import BrokenAdapterError
from ltdi_peft.task import Example, ExampleLike

LEARNING_RATE = 2e-3  # peak, AdamW; the middle of the grid that few_shot.RATES tries from a generated adapter


def refine(
    model: PeftModel | PreTrainedModel,
    examples: Iterable[ExampleLike],
    *,
    steps: int = 8,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 8,
    prompt: str | None = None,
    adapter_name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PeftModel:
    """Train one LoRA adapter of `model` on the examples, in place, and return the model.

    `examples`: (input, answer) pairs. `prompt`: the task in a sentence, put in the model's context for half
    of the examples; None for none. `steps`: of AdamW, each on `batch_size` examples. `learning_rate`: peak;
    linear to 0. `adapter_name`: None is the active adapter. `tokenizer`: of a model whose name does not say
    where it is. The adapter is trained alone, A and B, without LoRA dropout; everything else of the model is
    bit for bit what it was, its modes and gradient flags too. The same seed gives the same bytes.

    Raises ValueError, before anything is changed, for a model without adapters, an unknown or ambiguous
    adapter, no examples, 0 steps; UnsupportedAdapterError for anything but plain LoRA; BrokenAdapterError
    when the steps end in NaN, and the adapter is then what it was before.
    """
    wanted = require_examples(examples)
    config = FitConfig(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(
            f"prompt is empty or no text, {prompt!r}; give the task in a sentence, or None to leave it out."
        )
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__} without adapters; refine takes the PeftModel that "
            f"generate_adapter or peft's get_peft_model returns."
        )
    name = chosen_adapter(model, adapter_name)
    spec = spec_of(model, name)
    require_unmerged(model)
    with as_base(model), torch.enable_grad():
        adapted = AdaptedBase(wrap_passed(model, tokenizer, default_name=spec.base_model), spec.sites)
        pool = example_pool(adapted, wanted, [prompt] if prompt else [])
        stacked = stack_adapters([read_adapter(model, name)], adapted.device)
        made = fit_steps(adapted, stacked, [pool], config, seeds=[seed], train_a=True)
        bar = tqdm(made, total=steps, desc="refine", disable=not progress, unit="step")
        for step in bar:
            if progress:
                bar.set_postfix(loss=f"{step.loss.item():.3f}")
    try:
        set_adapter_weights(model, unstack_adapter(stacked, 0), name)
    except BrokenAdapterError as error:
        raise BrokenAdapterError(
            f"{steps} steps at learning_rate={learning_rate} ended in broken weights, and the adapter was "
            f"left as it was: {error} Use a lower learning_rate."
        ) from error
    return model


def require_examples(examples: Iterable[ExampleLike]) -> list[Example]:
    """The examples, or ValueError when there are none."""
    found = as_examples(examples)
    if not found:
        raise ValueError("no examples: refine needs at least one (input, answer) pair to learn from.")
    return found


def chosen_adapter(model: PeftModel, adapter_name: str | None) -> str:
    """The adapter's name: as given, else the only active one."""
    if adapter_name is not None:
        return adapter_name  # `spec_of` refuses an unknown one
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active, {active}: say which one by adapter_name=.")
    return active[0]


def require_unmerged(model: PeftModel) -> None:
    """ValueError for merged adapters: PEFT would subtract them, and the base would not be bit-equal."""
    if merged := model.get_model_status().merged_adapters:
        raise ValueError(f"adapters are merged into the base ({merged}); call model.unmerge_adapter() first.")


def example_pool(base: AdaptedBase, examples: Sequence[Example], prompts: Sequence[str]) -> Pool:
    """Every example with a prompt (in turn) and every one without; no prompts: each once, without."""
    tokenizer, count = base.base.tokenizer, len(examples)
    rows = [make_row(tokenizer, prompts[i % len(prompts)], e) for i, e in enumerate(examples) if prompts]
    rows += [make_row(tokenizer, None, example) for example in examples]
    # Where nothing has a prompt `plain` is empty, and every draw is from the first `count` rows.
    first, second = tuple(range(count)), tuple(range(count, len(rows)))
    return Pool(tuple(rows), tuple(base.inputs(rows)), first, second)
