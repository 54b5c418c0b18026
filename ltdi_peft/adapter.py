"""Adapters in and out of PEFT: models, folders, and the proof that what was loaded is what was meant.

In: a `PeftModel`, or a folder that PEFT wrote.  Out: an `Adapter` and its `AdapterSpec`, and back again as an
ordinary PEFT adapter that every tool loads. The only file that touches PEFT's internals.
Idea: PEFT loads an adapter with renamed keys, without its prefix, full of NaN or made for another base model
without an error; here each is refused by name, before anything is changed.
Source: PEFT 0.21; what it does with broken folders was tried, not read."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ltdi_peft.files import replacing
from ltdi_peft.spec import Adapter as Adapter
from ltdi_peft.spec import AdapterSpec as AdapterSpec
from ltdi_peft.spec import BrokenAdapterError as BrokenAdapterError
from ltdi_peft.spec import Factors as Factors
from ltdi_peft.spec import Site as Site
from ltdi_peft.spec import SpecMismatchError as SpecMismatchError
from ltdi_peft.spec import UnsupportedAdapterError as UnsupportedAdapterError
from ltdi_peft.spec import check_adapter as check_adapter
from ltdi_peft.spec import delta_norm as delta_norm
from ltdi_peft.spec import delta_w as delta_w
from ltdi_peft.spec import lora_scaling, require_fit, require_sites
from ltdi_peft.spec import require_same_spec as require_same_spec
from ltdi_peft.spec import site_norms as site_norms

PREFIX = "base_model.model."  # what PeftModel puts before the base model's own module paths
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# These describe the folder or the moment, not the adapter, and would make equal specs differ.
VOLATILE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


# ---- what cannot be expressed as {site: (A, B)}

UNSUPPORTED = {  # LoraConfig field that is set → what it does beyond ΔW = scaling · B A on linear layers
    "alora_invocation_tokens": "activated LoRA acts only after certain tokens",
    "arrow_config": "Arrow routes between several adapters",
    "ensure_weight_tying": "tied adapters share weights between sites",
    "kasa_config": "KaSA adds singular values",
    "layer_replication": "layer replication changes the base model",
    "lora_bias": "a bias on lora_B is a third factor",
    "megatron_config": "Megatron layers are sharded",
    "modules_to_save": "whole trained modules are not low-rank factors; drop modules_to_save (PEFT adds the "
    "head by itself for task_type SEQ_CLS, TOKEN_CLS and QUESTION_ANS: leave task_type out, the head frozen)",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "factors on bare parameters (MoE experts) are not one linear layer each; use "
    "target_modules",
    "trainable_token_indices": "trained token embeddings are not low-rank factors",
    "use_bdlora": "block-diagonal LoRA has another parameterisation",
    # peft 0.21's save_as_lora takes DoRA and drops the magnitudes: what it writes is another adapter.
    "use_dora": "DoRA adds magnitude vectors, which no LoRA holds; train with use_dora=False",
    "use_qalora": "QA-LoRA pools the input",
    "velora_config": "VeLoRA changes the forward pass",
}
# All of these leave the base weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract their start from
# the base weights, so that their factors fit no other copy of the base model; MiCA freezes B instead of A.
PORTABLE_INITS = (True, False, "gaussian", "orthogonal", "eva")
# Beginnings of the inits whose adapters PEFT can save as plain LoRA of twice the rank.
CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedAdapterError with the name of the first feature that factors alone cannot carry."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedAdapterError(
            f"{where}: peft_type is {config['peft_type']}, only LORA is supported. Types that add to "
            "the base weights (LoHa, LoKr, VeRA, …) become LoRA by peft.save_as_lora(folder, model, rank=…)."
        )
    for name, reason in UNSUPPORTED.items():
        if config.get(name):
            raise UnsupportedAdapterError(f"{where}: {name}={config[name]!r} is not supported: {reason}.")
    if (bias := config.get("bias", "none")) != "none":
        raise UnsupportedAdapterError(
            f"{where}: bias={bias!r} trains the base model's biases; use bias='none'."
        )
    if (init := config.get("init_lora_weights", True)) not in PORTABLE_INITS:
        raise UnsupportedAdapterError(
            f"{where}: init_lora_weights={init!r} may change the base weights, so that the factors do not "
            f"fit a clean copy of it; {_way_out(init)}train with one of {PORTABLE_INITS}."
        )
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key, value in config.items() if key not in known and value):
        raise UnsupportedAdapterError(
            f"{where}: settings {unknown} are unknown to peft {peft.__version__}; upgrade peft."
        )


def _way_out(init: object) -> str:
    """PEFT's own conversion, for the inits that have one."""
    if not str(init).lower().startswith(CONVERTIBLE_INITS):
        return ""
    return (
        "save it as plain LoRA, of twice the rank, by PEFT's model.save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=<the adapter saved before its first step>), or "
    )


