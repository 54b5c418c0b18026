import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from ltdi_peft.adapter import (
    AdapterSpec,
    BrokenAdapterError,
    SpecMismatchError,
    UnsupportedAdapterError,
    attach,
    delta_norm,
    delta_w,
    live_factors,
    load_adapter_folder,
    lora_config,
    prove_loaded,
    read_adapter,
    require_same_spec,
    save_adapter_folder,
    set_adapter_weights,
    site_norms,
    spec_of,
)
from ltdi_peft.spec import all_finite


def assert_same_adapter(got, expected):
    assert list(got) == list(expected) == sorted(expected)
    for site, (a, b) in expected.items():
        assert torch.equal(got[site][0], a)
        assert torch.equal(got[site][1], b)


def tiny_gpt2(**overrides):
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config).eval()
        base.name_or_path = "tiny/gpt2"
        settings = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
        model = get_peft_model(base, LoraConfig(**{**settings, **overrides}))
        for _, b in live_factors(model).values():
            torch.nn.init.normal_(b, std=0.1)
    return model


def test_read_is_pefts_state_dict_bit_for_bit(tiny_peft):
    model = tiny_peft()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = read_adapter(model)
    assert len(state) == 2 * len(adapter) == 8
    for site, (a, b) in adapter.items():
        assert torch.equal(a, state[f"base_model.model.{site}.lora_A.weight"])
        assert torch.equal(b, state[f"base_model.model.{site}.lora_B.weight"])
        assert a.is_contiguous()
        assert b.dtype == torch.float32


def test_read_is_a_copy(tiny_peft):
    model = tiny_peft()
    adapter = read_adapter(model)
    before = {site: (a.clone(), b.clone()) for site, (a, b) in adapter.items()}
    with torch.no_grad():
        for a, b in live_factors(model).values():
            a.add_(1)
            b.add_(1)
    assert_same_adapter(adapter, before)


def test_write_then_read_is_bit_exact(tiny_peft):
    source, target = tiny_peft(seed=1), tiny_peft(seed=2)
    set_adapter_weights(target, read_adapter(source))
    assert_same_adapter(read_adapter(target), read_adapter(source))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_base_plus_delta_w_is_pefts_merged_weight(tiny_peft, use_rslora):
    model = tiny_peft(
        use_rslora=use_rslora, rank_pattern={"v_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 3}
    )
    spec, adapter = spec_of(model), read_adapter(model)
    assert {site.rank for site in spec.sites} == {2, 4}
    assert {site.alpha for site in spec.sites} == {3.0, 8.0}
    base = {
        s.name: model.get_base_model().get_submodule(s.name).base_layer.weight.clone() for s in spec.sites
    }
    merged = model.merge_and_unload()
    for site in spec.sites:
        expected = base[site.name] + delta_w(*adapter[site.name], site.scaling)
        assert_close(merged.get_submodule(site.name).weight, expected, rtol=0, atol=1e-6)  # float32


def test_base_plus_delta_w_is_pefts_merged_weight_on_conv1d():
    model = tiny_gpt2()
    spec, adapter = spec_of(model), read_adapter(model)
    assert [(s.fan_in, s.fan_out) for s in spec.sites] == [(32, 96), (32, 96)]
    layers = {s.name: model.get_base_model().get_submodule(s.name).base_layer for s in spec.sites}
    assert all(isinstance(layer, Conv1D) for layer in layers.values())
    base = {name: layer.weight.clone() for name, layer in layers.items()}
    merged = model.merge_and_unload()
    for site in spec.sites:  # Conv1D stores (fan_in, fan_out)
        expected = base[site.name] + delta_w(*adapter[site.name], site.scaling).mT
        assert_close(merged.get_submodule(site.name).weight, expected, rtol=0, atol=1e-6)


def test_delta_norm_is_the_norm_of_delta_w():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=rng), torch.randn(20, 4, generator=rng)
    assert delta_norm(a, b, 0.5) == pytest.approx(delta_w(a, b, 0.5).norm().item(), rel=1e-6)


