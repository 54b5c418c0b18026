"""Adapters and rows on tiny models, and PEFT's own model with one of those adapters as the reference."""

import copy
import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ltdi_peft.batched import Row, Stacked
from ltdi_peft.spec import Site

RANK, ALPHA = 4, 8.0


def sites_on(model, names) -> tuple[Site, ...]:
    """A site for each module path, in token order."""
    found = []
    for name in sorted(names):
        fan_out, fan_in = model.get_submodule(name).weight.shape
        if "c_attn" in name:  # GPT-2's Conv1D keeps its weight transposed
            fan_in, fan_out = fan_out, fan_in
        found.append(Site(name, fan_in, fan_out, RANK, ALPHA, ALPHA / RANK))
    return tuple(found)


def top_sites(model, layers=(2, 3)) -> tuple[Site, ...]:
    """q_proj and v_proj of these layers of a Llama-like model."""
    kinds = ("q_proj", "v_proj")
    return sites_on(model, [f"model.layers.{layer}.self_attn.{kind}" for layer in layers for kind in kinds])


def random_stacked(sites, count, *, seed=0, dtype=torch.float32, scale=0.3) -> Stacked:
    """`count` adapters whose A and B are both random, so that every gradient is non-zero."""
    rng = torch.Generator().manual_seed(seed)
    return {
        site.name: (
            (scale * torch.randn(count, site.rank, site.fan_in, generator=rng, dtype=torch.float64)).to(
                dtype
            ),
            (scale * torch.randn(count, site.fan_out, site.rank, generator=rng, dtype=torch.float64)).to(
                dtype
            ),
        )
        for site in sites
    }


def one_of(stacked, index) -> Stacked:
    """A copy of adapter `index` as a stack of one."""
    return {
        name: (a[index : index + 1].clone(), b[index : index + 1].clone()) for name, (a, b) in stacked.items()
    }


def peft_twin(model, sites, stacked, index) -> PeftModel:
    """A copy of the base model with adapter `index`, made by PEFT alone."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="|".join(re.escape(site.name) for site in sites),
        fan_in_fan_out="c_attn" in sites[0].name,
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for site in sites:
            layer = twin.base_model.model.get_submodule(site.name)
            layer.lora_A["default"].weight.copy_(stacked[site.name][0][index])
            layer.lora_B["default"].weight.copy_(stacked[site.name][1][index])
    return twin.to(model.dtype).eval()


def factors_of(twin, sites):
    """{site: (A, B)} of a PEFT twin, detached."""
    layers = {site.name: twin.base_model.model.get_submodule(site.name) for site in sites}
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }


def random_rows(count, *, seed=0, longest=9, vocabulary=64) -> tuple[Row, ...]:
    """Rows of different lengths with answers of one to three tokens."""
    rng = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        length = int(torch.randint(least, most + 1, (), generator=rng))
        return torch.randint(6, vocabulary, (length,), generator=rng).tolist()

    made = [(tokens(2, longest), tokens(1, 3)) for _ in range(count)]
    return tuple(Row((*question, *answer), len(question)) for question, answer in made)


def peft_answer_logits(twin, rows):
    """The logits that predict every answer token, row after row, each row alone and unpadded."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = twin(input_ids=torch.tensor([row.ids])).logits[0]
            found.append(logits[row.answer - 1 : len(row.ids) - 1])
    return torch.cat(found)