def _jsonable(value: object) -> list[Any]:
    """What json cannot write: PEFT's sets of names, whose order changes with the hash seed."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise UnsupportedAdapterError(f"LoraConfig holds {value!r}, which JSON cannot express.")


def _config_table(config: dict[str, Any]) -> dict[str, Any]:
    """A LoraConfig's dict as JSON, keys sorted; nested order stays: the first matching rank pattern wins."""
    # Weights always come with the config, so how they were once initialised no longer matters.
    settled = {**config, "init_lora_weights": True, "eva_config": None}
    known = {field.name for field in fields(LoraConfig)} - set(VOLATILE)
    table = json.loads(
        json.dumps({key: settled[key] for key in sorted(known & set(settled))}, default=_jsonable)
    )
    for name in ("target_modules", "exclude_modules"):
        if isinstance(table.get(name), list):
            table[name] = sorted(table[name])
    return table


# ---- out of a model


def lora_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """The model's LoRA layers that carry this adapter, by site name, sorted."""
    if adapter_name not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter_name!r}, only {sorted(model.peft_config)}.")
    where = f"adapter {adapter_name!r}"
    _refuse_unsupported(model.peft_config[adapter_name].to_dict(), where)
    layers = {
        name.removeprefix("_orig_mod."): module  # torch.compile puts that in front
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    for name, layer in layers.items():
        if not _is_linear(layer, adapter_name):
            kind = type(layer.get_base_layer()).__name__
            raise UnsupportedAdapterError(
                f"{where}: site {name} is a {kind}, only linear layers are supported."
            )
    return dict(sorted(layers.items()))


def _is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether ΔW = B A is all there is; attention modules hide another weight inside."""
    if adapter_name not in layer.lora_A or isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return False
    return isinstance(layer.lora_A[adapter_name], nn.Linear) and isinstance(
        layer.lora_B[adapter_name], nn.Linear
    )


def live_factors(model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's own parameters (A, B) by site, NOT copies: the walk that a recorder does once per run.

    Raises UnsupportedAdapterError where a parameter is a shard (FSDP, ZeRO-3) instead of the whole factor.
    """
    live = {}
    for name, layer in lora_layers(model, adapter_name).items():
        a, b = (half[adapter_name].get_parameter("weight") for half in (layer.lora_A, layer.lora_B))
        rank = layer.r[adapter_name]
        fan_in, fan_out = _fans(layer)
        expected = (rank, fan_in), (fan_out, rank)
        if (tuple(a.shape), tuple(b.shape)) != expected or type(a.data) is not Tensor:
            raise UnsupportedAdapterError(
                f"site {name}: factors have shapes {tuple(a.shape)} and {tuple(b.shape)} "
                f"({type(a.data).__name__}), expected {expected}. Sharded weights (FSDP, DeepSpeed ZeRO-3, "
                "tensor parallel) are not supported; use DDP, or ZeRO-2 at most."
            )
        live[name] = (a, b)
    return live


def read_adapter(model: PeftModel, adapter_name: str = "default") -> Adapter:
    """A copy on the CPU in float32: PEFT's own state dict is a view of the live weights. No Hub look-up."""
    return copy_of(live_factors(model, adapter_name))


def copy_of(live: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
    """`live_factors` as they are now: a copy on the CPU in float32."""
    return {name: (_detached(a), _detached(b)) for name, (a, b) in live.items()}


def _detached(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()


def spec_of(model: PeftModel, adapter_name: str = "default", *, base_model: str | None = None) -> AdapterSpec:
    """The site table and configuration of one adapter of a model.

    `base_model` overrides the name that PEFT noted, e.g. the Hub id of a model loaded from a local copy.
    Raises UnsupportedAdapterError for anything that is not plain LoRA on linear layers.
    """
    layers = lora_layers(model, adapter_name)
    if not layers:
        raise UnsupportedAdapterError(f"adapter {adapter_name!r} sits on no linear layer.")
    config = model.peft_config[adapter_name]
    table = _config_table(config.to_dict())
    sites = tuple(_site_of(name, layer, adapter_name, table) for name, layer in layers.items())
    return AdapterSpec(base_model or config.base_model_name_or_path or "", sites, table)


def _site_of(name: str, layer: LoraLayer, adapter_name: str, config: dict[str, Any]) -> Site:
    rank, alpha = layer.r[adapter_name], float(layer.lora_alpha[adapter_name])
    scaling = lora_scaling(rank, alpha, config["use_rslora"])
    if not math.isclose(layer.scaling[adapter_name], scaling, rel_tol=1e-9):
        raise UnsupportedAdapterError(
            f"site {name}: scaling is {layer.scaling[adapter_name]}, but rank {rank} and alpha {alpha} "
            f"mean {scaling}. It was changed on the live model (set_scale, scale_layer); undo it."
        )
    return Site(name, *_fans(layer), rank, alpha, scaling)


# ---- into a model


def set_adapter_weights(model: PeftModel, adapter: Adapter, adapter_name: str = "default") -> None:
    """Overwrite the adapter's weights in place; BrokenAdapterError, before any change, unless all fit."""
    live = live_factors(model, adapter_name)
    require_sites(set(live), set(adapter), f"adapter {adapter_name!r}")
    for name, pair in adapter.items():
        for kind, old, new in zip("AB", live[name], pair, strict=True):
            require_fit(new, tuple(old.shape), f"adapter {adapter_name!r}, site {name}, lora_{kind}")
    with torch.no_grad():
        for name, (a, b) in adapter.items():
            live[name][0].copy_(a)
            live[name][1].copy_(b)


def refuse_merged(model: PeftModel, adapter_name: str = "default") -> None:
    """ValueError for an adapter that is merged into the base weights: other factors would not reach them."""
    layers = lora_layers(model, adapter_name).values()
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base weights; unmerge it first.")


def lora_config(spec: AdapterSpec) -> LoraConfig:
    """A fresh LoraConfig that selects the spec's sites on its base model."""
    _refuse_unsupported(spec.config, f"adapter for {spec.base_model}")
    known = {field.name for field in fields(LoraConfig)}
    config = LoraConfig(**{key: value for key, value in spec.config.items() if key in known})
    config.base_model_name_or_path = spec.base_model or None
    return config


def attach(
    base_model: PreTrainedModel | PeftModel | nn.Module,
    spec: AdapterSpec,
    adapter: Adapter,
    adapter_name: str = "default",
) -> PeftModel:
    """Put `adapter` on a base model (wrapped in place), or beside the others of a `PeftModel`; activate it.

    Base weights stay bit for bit what they are, the global random state too. The new weights are copies.
    Raises ValueError for a name in use and SpecMismatchError for a base model with other sites, both before
    anything is changed.
    """
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        raise ValueError(
            f"the model already has an adapter {adapter_name!r}; choose another adapter_name (in use: "
            f"{sorted(base_model.peft_config)}) or delete it first."
        )
    check_adapter(spec, adapter, f"adapter {adapter_name!r}")
    config = lora_config(spec)
    root = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    training = root.training
    require_base(root, spec)
    config.base_model_name_or_path = None  # get_peft_model would warn that it puts a local path there
    # On the meta device, so that PEFT's random start costs neither time nor random numbers.
    if isinstance(base_model, PeftModel):
        base_model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
        model = base_model
    else:
        model = get_peft_model(base_model, config, adapter_name, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
    _load_state(model, adapter, adapter_name)
    config.base_model_name_or_path = spec.base_model or None
    model.set_adapter(adapter_name)
    return model.train(training)  # PEFT's new modules are in training mode, dropout included


def require_base(root: nn.Module, spec: AdapterSpec) -> None:
    """SpecMismatchError for a base model whose matching layers are not exactly the spec's sites."""
    config = lora_config(spec)
    modules = dict(root.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, LoraLayer))
    where = f"{type(root).__name__} does not fit an adapter made for {spec.base_model or 'another model'}"
    found = {
        name for name in modules if not name.startswith(inside) and check_target_module_exists(config, name)
    }
    expected = {site.name for site in spec.sites}
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise SpecMismatchError(
            f"{where}: expected {len(expected)} sites, {len(found)} match, first difference {odd}. "
            "Load the base model that the adapter names."
        )
    for site in spec.sites:
        if (fans := _fans(modules[site.name])) != (site.fan_in, site.fan_out):
            raise SpecMismatchError(
                f"{where}: site {site.name} has (fan_in, fan_out) = {fans}, "
                f"expected {(site.fan_in, site.fan_out)}."
            )


def _fans(module: nn.Module | LoraLayer) -> tuple[int, int]:
    """(fan_in, fan_out) of a linear layer, quantised, wrapped by PEFT, or stored transposed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, LoraLayer) and module.in_features and module.out_features:
        return module.in_features, module.out_features
    raise UnsupportedAdapterError(f"{type(module).__name__} is not a linear layer.")


def _load_state(model: PeftModel, adapter: Adapter, adapter_name: str) -> None:
    state = {f"{PREFIX}{key}": weight.clone() for key, weight in _named(adapter).items()}
    outcome = set_peft_model_state_dict(model, state, adapter_name=adapter_name, low_cpu_mem_usage=True)
    if outcome.unexpected_keys:
        raise BrokenAdapterError(f"PEFT did not take the keys {outcome.unexpected_keys[:3]}.")
    # PEFT puts them into the base's dtype. In float32, where `PeftModel.from_pretrained` ends too, nothing is
    # rounded on a 16-bit base, and `refine` can take small steps.
    for layer in lora_layers(model, adapter_name).values():
        for half in (layer.lora_A, layer.lora_B):
            half[adapter_name].float()
    set_adapter_weights(model, adapter, adapter_name)


def _named(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's flat names (without the prefix) in token order."""
    return {
        f"{site}.lora_{kind}.weight": weight
        for site, pair in sorted(adapter.items())
        for kind, weight in zip("AB", pair, strict=True)
    }


# ---- folders that PEFT reads and writes


def save_adapter_folder(
    path: str | Path, spec: AdapterSpec, adapter: Adapter, *, overwrite: bool = False
) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT writes them; equal input gives equal bytes.

    A reader sees finished files only, the configuration last. Raises FileExistsError rather than replace an
    adapter, BrokenAdapterError for weights that do not fit `spec`.
    """
    path = Path(path)
    check_adapter(spec, adapter, f"adapter for {path}")
    if not overwrite and ((path / CONFIG_FILE).exists() or (path / WEIGHTS_FILE).exists()):
        raise FileExistsError(f"{path} already holds an adapter; choose another folder.")
    table = {**lora_config(spec).to_dict(), "inference_mode": True}
    text = json.dumps(dict(sorted(table.items())), indent=2, default=_jsonable)
    state = {f"{PREFIX}{key}": weight.contiguous() for key, weight in _named(adapter).items()}
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / WEIGHTS_FILE) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    with replacing(path / CONFIG_FILE) as partial:
        partial.write_text(text)


def load_adapter_folder(
    path: str | Path, *, expected: AdapterSpec | None = None
) -> tuple[AdapterSpec, Adapter]:
    """Read a PEFT adapter folder (safetensors only) and refuse, by name, all that PEFT would load in silence.

    Raises BrokenAdapterError (missing, renamed, mis-shaped, not finite), UnsupportedAdapterError (not plain
    LoRA on linear layers) and, with `expected`, SpecMismatchError (another base model, rank, site set).
    """
    path = Path(path)
    table = _read_config(path / CONFIG_FILE)
    adapter = _read_weights(path / WEIGHTS_FILE)
    config = LoraConfig(**_config_table(table))
    sites = tuple(_site_from(path, name, a, b, config) for name, (a, b) in adapter.items())
    spec = AdapterSpec(table.get("base_model_name_or_path") or "", sites, _config_table(config.to_dict()))
    check_adapter(spec, adapter, str(path))
    if expected is not None:
        require_same_spec(expected, spec, str(path))
    return spec, adapter


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BrokenAdapterError(
            f"{file} does not exist; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    try:
        table = json.loads(file.read_text())
    except ValueError as error:
        raise BrokenAdapterError(f"{file} is not JSON: {error}") from error
    if not isinstance(table, dict) or ("r" not in table and table.get("peft_type", "LORA") == "LORA"):
        raise BrokenAdapterError(f"{file} is no LoRA configuration: it names no rank r.")
    _refuse_unsupported(table, str(file))
    if not table.get("target_modules"):
        raise BrokenAdapterError(f"{file} names no target_modules, so nothing says where the factors belong.")
    return table


def _read_weights(file: Path) -> Adapter:
    if not file.is_file():
        raise BrokenAdapterError(
            f"{file} does not exist. Pickled weights (adapter_model.bin) are not read, they may run code; "
            "PeftModel.from_pretrained, then save_pretrained, writes safetensors."
        )
    try:
        with safe_open(file, framework="pt") as reader:
            weights = {key: reader.get_tensor(key).to(torch.float32) for key in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BrokenAdapterError(
            f"{file} is truncated or no safetensors file ({error}); copy it again."
        ) from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, weight in sorted(weights.items()):
        site, kind = _parse_key(key, file)
        pairs.setdefault(site, {})[kind] = weight.contiguous()
    if not pairs:
        raise BrokenAdapterError(f"{file} holds no weights.")
    if half := [site for site, pair in pairs.items() if len(pair) != 2]:
        raise BrokenAdapterError(
            f"{file}: site {half[0]} has only {list(pairs[half[0]])}, expected lora_A and lora_B."
        )
    return {site: (pair["lora_A"], pair["lora_B"]) for site, pair in sorted(pairs.items())}


def _parse_key(key: str, file: Path) -> tuple[str, str]:
    """(site, "lora_A" | "lora_B"); any other name is one that PEFT would skip with a warning at most."""
    if not key.startswith(PREFIX):
        raise BrokenAdapterError(
            f"{file}: key {key!r} lacks the prefix {PREFIX!r}; PEFT would load it without effect."
        )
    if ".base_layer." in key:
        raise BrokenAdapterError(
            f"{file}: {key!r} is a base weight, which PEFT saves with an adapter on an embedding; save again "
            "with save_embedding_layers=False."
        )
    if not (match := re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key.removeprefix(PREFIX))):
        raise BrokenAdapterError(
            f"{file}: key {key!r} is not <site>.lora_A.weight or <site>.lora_B.weight; was it renamed?"
        )
    return match[1], match[2]


def _site_from(path: Path, name: str, a: Tensor, b: Tensor, config: LoraConfig) -> Site:
    """The site that a pair of factors and the configuration agree on."""
    targets = config.target_modules
    # PEFT expands the shorthand "all-linear" when it meets the model; there is no name to compare with yet.
    if targets != "all-linear" and not check_target_module_exists(config, name):
        raise BrokenAdapterError(
            f"{path / WEIGHTS_FILE}: site {name} is none of target_modules={_shown(targets)}; "
            "PEFT would ignore its weights. Were the keys renamed?"
        )
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
        raise BrokenAdapterError(
            f"{path / WEIGHTS_FILE}: site {name} has factors {tuple(a.shape)} and {tuple(b.shape)}, "
            f"but {CONFIG_FILE} gives it rank {rank}: expected ({rank}, fan_in) and (fan_out, {rank})."
        )
    scaling = lora_scaling(rank, float(alpha), config.use_rslora)
    return Site(name, a.shape[1], b.shape[0], rank, float(alpha), scaling)


def _shown(targets: object) -> object:
    return sorted(targets) if isinstance(targets, (set, list)) else targets


# ---- proofs


def prove_loaded(
    model: PeftModel,
    spec: AdapterSpec,
    adapter: Adapter,
    probe_ids: Int[Tensor, "batch position"],
    norm_range: dict[str, tuple[float, float]] | None = None,
    *,
    adapter_name: str = "default",
) -> None:
    """Raise BrokenAdapterError unless `adapter` is what the model computes with, and it has an effect.

    Checks: all finite, keys complete, same spec, weights equal, ‖ΔW‖ per site inside `norm_range` (lowest,
    highest), and logits on `probe_ids` finite and other than with the adapter switched off.
    """
    where = f"adapter {adapter_name!r}"
    check_adapter(spec, adapter, where)
    require_same_spec(spec, spec_of(model, adapter_name), where)
    for name, live in live_factors(model, adapter_name).items():
        for kind, have, want in zip("AB", live, adapter[name], strict=True):
            if not torch.equal(have.detach().cpu(), want.to(have.dtype)):
                raise BrokenAdapterError(f"{where}: site {name}, lora_{kind}: the model holds other weights.")
    _require_norms(spec, adapter, norm_range or {}, where)
    _require_effect(model, probe_ids, where)


def _require_norms(
    spec: AdapterSpec, adapter: Adapter, norm_range: dict[str, tuple[float, float]], where: str
) -> None:
    norms = site_norms(spec, adapter)
    for name, (lowest, highest) in norm_range.items():
        # One part in 10⁵ of slack: a norm that was clamped to the bound comes back with float32 rounding.
        if not lowest * (1 - 1e-5) <= norms[name] <= highest * (1 + 1e-5):
            raise BrokenAdapterError(
                f"{where}: site {name} has ‖ΔW‖ = {norms[name]:.4g}, outside [{lowest:.4g}, {highest:.4g}]."
            )


def _require_effect(model: PeftModel, probe_ids: Int[Tensor, "batch position"], where: str) -> None:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    ids = probe_ids.to(model.device)
    try:
        with torch.no_grad():
            adapted = _logits(model, ids)
            with model.disable_adapter():
                plain = _logits(model, ids)
    finally:
        for module, training in modes.items():
            module.training = training
    if not torch.isfinite(adapted).all():
        raise BrokenAdapterError(f"{where}: the model's logits are NaN or infinite.")
    if torch.equal(adapted, plain):
        raise BrokenAdapterError(
            f"{where} has no effect: logits are the same without it. Is it active and not zero?"
        )


def _logits(model: PeftModel, ids: Int[Tensor, "batch position"]) -> Tensor:
    """Of a forward pass; an encoder-decoder also needs something to decode."""
    decoded = {"decoder_input_ids": ids} if model.get_base_model().config.is_encoder_decoder else {}  # pyright: ignore[reportAttributeAccessIssue]
    return model(input_ids=ids, **decoded).logits


def top_config(
    base_model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    top_layers: int | None,
) -> LoraConfig:
    """LoRA on the top layers, None the top third. ValueError for more layers than the model has."""
    depth = base_model.config.num_hidden_layers
    count = max(1, depth // 3) if top_layers is None else top_layers
    if not 1 <= count <= depth:
        raise ValueError(f"adapter.layers is {count}; {base_model.name_or_path} has {depth} layers.")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT takes a float, though it says int
        target_modules=sorted(target_modules),
        layers_to_transform=list(range(depth - count, depth)),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in targeted(base_model, target_modules)),
        task_type="CAUSAL_LM",
    )


def fresh_adapter(
    base_model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    top_layers: int | None,
    seed: int,
) -> tuple[AdapterSpec, Adapter]:
    """What PEFT starts a LoRA with (A random, B = 0) on the top layers; the base model is left as it was.

    top_layers: adapt so many layers from the top, None the top third. The same seed gives the same A.
    """
    config = top_config(
        base_model, rank=rank, alpha=alpha, target_modules=target_modules, top_layers=top_layers
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base_model, config)
    found = spec_of(model, base_model=base_model.name_or_path), read_adapter(model)
    model.unload()
    return found


def targeted(base_model: nn.Module, target_modules: Sequence[str]) -> list[nn.Module]:
    """The modules whose own name is one of `target_modules`."""
    return [m for name, m in base_model.named_modules() if name.rpartition(".")[2] in target_modules]
