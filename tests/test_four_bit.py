"""4-bit bases: right gradients after any forward pass, and every door of the package on one."""

import importlib.util
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_adapters import factors_of
from tiny_world import run
from torch.testing import assert_close

from ltdi_peft.adapter import load_adapter_folder, read_adapter, spec_of
from ltdi_peft.base import load_base
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.cli import main
from ltdi_peft.collect import collect, open_bench
from ltdi_peft.evaluate import evaluate
from ltdi_peft.fit import losses
from ltdi_peft.four_bit import four_bit_config, four_bit_layers, keep_gradients
from ltdi_peft.generate import as_base, generate_adapter, wrap_passed
from ltdi_peft.quiet import LOGGER, NOTICE, other_message
from ltdi_peft.refine import example_pool, refine
from ltdi_peft.task import Example
from ltdi_peft.train import train_generator

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16  # noqa: E402

PROMPT = "please a second twice"
EXAMPLES = [("w0 w1 w2", "w1 w1"), ("w3 w1 w4", "w1 w1"), ("w2 w4 w0", "w4 w4")]
LAYERS = 14  # two layers of q, k, v, o, gate, up, down; the embeddings stay as they are
# The tiny generator is hardly trained; that its norms are scaled is tested in test_generator.
pytestmark = pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
repacking = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 alone")


@pytest.fixture
def base(world):
    return load_base(str(world.base), dtype="float32", load_in_4bit=True)


@pytest.fixture(scope="module")
def four_bit(world, tmp_path_factory):
    """The world's recipe on its base in 4 bits: collected, trained with task loss."""
    about = {"task_loss": {"steps": 4, "tasks": 2, "examples": 2}}
    folder = tmp_path_factory.mktemp("four_bit")
    recipe = world.changed(folder, base={"load_in_4bit": True}, train=about)
    collect(recipe, progress=False)
    return recipe, train_generator(recipe, progress=False)


# ---- loading


def test_the_linear_layers_are_four_bit_and_spec_is_the_full_ones(world, base):
    full = load_base(str(world.base), dtype="float32")
    assert len(four_bit_layers(base.model)) == LAYERS
    assert four_bit_layers(full.model) == []
    assert base.spec_fingerprint == full.spec_fingerprint
    assert base.weights_fingerprint != full.weights_fingerprint
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_without_bitsandbytes_it_says_what_to_install(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"load_in_4bit needs bitsandbytes: pip install 'ltdi_peft\[4bit\]'"
    ):
        four_bit_config(torch.float32)
    assert four_bit_layers(torch.nn.Linear(2, 2)) == []  # full models need nothing of it


# ---- gradients


def dequantised(world, model):
    """The full model with the 4-bit model's weights: the same function by plain linear layers."""
    full = load_base(str(world.base), dtype="float32")
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            full.model.get_submodule(name).weight.data.copy_(weight)
    return full


def test_gradients_are_those_of_the_dequantised_model(world, base):
    reference = dequantised(world, base.model)
    sites = open_bench(world.recipe, base=reference).spec.sites
    rng = torch.Generator().manual_seed(0)
    adapter = {
        s.name: (torch.randn(s.rank, s.fan_in, generator=rng), torch.randn(s.fan_out, s.rank, generator=rng))
        for s in sites
    }

    def gradients(one):
        adapted = AdaptedBase(one, sites)  # proves its cut by forward passes without gradients
        stacked = stack_adapters([adapter])
        leaves = [factor.requires_grad_() for pair in stacked.values() for factor in pair]
        pool = example_pool(adapted, [Example(*pair) for pair in EXAMPLES], [PROMPT])
        return torch.autograd.grad(losses(adapted, pool.rows, pool.inputs, stacked).mean(), leaves)

    for got, want in zip(gradients(base), gradients(reference), strict=True):
        assert want.abs().max() > 1e-4
        assert_close(got, want, rtol=1e-3, atol=1e-6)  # float32, other order of sums


def small_stack(dtype=torch.float32):
    """Two 4-bit layers as bitsandbytes makes them, in evaluation mode, of a width that can be repacked."""
    rng = torch.Generator().manual_seed(0)
    make = bitsandbytes.nn.Linear4bit
    stack = torch.nn.Sequential(
        *(make(128, 128, bias=False, quant_type="nf4", compute_dtype=dtype) for _ in "12")
    )
    for layer in stack:
        layer.load_state_dict({"weight": torch.randn(128, 128, generator=rng).to(dtype) / 128**0.5})
    return stack.to("cpu").eval()


def input_gradient(stack, dtype=torch.float32):
    x = torch.ones(3, 128, dtype=dtype, requires_grad=True)
    loss = stack(x).square().sum()
    return torch.autograd.grad(loss, x, materialize_grads=True)[0].float()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@repacking
