"""One question to a model, with or without an adapter.

In: a `Question`: message, exchanges before it, perhaps the task prompt.  Out: the answer's text.
Idea: the model reads what it was trained and scored on (`make_row`), and answers greedily, so that two
answers differ by the adapter alone.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ltdi_peft.batched import make_row
from ltdi_peft.condition import longest_text
from ltdi_peft.task import Example

UNKNOWN = "?"  # stands for the answer that is to come; the ids before it do not depend on it


@dataclass(frozen=True)
class Question:
    """What a model is asked. `earlier`: exchanges that stand in its context, oldest first."""

    message: str
    prompt: str | None = None  # the task in a sentence; None leaves it out of the context
    chat_template: bool = False  # the tokenizer's own, else "Input: … Output:"
    earlier: tuple[Example, ...] = ()
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Refuse an empty message, and an answer of no length."""
        if not self.message.strip():
            raise ValueError("the message is empty; write what the models should answer.")
        if self.max_new_tokens < 1:
            raise ValueError(f"the longest answer is {self.max_new_tokens} tokens; expected at least 1.")


def context_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """Token ids up to where the answer begins. ValueError for a tokenizer without the template asked for."""
    if question.chat_template and not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; ask it in the plain format.")
    turns = (("user", question.message),) if question.chat_template else ()
    asked = Example(question.message, UNKNOWN, turns=turns)
    row = make_row(tokenizer, question.prompt, asked, shots=question.earlier)
    return list(row.ids[: row.answer])


@torch.no_grad()
def answer(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
    """The model's most likely answer, token by token, without special tokens and outer blanks.

    ValueError when question and answer do not fit the model's positions.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.generation_config is None:
        raise ValueError(f"{type(inner).__name__} generates no text.")
    ids = torch.tensor([context_ids(tokenizer, question)], device=inner.device)
    require_room(inner, ids.shape[1], question.max_new_tokens)
    # A chat model may end a turn otherwise than a text; the setting is a token id or a list of them.
    turn_ends = torch.tensor(inner.generation_config.eos_token_id or []).flatten().tolist()
    config = GenerationConfig(
        max_new_tokens=question.max_new_tokens,
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, *turn_ends],
        pad_token_id=tokenizer.eos_token_id,  # nothing is padded; unset, transformers would say so each time
    )
    options = {"attention_mask": torch.ones_like(ids), "generation_config": config}
    made = model.generate(input_ids=ids, **options)  # pyright: ignore[reportCallIssue]  # seen as a submodule
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def require_room(model: PreTrainedModel, context: int, new: int) -> None:
    """ValueError when a context and so many new tokens are more than the model has positions."""
    most = longest_text(model.config)
    if most is not None and context + new > most:
        raise ValueError(
            f"context and answer may take {context} + {new} tokens, the model has {most} positions: shorten "
            f"the message or the answer, or clear the conversation."
        )
