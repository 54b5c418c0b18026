"""Gradient steps on one adapter of a PeftModel: what moves, what does not, and what is refused."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.testing import assert_close

from ltdi_peft.adapter import read_adapter, spec_of
from ltdi_peft.base import wrap_base
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.fit import losses
from ltdi_peft.generate import as_base
from ltdi_peft.refine import example_pool, refine
from ltdi_peft.spec import BrokenAdapterError, UnsupportedAdapterError
from ltdi_peft.task import Example

EXAMPLES = [("w10 w11", "w20"), ("w12 w13", "w21 w22"), Example("w14", "w23")]
PROMPT = "w30 w31"


@pytest.fixture
def refined(tiny_tokenizer):
    """refined(model, …) → `refine` with the tiny tokenizer, larger steps than the default."""

    def call(model, examples=tuple(EXAMPLES), **options):
        return refine(model, examples, **{"tokenizer": tiny_tokenizer, "learning_rate": 2e-2, **options})

    return call


def bits(model, skip="no such adapter"):
    """Every parameter by name, but those of adapter `skip`."""
    return {n: w.detach().clone() for n, w in model.named_parameters() if f".{skip}." not in n}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flat(model):
    """All factors of adapter "default" in one row."""
    return torch.cat([factor.flatten() for pair in read_adapter(model).values() for factor in pair])


def flags(model):
    """Modes and gradient flags."""
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: weight.requires_grad for name, weight in model.named_parameters()}


def loss_of(model, tokenizer, prompts=()):
    """Mean loss on the examples' rows, by PEFT's own forward pass."""
    base = wrap_base(model.get_base_model(), tokenizer, name="tiny/llama")
    with as_base(model):
        pool = example_pool(AdaptedBase(base, spec_of(model).sites), list(map(as_example, EXAMPLES)), prompts)
    found = []
    for row in pool.rows:
        labels = torch.tensor([[-100] * row.answer + list(row.ids[row.answer :])])
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([row.ids]), labels=labels).loss.item())
    return sum(found) / len(found)


def as_example(one):
    return one if isinstance(one, Example) else Example(*one)


# ---- what moves


@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_the_loss_on_the_examples_falls(tiny_peft, tiny_tokenizer, refined, prompt):
    model = tiny_peft().eval()
    before = loss_of(model, tiny_tokenizer, [prompt] if prompt else [])
    assert refined(model, prompt=prompt, steps=24) is model
    after = loss_of(model, tiny_tokenizer, [prompt] if prompt else [])
    # From chance, ln 64 = 4.16 nats: a random frozen model with rank 4 gains little in 24 steps.
    assert after < before - 0.25


def test_without_a_prompt_no_row_has_one(tiny_wrapped, tiny_peft):
    base = tiny_wrapped(layers=2)
    adapted = AdaptedBase(base, spec_of(tiny_peft()).sites)
    examples = list(map(as_example, EXAMPLES))
    alone, both = example_pool(adapted, examples, []), example_pool(adapted, examples, [PROMPT, "w33"])
    assert (alone.prompted, alone.plain) == ((0, 1, 2), ())
    assert (both.prompted, both.plain) == ((0, 1, 2), (3, 4, 5))
    assert alone.rows == both.rows[3:]
    words = [base.tokenizer.decode(list(row.ids)) for row in both.rows]
    assert [text.split()[0] for text in words] == ["w30", "w33", "w30", "Input:", "Input:", "Input:"]


def test_one_step_is_adamw_by_peft(tiny_peft, tiny_tokenizer, refined):
    """Independent reference: PEFT's own forward pass, autograd and torch's AdamW on the whole batch."""
    one = [EXAMPLES[0]]
    mine, theirs = tiny_peft(), tiny_peft().eval()
    refined(mine, one, steps=1, batch_size=1)
    ids = tiny_tokenizer("Input: w10 w11\nOutput: w20")["input_ids"] + [tiny_tokenizer.eos_token_id]
    labels = [-100] * (len(ids) - 2) + ids[-2:]
    trained = [w for w in theirs.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    for site, (a, b) in read_adapter(theirs).items():
        # AdamW's first step is lr · g/(|g| + 1e-8): a gradient near 0 is all rounding
        assert_close(read_adapter(mine)[site], (a, b), rtol=0, atol=1e-4)


# ---- what does not


def test_base_and_other_adapters_stay_bit_for_bit(tiny_peft, refined, probe_ids):
    model = tiny_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    model.train()
    model.base_model.requires_grad_(False)
    model.base_model.model.lm_head.requires_grad_(True)
    before, state, own = bits(model, skip="default"), flags(model), read_adapter(model)
    random = torch.get_rng_state()
    refined(model)
    assert same(before, bits(model, skip="default"))
    assert flags(model) == state
    assert model.active_adapters == ["default"]
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(torch.equal(own[s][i], read_adapter(model)[s][i]) for s in own for i in range(2))


def test_a_named_adapter_is_trained_alone(tiny_peft, refined):
    model, alone = tiny_peft(), tiny_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    before = bits(model, skip="other")
    refined(model, adapter_name="other")
    assert same(before, bits(model, skip="other"))
    assert model.active_adapters == ["default"]
    refined(model)  # the other adapter beside it is off meanwhile
    refined(alone)
    assert torch.equal(flat(model), flat(alone))


def test_same_seed_same_bytes(tiny_peft, refined):
    def bytes_of(**options):
        model = tiny_peft()
        with torch.no_grad():  # a caller's own is no hindrance
            return bits(refined(model, batch_size=2, prompt=PROMPT, **options))

    first = bytes_of(seed=3)
    assert same(first, bytes_of(seed=3))
    assert not same(first, bytes_of(seed=4))


def test_the_bar_only_shows(tiny_peft, refined, capsys):
    shown = bits(refined(tiny_peft(), steps=2, progress=True))
    assert "refine: 100%" in capsys.readouterr().err
    assert same(shown, bits(refined(tiny_peft(), steps=2)))


# ---- what is refused, before anything is changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "no examples: refine needs at least one"),
        ({"examples": [("a", "b", "c")]}, r"an \(input, answer\) pair"),
        ({"examples": ["ab"]}, r"an \(input, answer\) pair"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"prompt": " "}, "prompt is empty"),
        ({"adapter_name": "nobody"}, r"no adapter 'nobody', only \['default'\]"),
        ({"tokenizer": None}, r"(?s)tokenizer of base model 'tiny/llama'.*pass token"),
    ],
)
def test_refusals(tiny_peft, refined, options, message):
    model = tiny_peft().train()
    before, state = bits(model), flags(model)
    with pytest.raises(ValueError, match=message):
        refined(model, **options)
    assert same(before, bits(model))
    assert flags(model) == state


def test_a_model_without_adapters_is_refused(tiny_base, refined):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM without adapters.*get_peft_model"):
        refined(tiny_base())


def test_two_active_adapters_need_a_name(tiny_peft, refined):
    model = tiny_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 adapters are active.*adapter_name="):
        refined(model)
    refined(model, adapter_name="other", steps=1)
    assert model.active_adapters == ["default", "other"]


def test_merged_adapters_are_refused(tiny_peft, refined):
    model = tiny_peft()
    model.merge_adapter()
    before = bits(model)
    with pytest.raises(ValueError, match=r"merged into the base.*unmerge_adapter"):
        refined(model)
    assert same(before, bits(model))


def test_kinds_that_are_not_plain_lora_are_refused(tiny_base, tiny_peft, refined):
    with pytest.raises(UnsupportedAdapterError, match="use_dora=True is not supported"):
        refined(tiny_peft(use_dora=True))
    prefix = get_peft_model(tiny_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedAdapterError, match=r"peft_type is .*PREFIX_TUNING"):
        refined(prefix)


def test_broken_weights_are_not_written(tiny_peft, refined):
    model = tiny_peft()
    before, state = bits(model), flags(model)
    with pytest.raises(BrokenAdapterError, match=r"learning_rate=1e\+30 ended in broken weights.*lower"):
        refined(model, learning_rate=1e30)
    assert same(before, bits(model))
    assert flags(model) == state


def test_the_loss_of_the_loop_is_pefts(tiny_peft, tiny_wrapped, tiny_tokenizer):
    model = tiny_peft().eval()
    adapted = AdaptedBase(tiny_wrapped(layers=2), spec_of(model).sites)
    pool = example_pool(adapted, [as_example(EXAMPLES[0])], [])
    stacked = stack_adapters([read_adapter(model)])
    row = pool.rows[0]
    labels = torch.tensor([[-100] * row.answer + list(row.ids[row.answer :])])
    with torch.no_grad():
        want = model(input_ids=torch.tensor([row.ids]), labels=labels).loss
        assert_close(losses(adapted, pool.rows, pool.inputs, stacked)[0], want, rtol=1e-5, atol=1e-6)
