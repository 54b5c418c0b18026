"""Prompt encoders: unit vectors that depend on the prompt alone."""

import pytest
import torch
from torch.testing import assert_close

from ltdi_peft.condition import PromptEncoder, hashed_words, padded

PROMPTS = ("w7 w8 w9", "w10", "w11 w12 w13 w14 w15 w16 w17", "w9 w8 w7", "w30 w31")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32, sums in another order


@pytest.fixture
def encoder(tiny_wrapped):
    return PromptEncoder("base", base=tiny_wrapped())


def require_prompt_alone(encoder, prompts):
    """Unit float32 vectors, the same in every order, batch and padding, and different for other prompts."""
    found = encoder(prompts)
    assert found.dtype == torch.float32
    assert found.shape == (len(prompts), encoder.width)
    assert_close(found.norm(dim=1), torch.ones(len(prompts)), **CLOSE)
    assert_close(encoder(prompts[::-1]), found.flip(0), **CLOSE)
    assert_close(torch.cat([encoder([prompt]) for prompt in prompts]), found, **CLOSE)
    assert (torch.pdist(found) > 1e-2).all()


def test_base_encoder_reads_the_prompt_alone(encoder):
    require_prompt_alone(encoder, PROMPTS)


def test_batches_are_joined_in_order(encoder, monkeypatch):
    whole = encoder(PROMPTS)
    monkeypatch.setattr("ltdi_peft.condition.BATCH", 2)
    assert_close(encoder(PROMPTS), whole, **CLOSE)


def test_base_encoder_pools_the_middle_layer(encoder, tiny_wrapped):
    base = tiny_wrapped()
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        hidden = base.model(input_ids=ids, output_hidden_states=True).hidden_states[2].mean(1)
    assert_close(encoder(["w7 w8 w9"]), hidden / hidden.norm(), **CLOSE)


def test_padding_is_masked(tiny_tokenizer):
    ids, mask = padded(tiny_tokenizer, ["w7", "w8 w9 w10"])
    assert ids.tolist() == [[7, 0, 0], [8, 9, 10]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("prompts", [("",), ("w7", " \n"), ()])
def test_empty_prompts_are_refused(encoder, prompts):
    with pytest.raises(ValueError, match="a task prompt is empty; describe the task"):
        encoder(prompts)


def test_too_long_prompts_are_refused(encoder):
    with pytest.raises(ValueError, match="65 tokens, encoder 'base' reads at most 64"):
        encoder([" ".join(["w7"] * 65)])


def test_unknown_encoders_are_refused():
    with pytest.raises(
        ValueError,
        match=r"condition.encoder is 'bert'; known encoders are \['base', 'minilm', 'minilm_words'\]",
    ):
        PromptEncoder("bert")
    with pytest.raises(ValueError, match="'base' needs the base model"):
        PromptEncoder("base")


def test_hashed_words_count_what_prompts_share():
    same, other, more, marked = hashed_words(
        ["Count the words.", "Translate into French", "Count the words. Count.", 'Count the words. "']
    )
    assert_close(same.norm(), torch.tensor(1.0))
    assert (same != 0).sum() == 4  # three words and a full stop
    assert same @ other == 0
    assert 1 > same @ more > same @ other
    assert not torch.equal(same, marked)
    assert_close(hashed_words(["COUNT  the words."])[0], same)


@pytest.mark.slow
def test_words_stand_beside_the_embedding():
    prompts = ("Translate to French.", "Give the French translation.")
    both, alone = PromptEncoder("minilm_words"), PromptEncoder("minilm")
    require_prompt_alone(both, prompts)
    halves = both(prompts).split([alone.width, both.width - alone.width], dim=1)
    assert_close(halves[0] * 2**0.5, alone(prompts), **CLOSE)
    assert_close(halves[1] * 2**0.5, hashed_words(prompts), **CLOSE)


@pytest.mark.slow
def test_minilm_knows_what_prompts_mean():
    encoder = PromptEncoder("minilm")
    prompts = ("Translate to French.", "Give the French translation.", "Count the vowels in the word.")
    require_prompt_alone(encoder, prompts)
    found = encoder(prompts)
    assert found[0] @ found[1] > 0.6 > 0.4 > found[0] @ found[2]
