"""Many adapters in one pass: equal to PEFT's own model, with and without the cut, and nothing left behind."""

import pytest
import torch
from tiny_adapters import (
    one_of,
    peft_answer_logits,
    peft_twin,
    random_rows,
    random_stacked,
    sites_on,
    top_sites,
)
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ltdi_peft.base import wrap_base
from ltdi_peft.batched import (
    PROBE_TOKENS,
    AdaptedBase,
    Row,
    answer_positions,
    applied,
    batches_by_tokens,
    example_text,
    make_row,
    stack_adapters,
    unstack_adapter,
)
from ltdi_peft.task import Example

EXACT = {"rtol": 0, "atol": 1e-10}  # float64; the same products in another order
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def logits_of(adapted, rows, stacked):
    """Answer logits (adapter, position, vocabulary): every adapter on every row."""
    count = next(iter(stacked.values()))[0].shape[0]
    inputs = adapted.inputs(rows)
    with torch.no_grad():
        logits, target, _ = adapted.answer_logits(list(rows) * count, inputs * count, stacked)
    expected = torch.tensor([token for row in rows for token in row.ids[row.answer :]])
    assert_close(target.view(count, -1), expected.expand(count, -1))
    return logits.view(count, -1, logits.shape[-1])


def require_peft(model, tokenizer, sites, rows, *, cut):
    """AdaptedBase on `model` gives what PEFT gives, for three adapters."""
    model.name_or_path = "tiny/other"
    model = model.double().eval()
    adapted = AdaptedBase(wrap_base(model, tokenizer), sites)
    stacked = random_stacked(sites, 3, dtype=torch.float64)
    got = logits_of(adapted, rows, stacked)
    expected = torch.stack([peft_answer_logits(peft_twin(model, sites, stacked, i), rows) for i in range(3)])
    assert_close(got, expected, **EXACT)
    assert adapted.cut == cut


@pytest.fixture
def double(tiny_wrapped):
    """A four-layer float64 Llama, cut below layer 2, and three adapters."""
    base = tiny_wrapped(dtype=torch.float64)
    sites = top_sites(base.model)
    return AdaptedBase(base, sites), random_stacked(sites, 3, dtype=torch.float64)


def test_many_equal_peft_and_each_alone(double):
    adapted, stacked = double
    rows = random_rows(5)
    together = logits_of(adapted, rows, stacked)
    assert adapted.cut == 2
    for index in range(3):
        twin = peft_twin(adapted.base.model, adapted.sites, stacked, index)
        assert_close(together[index], peft_answer_logits(twin, rows), **EXACT)
        assert_close(together[index], logits_of(adapted, rows, one_of(stacked, index))[0], **EXACT)
    assert (together[0] - together[1]).abs().max() > 1e-3, (
        "the adapters make no difference: nothing was tested"
    )


def test_cut_equals_uncut(double):
    adapted, stacked = double
    rows = random_rows(4)
    expected = logits_of(adapted, rows, stacked)
    adapted.upper, adapted.cut = adapted.decoder, 0
    assert_close(logits_of(adapted, rows, stacked), expected, **EXACT)


def test_wrong_cut_would_be_noticed(double):
    """Negative control: the upper half with another layer missing gives other logits."""
    adapted, stacked = double
    rows = random_rows(4)
    expected = logits_of(adapted, rows, stacked)
    layers = adapted.upper._modules["layers"]
    adapted.upper._modules["layers"] = layers[1:]
    assert (logits_of(adapted, rows, stacked) - expected).abs().max() > 1e-3


def test_lowest_layer_adapted_is_not_cut(tiny_wrapped):
    base = tiny_wrapped()
    assert AdaptedBase(base, top_sites(base.model, (0, 3))).cut == 0


def test_gpt2_falls_back(tiny_tokenizer):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    # After a cut GPT-2 would add its positions twice; the probe must notice.
    sites = sites_on(model, ["transformer.h.1.attn.c_attn", "transformer.h.2.attn.c_attn"])
    require_peft(model, tiny_tokenizer, sites, random_rows(4), cut=0)


@pytest.mark.parametrize(("kinds", "cut"), [("ffff", 3), ("ssss", 3), ("sfsf", 0), ("ssff", 0), ("sfff", 0)])
def test_mixed_attention_is_not_cut(tiny_tokenizer, kinds, cut):
    """Only models whose layers are all of one kind may be cut at layer 3.

    The window is longer than the probe, so the probe cannot tell, and shorter than the rows, so they would.
    """
    names = {"f": "full_attention", "s": "sliding_attention"}
    window = {
        "use_sliding_window": True,
        "sliding_window": PROBE_TOKENS + 2,
        "layer_types": [names[kind] for kind in kinds],
    }
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, **window))
    sites = top_sites(model, (3,))
    require_peft(model, tiny_tokenizer, sites, random_rows(4, longest=60), cut=cut)