# ---- spec


def test_spec_survives_json_and_rebuilds_the_sites(tiny_base, tiny_peft):
    model = tiny_peft(layers_to_transform=[1], rank_pattern={"q_proj": 2}, use_rslora=True)
    spec = spec_of(model)
    assert [s.name for s in spec.sites] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    again = AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert spec_of(get_peft_model(tiny_base(), lora_config(again))) == spec
    assert spec.base_model == "tiny/llama"
    assert spec_of(model, base_model="hub/id").base_model == "hub/id"


def test_spec_refuses_unsorted_sites(tiny_peft):
    spec = spec_of(tiny_peft())
    with pytest.raises(ValueError, match="sorted and unique"):
        replace(spec, sites=spec.sites[::-1])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is a Embedding"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(tiny_base, overrides, name):
    model = get_peft_model(tiny_base(), LoraConfig(**{"target_modules": ["q_proj"], **overrides}))
    with pytest.raises(UnsupportedAdapterError, match=name):
        spec_of(model)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning:peft")  # Llama's layers have none
def test_lora_bias_is_refused_by_name(tiny_base):
    model = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(UnsupportedAdapterError, match="lora_bias"):
        spec_of(model)


def test_a_scaling_changed_on_the_live_model_is_refused(tiny_peft):
    model = tiny_peft()
    model.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    with pytest.raises(UnsupportedAdapterError, match="scaling"):
        spec_of(model)


def test_a_shard_is_refused(tiny_peft):
    model = tiny_peft()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data = torch.empty(0)  # what ZeRO-3 leaves on a process
    with pytest.raises(UnsupportedAdapterError, match=r"ZeRO-3.*not supported"):
        read_adapter(model)


def test_unknown_adapter_name(tiny_peft):
    with pytest.raises(ValueError, match=r"no adapter 'x', only \['default'\]"):
        read_adapter(tiny_peft(), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, "rank 2, expected 4"),
        ({"lora_alpha": 1}, "alpha 1.0, expected 8.0"),
        ({"target_modules": ["q_proj"]}, "v_proj is missing"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj is not expected"),
        ({"use_rslora": True}, "scaling 4.0, expected 2.0"),
    ],
)
def test_spec_mismatch_names_the_first_difference(tiny_peft, change, message):
    with pytest.raises(SpecMismatchError, match=message):
        require_same_spec(spec_of(tiny_peft()), spec_of(tiny_peft(**change)), "here")


def test_spec_mismatch_names_the_base_model_and_forgives_dropout(tiny_peft):
    spec = spec_of(tiny_peft())
    with pytest.raises(SpecMismatchError, match="base model 'other/base', expected 'tiny/llama'"):
        require_same_spec(spec, replace(spec, base_model="other/base"), "here")
    require_same_spec(spec, spec_of(tiny_peft(lora_dropout=0.1)), "here")


# ---- into a model


def test_set_refuses_before_it_changes_anything(tiny_peft):
    model = tiny_peft()
    before, adapter = read_adapter(model), read_adapter(model)
    first, last = min(adapter), max(adapter)
    for bad, message in [
        ({k: v for k, v in adapter.items() if k != last}, f"missing, first {last}"),
        ({**adapter, "model.x": adapter[first]}, "not in the model, first model.x"),
        ({**adapter, last: (adapter[last][0][:2], adapter[last][1])}, r"lora_A: shape is \(2, 32\)"),
        ({**adapter, last: (adapter[last][0], adapter[last][1] * torch.nan)}, "NaN or infinite"),
    ]:
        zeroed = {k: (a * 0, b) if k == first and len(bad) > 3 else (a, b) for k, (a, b) in bad.items()}
        with pytest.raises(BrokenAdapterError, match=message):
            set_adapter_weights(model, zeroed)
        assert_same_adapter(read_adapter(model), before)


