"""4-bit base models by bitsandbytes, with gradients that are right.

In: a compute dtype, or a loaded model.  Out: the setting that loads NF4; the model, fit for training.
Idea: on a CPU with AVX512-BF16, bitsandbytes repacks a layer for a kernel without a backward pass as soon as
the layer runs once in evaluation mode without gradients. From then on no gradient comes through that layer,
and torch says so in a warning at most. Here models are scored and trained in turn, so repacking is off.
Source: QLoRA, arXiv:2305.14314; `Linear4bit.forward` of bitsandbytes 0.50.2, tried.
"""

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin


def four_bit_config(compute_dtype: torch.dtype) -> QuantizationConfigMixin:
    """NF4 with double quantisation. ImportError says how to install bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs bitsandbytes: pip install 'ltdi_peft[4bit]'.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def four_bit_layers(model: nn.Module) -> list[nn.Module]:
    """The model's 4-bit linear layers; none without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    from bitsandbytes.nn.modules import Linear4bit  # an optional dependency

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def keep_gradients(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` in the layout that has a backward pass; full layers are not touched.

    A layer that was repacked already is laid out as before: its 4-bit weights bit for bit, their scales with
    the rounding to bfloat16 that repacking took.
    """
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        layer.state_dict()  # undoes a repacking in place; bitsandbytes has no other public way