@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
def test_repacked_layers_lose_gradients_and_get_them_back(dtype, rounding):
    stack = small_stack(dtype)
    want, nibbles = input_gradient(stack, dtype), stack[0].weight.data.clone()
    with torch.no_grad():
        stack(torch.ones(3, 128, dtype=dtype))
    assert relative(input_gradient(stack, dtype), want) > 0.9  # the negative control: bitsandbytes' own way
    keep_gradients(stack)
    assert torch.equal(stack[0].weight.data, nibbles)
    for _ in "12":
        assert relative(input_gradient(stack, dtype), want) < rounding  # of the scales, to bfloat16
        with torch.no_grad():
            stack(torch.ones(3, 128, dtype=dtype))


def test_kept_layers_give_the_same_gradients_before_and_after_evaluation():
    stack = small_stack()
    keep_gradients(stack)
    want = input_gradient(stack)
    with torch.no_grad():
        stack(torch.ones(3, 128))
    assert torch.equal(input_gradient(stack), want)


# ---- every door


def test_collect_and_train_with_task_loss(four_bit):
    recipe, generator = four_bit
    bench = open_bench(recipe)
    assert len(four_bit_layers(bench.base.model)) == LAYERS
    assert generator.config.weights_fingerprint == bench.base.weights_fingerprint
    report = (recipe.folder / "training.json").read_text()
    assert "NaN" not in report
    assert "Infinity" not in report


def test_generate_proves_saves_and_loads(four_bit, world, tmp_path):
    _, generator = four_bit
    # No weights warning, which would be an error here: the same 4-bit base, before and after forward passes.
    made = generate_adapter(PROMPT, generator=generator, load_in_4bit=True, dtype="float32", device="cpu")
    generate_adapter(PROMPT, generator=generator, base_model=made, adapter_name="again", seed=1)
    made.set_adapter("default")
    assert len(four_bit_layers(made)) == LAYERS
    made.save_pretrained(str(tmp_path), selected_adapters=["default"])
    base = load_base(str(world.base), dtype="float32", load_in_4bit=True)
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path)).eval()
    ids = torch.tensor([[10, 13, 17, 20, 21, 5, 6]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made(ids).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(ids).logits, made(ids).logits)


def test_a_generator_of_the_full_base_warns_on_the_four_bit_one(world):
    options = {"generator": world.recipe.generator_folder, "dtype": "float32", "device": "cpu"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = generate_adapter(PROMPT, load_in_4bit=True, **options)
    assert sum("a 4-bit load" in str(one.message) for one in seen) == 1
    full = generate_adapter(PROMPT, **options)
    spec = spec_of(made)
    for got, want in zip(
        factors_of(made, spec.sites).values(), factors_of(full, spec.sites).values(), strict=True
    ):
        assert all(torch.isfinite(one).all() for one in got)
        # Conditions are hidden states of the base here, and those of 4 bits differ a little.
        assert relative(got[1], want[1]) < 0.5


def test_refine_lowers_the_loss(four_bit):
    _, generator = four_bit
    made = generate_adapter(PROMPT, generator=generator, load_in_4bit=True, dtype="float32", device="cpu")
    base = wrap_passed(made, None, default_name="")

    def mean_loss():
        with as_base(made):
            adapted = AdaptedBase(base, spec_of(made).sites)
            pool = example_pool(adapted, [Example(*pair) for pair in EXAMPLES], [])
            return losses(adapted, pool.rows, pool.inputs, stack_adapters([read_adapter(made)])).mean().item()

    before = mean_loss()
    refine(made, EXAMPLES, steps=12, learning_rate=2e-2)
    assert mean_loss() < before - 0.1  # of some 4 nats: a random base, rank 2


def test_evaluate(four_bit, tmp_path):
    recipe, _ = four_bit
    methods = replace(recipe.evaluate, methods=("base", "mean", "ours", "oracle"), seeds=1)
    result = evaluate(replace(recipe, evaluate=methods), results=tmp_path, progress=False)
    assert {"base", "mean", "ours", "oracle"} <= set(result["methods"])


def test_the_command_line(four_bit, tmp_path, capsys):
    recipe, _ = four_bit
    out = tmp_path / "adapter"
    arguments = ["--generator", str(recipe.generator_folder), "--load-in-4bit", "--out", str(out)]
    assert main(["generate", PROMPT, *arguments]) == 0
    assert all(torch.isfinite(one).all() for pair in load_adapter_folder(out)[1].values() for one in pair)
    assert "written to" in capsys.readouterr().out


def test_only_the_notice_about_the_kernel_that_is_not_used_is_dropped():
    # bitsandbytes' own words: a negative control for the next test, on any processor
    assert NOTICE in (Path(bitsandbytes.__file__).parent / "backends/cpu/ops.py").read_text()
    notice = logging.LogRecord(LOGGER, logging.WARNING, "", 0, f"{NOTICE}: %s", ("no module",), None)
    other = logging.LogRecord(LOGGER, logging.WARNING, "", 0, "another thing", (), None)
    assert [other_message(notice), other_message(other)] == [False, True]


def test_programs_do_not_print_the_notice():
    said = run("-c", "from ltdi_peft.quiet import *; drop_kernel_notice(); drop_kernel_notice(); import peft")
    assert (said.returncode, said.stderr) == (0, "")