def test_scaled_logits_are_the_models_own(tiny_tokenizer):
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0, embedding_multiplier=12.0))
    require_peft(model, tiny_tokenizer, top_sites(model), random_rows(4), cut=0)


def test_padding_does_not_matter(double):
    adapted, stacked = double
    short, long = Row((7, 8, 9), 2), Row(tuple(range(6, 40)), 30)
    alone = logits_of(adapted, [short], stacked)
    assert_close(logits_of(adapted, [short, long], stacked)[:, :1], alone, **EXACT)


def test_base_and_hooks_are_left_alone(double):
    adapted, stacked = double
    model = adapted.base.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    a, b = (factor.requires_grad_(True) for factor in stacked[adapted.sites[0].name])
    rows = random_rows(3)
    logits, _, _ = adapted.answer_logits(rows, adapted.inputs(rows), stacked)
    logits.sum().backward(inputs=[a, b])
    assert a.grad.abs().max() > 0
    assert b.grad.abs().max() > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_exception(double):
    adapted, stacked = double
    rows = random_rows(3)
    broken = {name: (a[..., 1:], b) for name, (a, b) in stacked.items()}
    with pytest.raises(Exception, match=r"shape|size|dimension|fan_in"):
        adapted.answer_logits(rows, adapted.inputs(rows), broken)
    with applied(adapted.base.model, adapted.sites, stacked):
        assert any(module._forward_hooks for module in adapted.base.model.modules())
    assert not any(module._forward_hooks for module in adapted.base.model.modules())


def test_bad_use_is_refused(double, tiny_tokenizer):
    adapted, stacked = double
    rows = random_rows(4)
    with pytest.raises(ValueError, match="4 rows cannot be shared evenly by 3 adapters"):
        adapted.answer_logits(rows, adapted.inputs(rows), stacked)
    adapted.base.model.train()
    with pytest.raises(ValueError, match=r"'tiny/llama' is in training mode; call model.eval"):
        AdaptedBase(adapted.base, adapted.sites)
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        make_row(tiny_tokenizer, None, Example("w7", "w8"))


def test_row_is_question_answer_end(tiny_tokenizer):
    example = Example("w7 w8", "w9", ("w9", "w10"))
    row = make_row(tiny_tokenizer, "w20 w21", example)
    assert tiny_tokenizer.convert_ids_to_tokens(row.ids) == [
        *["w20", "w21", "Input:", "w7", "w8", "Output:", "w9", "</s>"]
    ]
    assert row.answer == 6
    assert make_row(tiny_tokenizer, None, example, "w10").ids[3:] == (5, 10, 2)
    assert example_text(None, "x") == "Input: x\nOutput:"


def test_shots_stand_between_prompt_and_question(tiny_tokenizer):
    shots = (Example("w30", "w31"), Example("w32", "w33 w34"))
    row = make_row(tiny_tokenizer, "w20 w21", Example("w7", "w9"), shots=shots)
    assert tiny_tokenizer.convert_ids_to_tokens(row.ids) == [
        *["w20", "w21", "Input:", "w30", "Output:", "w31", "</s>"],
        *["Input:", "w32", "Output:", "w33", "w34", "</s>"],
        *["Input:", "w7", "Output:", "w9", "</s>"],
    ]
    assert row.ids[row.answer :] == make_row(tiny_tokenizer, None, Example("w7", "w9")).ids[3:]
    alone = make_row(tiny_tokenizer, None, Example("w7", "w9"), shots=shots)
    assert (alone.ids, alone.answer) == (row.ids[2:], row.answer - 2)  # the prompt stands once


def test_answer_positions_predict_the_answer():
    owner, place, target = answer_positions([Row((5, 6, 7, 2), 2), Row((8, 9), 1)])
    assert owner.tolist() == [0, 0, 1]
    assert place.tolist() == [1, 2, 0]
    assert target.tolist() == [7, 2, 9]


def test_stack_and_unstack_are_inverse_copies(double):
    adapted, _ = double
    stacked = random_stacked(adapted.sites, 2)
    adapters = [unstack_adapter(stacked, index) for index in range(2)]
    again = stack_adapters(adapters)
    for name, (a, b) in stacked.items():
        assert torch.equal(again[name][0], a)
        assert torch.equal(again[name][1], b)
        a.zero_()
        assert adapters[0][name][0].abs().min() > 0, "an unstacked adapter must not alias the live factors"


@pytest.mark.parametrize("most", [1, 12, 40, 10_000])
def test_batches_hold_every_index_once(most):
    lengths = [3, 9, 4, 11, 2, 2, 8, 30]
    order = [4, 5, 0, 2, 6, 1, 3, 7]
    batches = list(batches_by_tokens(order, lengths, most))
    assert [index for batch in batches for index in batch] == order
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= most
