"""Conversations through chat templates: what stands before the answer, and where the answer ends."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ltdi_peft.batched import make_row
from ltdi_peft.chat import chat_ids
from ltdi_peft.task import Example

CHATML = (
    "{% for m in messages %}<start>{{ m.role }} {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)
# As Gemma's: refuses a system message, and says "model" for assistant.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start>{{ m.role }} {{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)
DROPS_SYSTEM = CHATML.replace(
    "<start>{{ m.role }} {{ m.content }}<end>",
    "{% if m.role != 'system' %}<start>{{ m.role }} {{ m.content }}<end>{% endif %}",
)
# As Qwen3's: the last answer gets an empty thought in front.
THINKS = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}think {% endif %}{{ m.content }}")
OTHER_OPENING = CHATML.replace("<start>assistant {%", "<start>assistant think {%")
NO_END = CHATML.replace("<end>", "")
SHOUTS = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
WORDS = ["<eos>", "<unk>", "<start>", "<end>", "system", "user", "assistant", "think"]
WORDS += ["Input", "Output", ":", "be", "brief", "short", "hi", "ho", "red", "blue", "w0"]


def tokenizer_with(template, **special):
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", additional_special_tokens=["<start>", "<end>"], **special
    )
    made.chat_template = template
    return made


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def read(template, prompt, example, answer=None, shots=(), **special):
    """(before, answer) as words."""
    tokenizer = tokenizer_with(template, **special)
    before, after = chat_ids(tokenizer, prompt, example, answer or example.answer, shots)
    return words(tokenizer, before), words(tokenizer, after)


ASKED = Example("hi", "red", turns=(("user", "hi"),))


def test_the_prompt_is_the_system_message():
    said = read(CHATML, "be brief", ASKED)
    assert said == ("<start> system be brief <end> <start> user hi <end> <start> assistant", "red <end>")


def test_without_a_prompt_there_is_none():
    assert read(CHATML, None, ASKED) == ("<start> user hi <end> <start> assistant", "red <end>")


def test_a_system_message_of_its_own_stays():
    example = Example("x", "red", turns=(("system", "short"), ("user", "hi")))
    before, _ = read(CHATML, "be brief", example)
    assert before.startswith("<start> system be brief short <end> <start> user hi")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_messages_gets_the_prompt_in_the_first_turn(template):
    assert read(template, "be brief", ASKED)[0] == "<start> user be brief hi <end> <start> assistant"


def test_shots_are_earlier_exchanges():
    shot = Example("ho", "blue")  # a plain example is a turn of the user
    assert read(CHATML, "be brief", ASKED, shots=[shot])[0] == (
        "<start> system be brief <end> <start> user ho <end> <start> assistant blue <end> "
        "<start> user hi <end> <start> assistant"
    )


def test_what_a_template_puts_before_an_answer_belongs_to_it():
    assert read(THINKS, None, ASKED)[1] == "think red <end>"


def test_an_answer_without_an_end_gets_the_tokenizers():
    assert read(NO_END, None, ASKED, eos_token="<eos>")[1] == "red <eos>"
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        read(NO_END, None, ASKED)


@pytest.mark.parametrize("template", [OTHER_OPENING, SHOUTS])
def test_a_template_that_changes_the_answer_is_refused(template):
    with pytest.raises(ValueError, match="renders the answer 'red' otherwise than it would be generated"):
        read(template, None, ASKED)


def test_a_refusal_of_the_template_is_a_sentence():
    example = Example("x", "red", turns=(("system", "short"), ("user", "hi")))
    with pytest.raises(ValueError, match=r"refuses a conversation of \['system', 'user'\]: no system"):
        read(NO_SYSTEM, None, example)


def test_rows_use_the_template_for_conversations_alone():
    tokenizer = tokenizer_with(CHATML, eos_token="<eos>")
    row = make_row(tokenizer, "be brief", ASKED, "blue")
    assert words(tokenizer, row.ids[row.answer :]) == "blue <end>"
    assert words(tokenizer, row.ids[: row.answer]).startswith("<start> system be brief")
    plain = make_row(tokenizer, "be brief", Example("hi", "red"))
    assert words(tokenizer, plain.ids) == "be brief Input : hi Output : red <eos>"
    tokenizer.chat_template = None  # a base model reads the turns as plain text
    assert make_row(tokenizer, "be brief", ASKED) == plain


def test_the_text_is_what_transformers_renders():
    tokenizer = tokenizer_with(CHATML)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    messages.append({"role": "assistant", "content": "red"})
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    before, after = chat_ids(tokenizer, "be brief", ASKED, "red")
    assert [*before, *after] == whole
