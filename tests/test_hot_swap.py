"""A generated adapter over a loaded one: the same as a fresh load, in place, or nothing at all."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ltdi_peft.adapter import attach, read_adapter
from ltdi_peft.base import load_base
from ltdi_peft.generator import load_generator
from ltdi_peft.provenance import provenance_of
from ltdi_peft.spec import BrokenAdapterError, SpecMismatchError

IDS = torch.tensor([[10, 13, 17, 20, 21, 5, 6]])


@pytest.fixture
def made(world):
    """Two generated adapters that differ."""
    base = load_base(str(world.base), dtype="float32")
    generator = load_generator(world.recipe.generator_folder)
    one, other = (generator.generate(["please a second twice"], seed=s, base=base)[0] for s in (0, 1))
    sites = {site: (a, b + 0.1) for site, (a, b) in other.adapter.items()}
    return one, replace(other, adapter=sites)


def loaded(world, made):
    return attach(load_base(str(world.base), dtype="float32").model, made.spec, made.adapter)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_swapped_adapter_is_a_loaded_one(world, made):
    one, other = made
    model, fresh = loaded(world, one), loaded(world, other)
    before, parameters = logits(model), {name: id(p) for name, p in model.named_parameters()}
    assert other.swap_into(model) is model
    assert torch.equal(logits(model), logits(fresh))
    assert not torch.equal(logits(model), before)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert provenance_of(model) == other.provenance


def test_the_other_adapters_of_a_model_stay(world, made):
    one, other = made
    model = loaded(world, one)
    attach(model, one.spec, one.adapter, "second")
    other.swap_into(model, "second")
    for site, (a, b) in read_adapter(model, "default").items():
        assert torch.equal(a, one.adapter[site][0])
        assert torch.equal(b, one.adapter[site][1])
    assert torch.equal(read_adapter(model, "second")[site][1], other.adapter[site][1])


def test_what_does_not_fit_changes_nothing(world, made):
    one, other = made
    model = loaded(world, one)
    before = logits(model)
    site = next(iter(other.adapter))
    a, b = other.adapter[site]
    spoilt = b.clone()
    spoilt[0, 0] = torch.nan
    broken = replace(other, adapter={**other.adapter, site: (a, spoilt)})
    with pytest.raises(BrokenAdapterError, match=rf"{site}, lora_B: 1 of .* NaN"):
        broken.swap_into(model)
    with pytest.raises(ValueError, match=r"no adapter 'second', only \['default'\]"):
        other.swap_into(model, "second")
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the base weights; unmerge"):
        other.swap_into(model)


def test_an_adapter_of_another_rank_is_refused(world, made):
    base = load_base(str(world.base), dtype="float32").model
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(SpecMismatchError, match=r"hot swap of 'default': "):
        made[0].swap_into(get_peft_model(base, config))