def test_attach_wraps_in_place_and_leaves_the_base_alone(tiny_base, tiny_peft, probe_ids):
    source = tiny_peft()
    spec, adapter = spec_of(source), read_adapter(source)
    base = tiny_base()
    before = {name: w.clone() for name, w in base.state_dict().items()}
    state = torch.get_rng_state()
    model = attach(base, replace(spec, base_model="hub/id"), adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_base_model() is base
    assert not any(module.training for module in model.modules())
    after = {
        name.replace(".base_layer", ""): w for name, w in base.state_dict().items() if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=probe_ids).logits, source.eval()(input_ids=probe_ids).logits)
    assert model.peft_config["default"].base_model_name_or_path == "hub/id"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    with torch.no_grad():
        live_factors(model)[spec.sites[0].name][0].zero_()
    assert_same_adapter(adapter, read_adapter(source))  # the caller's tensors are not the live ones


def test_attach_adds_to_a_peft_model(tiny_peft, probe_ids):
    model, other = tiny_peft(seed=1), tiny_peft(seed=2)
    first, second = read_adapter(model), read_adapter(other)
    same = attach(model, spec_of(other), second, "second")
    assert same is model
    assert model.active_adapters == ["second"]
    assert_same_adapter(read_adapter(model, "default"), first)
    prove_loaded(model, spec_of(other), second, probe_ids, adapter_name="second")
    with pytest.raises(ValueError, match="already has an adapter 'second'"):
        attach(model, spec_of(other), second, "second")


def test_attach_refuses_another_base_before_changing_it(tiny_base, tiny_peft):
    source = tiny_peft()
    deeper = tiny_base(layers=3)
    with pytest.raises(SpecMismatchError, match=r"expected 4 sites, 6 match, .*layers\.2"):
        attach(deeper, spec_of(source), read_adapter(source))
    assert not any("lora" in name for name, _ in deeper.named_modules())
    gpt2 = tiny_gpt2().unload()
    with pytest.raises(SpecMismatchError, match="GPT2LMHeadModel does not fit"):
        attach(gpt2, spec_of(source), read_adapter(source))


def test_attach_refuses_another_width(tiny_base, tiny_peft):
    source = tiny_peft()
    base = tiny_base()
    base.model.layers[1].self_attn.v_proj = torch.nn.Linear(32, 8)
    with pytest.raises(SpecMismatchError, match=r"\(32, 8\), expected \(32, 16\)"):
        attach(base, spec_of(source), read_adapter(source))


# ---- folders


@pytest.fixture
def folder(tiny_peft, tmp_path):
    model = tiny_peft()
    save_adapter_folder(tmp_path / "adapter", spec_of(model), read_adapter(model))
    return tmp_path / "adapter"


