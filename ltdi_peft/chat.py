"""Conversations as a model reads them: by its tokenizer's own chat template.

In: turns (role, content), the task prompt, an answer.  Out: token ids before the answer, and of the answer.
Idea: the answer is what the template puts after its own opening of the assistant's turn, and it ends with the
token that the template closes that turn with: what `generate` will stop at. The task prompt is the system
message; a template that takes none gets it at the head of the first turn.
Source: the chat templates of transformers (docs, "Chat templates"); prompt and completion as TRL's SFTTrainer
tells them apart.
"""

from collections.abc import Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ltdi_peft.task import Example, Turn


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    example: Example,
    answer: str,
    shots: Sequence[Example] = (),
) -> tuple[list[int], list[int]]:
    """Token ids up to the answer, and the answer's with its end token.

    `shots` are earlier exchanges of the same conversation. ValueError for turns that the template refuses, or
    where it renders the answer or its opening otherwise than it will be generated.
    """
    turns = [turn for shot in shots for turn in (*spoken(shot), ("assistant", shot.answer))]
    turns, before = opened(tokenizer, prompt, [*system(example), *turns, *spoken(example)])
    whole = rendered(tokenizer, [*turns, ("assistant", answer)])
    said, found, after = whole[len(before) :].partition(answer)
    if not whole.startswith(before) or not found:
        raise ValueError(
            f"the chat template renders the answer {answer!r} otherwise than it would be generated: expected "
            f"it after {before[-40:]!r}, got {whole[-80:]!r}. Set tokenizer.chat_template to one that keeps "
            f"answers as they are."
        )
    return ids_of(tokenizer, before), [*ids_of(tokenizer, said + found), end_token(tokenizer, after)]


def turns_of(example: Example) -> tuple[Turn, ...]:
    """The conversation before the answer; a plain example is one turn of the user."""
    return example.turns or (("user", example.input),)


def system(example: Example) -> list[Turn]:
    """Its system message, if any."""
    return [turn for turn in turns_of(example) if turn[0] == "system"]


def spoken(example: Example) -> list[Turn]:
    """Its turns but for the system message."""
    return [turn for turn in turns_of(example) if turn[0] != "system"]


def opened(
    tokenizer: PreTrainedTokenizerBase, prompt: str | None, turns: list[Turn]
) -> tuple[list[Turn], str]:
    """The turns with the task prompt among them, and their text up to where the assistant answers."""
    if not prompt:
        return turns, rendered(tokenizer, turns, opening=True)
    (role, content), *rest = turns
    led = [("system", f"{prompt}\n\n{content}"), *rest] if role == "system" else [("system", prompt), *turns]
    try:
        text = rendered(tokenizer, led, opening=True)
    except ValueError:
        text = ""
    if prompt.strip() in text:
        return led, text
    # Gemma's template refuses a system message, others drop it without a word.
    led = [(role, f"{prompt}\n\n{content}"), *rest]
    return led, rendered(tokenizer, led, opening=True)


def rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, opening: bool = False) -> str:
    """The template's text; `opening`: with the head of the assistant's turn. ValueError if it refuses."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    except TemplateError as error:
        roles = [role for role, _ in turns]
        raise ValueError(f"the chat template refuses a conversation of {roles}: {error}") from error
    return str(text)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids; the template has written the special ones already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_token(tokenizer: PreTrainedTokenizerBase, after: str) -> int:
    """The first special token that the template puts behind an answer, else the end-of-sequence token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = next((index for index in ids_of(tokenizer, after) if index in special), tokenizer.eos_token_id)
    if not isinstance(found, int):
        raise ValueError(
            "neither the chat template nor the tokenizer ends an answer: set tokenizer.eos_token."
        )
    return found
