"""What the local page does, without Gradio: adapters made, measured, talked to, packed, taken off again."""

import json
import warnings
import zipfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from tiny_bench import tokenizer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from ltdi_peft import studio as room
from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.base import load_base
from ltdi_peft.batched import example_text
from ltdi_peft.generate import generate_adapter
from ltdi_peft.generator import load_generator
from ltdi_peft.page_parts import EMPTY, header, problem, result
from ltdi_peft.studio import Measured, Order, Studio, device_named, open_studio, parse_examples
from ltdi_peft.talk import Question, answer, context_ids
from ltdi_peft.task import Example

PROMPT = "please a second twice"
EXAMPLES = (Example("w0 w1 w2", "w1 w1"), Example("w3 w1 w4", "w1 w1"))
ASKED = Question("w0 w1 w2", PROMPT, max_new_tokens=4)
OPENING = "{% if add_generation_prompt %}assistant {% endif %}"
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}" + OPENING


@pytest.fixture
def studio(world):
    base = load_base(str(world.base), dtype="float32")  # `auto` is bfloat16 on some machines
    made = Studio(load_generator(world.recipe.generator_folder), base)
    yield made
    made.close()


@pytest.fixture
def plain(world):
    """The base model, loaded apart."""
    return AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()


def same_weights(left, right):
    names = right.state_dict()
    return left.state_dict().keys() == names.keys() and all(
        torch.equal(weight, names[name]) for name, weight in left.state_dict().items()
    )


def unpacked(made, folder):
    """The only folder in an adapter's zip."""
    with zipfile.ZipFile(made.archive) as packed:
        packed.extractall(folder)
    (found,) = folder.iterdir()
    return found


def greedy(model, ids, most):
    """Token by token, by arg max, until the end token."""
    begun, words = len(ids), tokenizer()
    while len(ids) < begun + most and (begun == len(ids) or ids[-1] != words.eos_token_id):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return words.decode(ids[begun:], skip_special_tokens=True).strip()


# ---- making


def test_the_adapter_is_the_one_that_generate_makes(studio, world, tmp_path):
    made = studio.make(Order(PROMPT, seed=3))
    folder = unpacked(made, tmp_path / "zip")
    assert folder.name == made.archive.stem == "please-a-second-twice"
    (generated,) = load_generator(world.recipe.generator_folder).generate(
        [PROMPT], seed=3, base=load_base(str(world.base), dtype="float32")
    )
    spec, adapter = load_adapter_folder(folder)
    assert spec == generated.spec == made.spec
    assert all(
        torch.equal(x, y) for s in adapter for x, y in zip(adapter[s], generated.adapter[s], strict=True)
    )
    assert json.loads((folder / "provenance.json").read_text())["seed"] == 3
    assert made.provenance == generated.provenance
    assert made.nearest[0][0] == made.provenance.nearest_task
    assert made.nearest[0][1] == pytest.approx(made.provenance.nearest_similarity, abs=1e-6)
    cosines = [value for _, value in made.nearest]
    assert cosines == sorted(cosines, reverse=True)
    assert {task for task, _ in made.nearest} == set(studio.generator.config.training_tasks)
    assert made.measured is None


def test_equal_orders_are_equal_bytes(studio):
    one, two = studio.make(Order(PROMPT)), studio.make(Order(PROMPT))
    other = studio.make(Order(PROMPT, seed=1))
    assert one.archive != two.archive
    assert one.archive.read_bytes() == two.archive.read_bytes() != other.archive.read_bytes()


def test_what_the_library_warns_of_is_kept(studio):
    low = {site: (0.0, 1e-6) for site in studio.generator.config.norm_range}
    studio.generator.config = replace(studio.generator.config, norm_range=low)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = studio.make(Order(PROMPT))
    assert any("was scaled into the range" in text for text in made.warnings)
    assert "was scaled into the range" in result(made)


def test_examples_teach_and_are_measured(studio, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "refine", partial(room.refine, learning_rate=3e-2))  # by heart in 40 steps
    other = studio.make(Order(PROMPT, EXAMPLES, seed=1))
    taught = studio.make(Order(PROMPT, EXAMPLES, refine_steps=40))
    assert other.measured == Measured(2, 0, 0)  # a tiny random model knows nothing
    assert taught.measured == Measured(2, 0, 2)
    assert "base model 0 of 2 right, adapter 2 of 2; they taught 40 steps" in result(taught)
    said = [studio.ask_adapted(one, ASKED) for one in (taught, other, taught)]
    assert said[0] == said[2] == "w1 w1" != said[1]
    ids = context_ids(tokenizer(), ASKED)
    assert studio.ask_base(ASKED) == greedy(plain, ids, 4) != "w1 w1"
    alone = PeftModel.from_pretrained(plain, unpacked(taught, tmp_path)).eval()
    assert greedy(alone, ids, 4) == "w1 w1"