def edit_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(change(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folder_round_trip(tiny_peft, folder):
    spec, adapter = load_adapter_folder(folder)
    assert spec == spec_of(tiny_peft())
    assert_same_adapter(adapter, read_adapter(tiny_peft()))
    load_adapter_folder(folder, expected=spec)


def test_reads_what_peft_saved_and_writes_what_peft_would(tiny_peft, tmp_path, folder):
    model = tiny_peft()
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    spec, adapter = load_adapter_folder(tmp_path / "peft")
    assert spec == spec_of(model)
    assert_same_adapter(adapter, read_adapter(model))
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    ours = json.loads((folder / "adapter_config.json").read_text())
    theirs["target_modules"] = sorted(theirs["target_modules"])  # PEFT writes a set
    assert ours == theirs
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in load_file(folder / "adapter_model.safetensors").items()
    }


LOAD_WITH_PEFT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from transformers import LlamaForCausalLM
from peft import PeftModel
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[2]).eval(), sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.load(sys.argv[3], weights_only=True)).logits
torch.save(logits, sys.argv[4])
assert not any(name.startswith("ltdi_peft") for name in sys.modules)
"""


@pytest.mark.parametrize(
    "overrides", [{}, {"layers_to_transform": [1], "use_rslora": True, "rank_pattern": {"v_proj": 2}}]
)
def test_peft_alone_loads_it_with_equal_logits(tiny_base, tiny_peft, tmp_path, probe_ids, overrides):
    model = tiny_peft(**overrides).eval()
    save_adapter_folder(tmp_path / "adapter", spec_of(model), read_adapter(model))
    tiny_base().save_pretrained(tmp_path / "base")
    torch.save(probe_ids, tmp_path / "ids.pt")
    arguments = [tmp_path / "adapter", tmp_path / "base", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", LOAD_WITH_PEFT, *map(str, arguments)], check=True, cwd=tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=probe_ids).logits)


def test_full_names_hit_no_other_module(tiny_base, tmp_path):
    """PEFT matches list entries as suffixes: "0.self_attn.q_proj" and "1…" must not pull in the rest."""
    sites = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    model = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=sites))
    save_adapter_folder(tmp_path / "a", spec_of(model), read_adapter(model))
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "a")
    assert [s.name for s in spec_of(loaded).sites] == sites


def renamed(weights):
    return {key.replace("self_attn", "attention"): w for key, w in weights.items()}


def renamed_factor(weights):
    return {key.replace("lora_A.weight", "lora_down.weight"): w for key, w in weights.items()}


def renamed_site(weights):
    return {key.replace("q_proj", "query"): w for key, w in weights.items()}


def without_prefix(weights):
    return {key.removeprefix("base_model.model."): w for key, w in weights.items()}


def with_nan(weights):
    return {key: w * torch.nan for key, w in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed_factor, "lora_down.weight' is not <site>.lora_A.weight .* renamed"),
        (renamed_site, "query is none of target_modules"),
        (without_prefix, "lacks the prefix 'base_model.model.'"),
        (with_nan, "NaN or infinite"),
    ],
)
def test_broken_folders_are_refused(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(BrokenAdapterError, match=message):
        load_adapter_folder(folder)


def test_a_rename_that_only_the_model_can_know_is_refused_on_attach(tiny_base, folder):
    edit_weights(folder, renamed)
    spec, adapter = load_adapter_folder(folder)  # "attention.q_proj" is a possible site
    with pytest.raises(SpecMismatchError, match="first difference"):
        attach(tiny_base(), spec, adapter)


def test_another_base_model_is_refused(tiny_peft, folder):
    edit_config(folder, base_model_name_or_path="another/base")
    with pytest.raises(SpecMismatchError, match="'another/base', expected 'tiny/llama'"):
        load_adapter_folder(folder, expected=spec_of(tiny_peft()))


def test_missing_half_shape_and_rank_are_refused(folder):
    file = folder / "adapter_model.safetensors"
    healthy = file.read_bytes()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_weights(folder, lambda weights: {k: w for k, w in weights.items() if k != key})
    with pytest.raises(BrokenAdapterError, match=r"layers\.0\.self_attn\.q_proj has only \['lora_A'\]"):
        load_adapter_folder(folder)
    file.write_bytes(healthy)
    edit_weights(folder, lambda weights: {**weights, key: weights[key][:, :2].contiguous()})
    with pytest.raises(BrokenAdapterError, match=r"q_proj has factors .*\(32, 2\).* gives it rank 4"):
        load_adapter_folder(folder)
    file.write_bytes(healthy)
    edit_config(folder, r=8)
    with pytest.raises(BrokenAdapterError, match="gives it rank 8"):
        load_adapter_folder(folder)


def test_truncated_pickled_and_unreadable_folders_are_refused(folder, tmp_path):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(BrokenAdapterError, match=r"adapter_model\.safetensors is truncated"):
        load_adapter_folder(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(BrokenAdapterError, match="Pickled weights"):
        load_adapter_folder(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BrokenAdapterError, match="is not JSON"):
        load_adapter_folder(folder)
    with pytest.raises(BrokenAdapterError, match=r"adapter_config\.json does not exist"):
        load_adapter_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"from_the_future": 3}, r"\['from_the_future'\] are unknown to peft"),
    ],
)
def test_unsupported_folders_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedAdapterError, match=message):
        load_adapter_folder(folder)


def test_a_folder_of_a_newer_peft_with_unused_settings_loads(folder):
    spec, adapter = load_adapter_folder(folder)
    edit_config(folder, from_the_future=None)
    found = load_adapter_folder(folder)
    assert found[0] == spec
    assert_same_adapter(found[1], adapter)


def test_saving_never_replaces_an_adapter(folder, tiny_peft):
    model = tiny_peft(seed=3)
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        save_adapter_folder(folder, spec_of(model), read_adapter(model))
    save_adapter_folder(folder, spec_of(model), read_adapter(model), overwrite=True)
    assert_same_adapter(load_adapter_folder(folder)[1], read_adapter(model))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


SAVE = """
import sys, torch
from ltdi_peft.adapter import load_adapter_folder, save_adapter_folder
save_adapter_folder(sys.argv[2], *load_adapter_folder(sys.argv[1]))
"""


def test_same_bytes_under_three_hash_seeds(folder, tmp_path):
    edit_config(
        folder, target_modules=["v_proj", "q_proj", "k_proj"], exclude_modules=["k_proj", "lm_head", "x"]
    )
    for seed in "012":
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-c", SAVE, str(folder), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env=environment)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(tmp_path / seed / name).read_bytes() for seed in "012"}) == 1


# ---- proof of load


def test_prove_loaded_accepts_a_healthy_adapter(tiny_peft, probe_ids):
    model = tiny_peft(lora_dropout=0.5)
    model.train()
    spec, adapter = spec_of(model), read_adapter(model)
    norms = {name: (norm, norm) for name, norm in site_norms(spec, adapter).items()}
    prove_loaded(model, spec, adapter, probe_ids, norms)
    assert all(module.training for name, module in model.named_modules() if "lora_dropout" in name)


def test_prove_loaded_refuses(tiny_peft, probe_ids):
    model = tiny_peft()
    spec, adapter = spec_of(model), read_adapter(model)
    site = spec.sites[0].name
    a, b = adapter[site]
    with pytest.raises(BrokenAdapterError, match="lora_A: the model holds other weights"):
        prove_loaded(model, spec, {**adapter, site: (a + 1, b)}, probe_ids)
    with pytest.raises(BrokenAdapterError, match="NaN"):
        prove_loaded(model, spec, {**adapter, site: (a * torch.nan, b)}, probe_ids)
    with pytest.raises(BrokenAdapterError, match=r"‖ΔW‖ = .* outside \[0, 0\.001\]"):
        prove_loaded(model, spec, adapter, probe_ids, {site: (0.0, 1e-3)})
    with pytest.raises(SpecMismatchError, match="expected 'hub/other'"):
        prove_loaded(model, replace(spec, base_model="hub/other"), adapter, probe_ids)
    zero = {name: (a, b * 0) for name, (a, b) in adapter.items()}
    set_adapter_weights(model, zero)
    with pytest.raises(BrokenAdapterError, match="has no effect"):
        prove_loaded(model, spec, zero, probe_ids)


def test_four_bit_base_layers_are_sites(tiny_base, probe_ids):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = tiny_base(hidden=64)  # NF4 blocks hold 64 weights
    for layer in base.model.layers:
        quantised = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        quantised.load_state_dict(layer.self_attn.q_proj.state_dict())
        layer.self_attn.q_proj = quantised.to("cpu")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    spec, adapter = spec_of(model), read_adapter(model)
    assert [(s.fan_in, s.fan_out, s.rank) for s in spec.sites] == [(64, 64, 2)] * 2
    moved = {name: (a, torch.ones_like(b)) for name, (a, b) in adapter.items()}
    attach(model, spec, moved, "second")
    prove_loaded(model, spec, moved, probe_ids, adapter_name="second")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_seen_and_large_sums_are_not_taken_for_it(dtype):
    most = torch.finfo(dtype).max
    assert all_finite(torch.full((1000,), most, dtype=dtype))  # their sum is infinite
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in ([torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf]):
        assert not all_finite(torch.tensor([1.0, *bad, -most], dtype=dtype))