def test_examples_choose_among_candidates(studio, world):
    order = Order(PROMPT, EXAMPLES, candidates=2)
    chosen = studio.make(order).provenance
    base = load_base(str(world.base), dtype="float32").model
    options = {"generator": studio.generator, "base_model": base, "tokenizer": tokenizer()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was scaled into the range", UserWarning)
        wanted = generate_adapter(PROMPT, examples=EXAMPLES, num_candidates=2, **options)
    assert chosen == wanted.peft_config["default"].provenance
    assert studio.make(replace(order, examples=())).provenance.seed == 0  # without examples: one candidate


def test_what_fails_leaves_no_adapter(studio, plain, monkeypatch):
    with pytest.raises(ValueError, match="task_prompt is empty"):
        studio.make(Order(" "))
    kept = studio.make(Order(PROMPT))
    said = studio.ask_adapted(kept, ASKED)

    def failing(*args, **kwargs):
        raise ValueError("no luck")

    monkeypatch.setattr(room, "refine", failing)
    with pytest.raises(ValueError, match="no luck"):
        studio.make(Order(PROMPT, EXAMPLES, refine_steps=1))
    assert list(studio.model.peft_config) == [kept.name]
    assert studio.ask_adapted(kept, ASKED) == said


# ---- forgetting


def test_forgetting_leaves_the_others_and_at_last_the_base(studio, plain):
    one, two = (studio.make(Order(PROMPT, seed=seed)) for seed in (0, 1))
    said = studio.ask_adapted(two, ASKED)
    studio.forget(one)
    studio.forget(one)
    assert not one.archive.exists()
    assert studio.ask_adapted(two, ASKED) == said
    with pytest.raises(ValueError, match="no longer loaded; generate it again"):
        studio.ask_adapted(one, ASKED)
    assert not same_weights(studio.base.model, plain)
    studio.forget(two)
    assert not isinstance(studio.model, PeftModel)
    assert same_weights(studio.base.model, plain)
    assert studio.ask_adapted(studio.make(Order(PROMPT, seed=1)), ASKED) == said


# ---- talking


def test_the_context_is_what_models_are_trained_on():
    words = tokenizer()
    for prompt in (PROMPT, None):
        ids = words(example_text(prompt, "w0 w1"), add_special_tokens=False)["input_ids"]
        assert context_ids(words, Question("w0 w1", prompt)) == ids
    earlier = (Example("w3", "w4"),)
    before = [*words(example_text(None, "w3"))["input_ids"], *words("w4")["input_ids"], words.eos_token_id]
    asked = Question("w0 w1", None, earlier=earlier)
    assert context_ids(words, asked) == [*before, *words(example_text(None, "w0 w1"))["input_ids"]]
    words.chat_template = TEMPLATE
    text = words.decode(context_ids(words, replace(asked, chat_template=True, message="w5")))
    assert text.split().count("<eos>") == 3  # w3, w4, w5
    assert "w3 <eos>" in text
    assert text.index("w4") < text.index("w5")


def test_questions_are_refused(studio):
    with pytest.raises(ValueError, match="the message is empty"):
        Question(" \n")
    with pytest.raises(ValueError, match="the longest answer is 0 tokens"):
        Question("w0", max_new_tokens=0)
    with pytest.raises(ValueError, match="has no chat template; ask it in the plain format"):
        studio.ask_base(Question("w0", chat_template=True))
    with pytest.raises(ValueError, match=r"may take \d+ \+ 60 tokens, the model has 64 positions"):
        answer(studio.base.model, studio.base.tokenizer, Question("w0 " * 2000, max_new_tokens=60))


# ---- input


def test_a_studio_is_opened_by_names(world, monkeypatch):
    monkeypatch.setenv("LTDI_GENERATOR", str(world.recipe.generator_folder))
    opened = open_studio(device="cpu")
    assert opened.base.name == str(world.base)
    opened.close()


def test_a_studio_needs_a_generator(no_generator):
    with pytest.raises(ValueError, match="no generator: pass generator="):
        open_studio()


def test_examples_are_read_line_by_line():
    assert parse_examples("") == ()
    text = "w0 w1 => w1 w1\n\n  a b=>c  "
    assert parse_examples(text) == (Example("w0 w1", "w1 w1"), Example("a b", "c"))


@pytest.mark.parametrize("line", ["horse walks", "horse =>", "=> walks", "a => b => c", "a -> b"])
def test_a_malformed_line_is_named(line):
    with pytest.raises(ValueError, match=r"line 3 of the examples is '.+'; expected: input => answer"):
        parse_examples(f"a => b\n\n{line}")


def test_a_device_of_another_machine_is_refused(monkeypatch):
    assert device_named("cpu") == torch.device("cpu")
    monkeypatch.setattr(room, "best_device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match=r"device is 'warp'; this machine has \['cpu'\]"):
        device_named("warp")
    with pytest.raises(ValueError, match="device is 'cpu:x'"):
        device_named("cpu:x")  # of a kind that there is


def test_a_model_that_does_not_talk_is_refused(studio):
    silent = LlamaForSequenceClassification(studio.base.model.config)
    with pytest.raises(ValueError, match="is no causal language model, so there is nobody to talk to"):
        Studio(studio.generator, replace(studio.base, model=silent))


# ---- the page's parts


def test_texts_are_escaped(studio):
    prompt = "please <b>a</b> & second ${1+1}"
    shown = result(studio.make(Order(prompt)))
    assert "please &lt;b&gt;a&lt;/b&gt; &amp; second" in shown
    assert "<b>a</b>" not in shown
    assert "<i>" not in problem("<i>no</i>")


def test_the_card_shows_what_is_known(studio):
    made = studio.make(Order(PROMPT))
    shown = result(made)
    for task, cosine in made.nearest:
        assert f"<td>{task}</td><td>{cosine:.2f}</td>" in shown
    assert f"Confidence <b>{made.provenance.nearest_similarity:.2f}</b>" in shown
    assert "not measured; paste some to see" in shown
    assert "unknown; ltdi evaluate would measure it" in shown
    scores = {"methods": {"ours": {"unseen_tasks": {"tasks": 24, "accuracy": 0.6, "G": 0.68, "ci": None}}}}
    scored = replace(made, provenance=replace(made.provenance, scores=scores))
    assert "24 unseen tasks: accuracy 0.60, 0.68 of the gain of a LoRA trained on the task" in result(scored)
    assert "No adapter yet" in EMPTY
    assert "trained on 5 tasks" in header(studio)
