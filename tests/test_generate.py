"""A sentence in, a proved `PeftModel` out; nothing is changed by what is refused."""

import itertools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_bench import tokenizer
from tiny_world import run
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from ltdi_peft import generate as room
from ltdi_peft.adapter import live_factors, load_adapter_folder, read_adapter, spec_of
from ltdi_peft.base import load_base
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.commands import read_examples
from ltdi_peft.generate import (
    OFFERED,
    as_base,
    as_examples,
    best_candidate,
    find_generator,
    generate_adapter,
    require_base_model,
    require_prompt,
)
from ltdi_peft.generator import Generator, load_generator
from ltdi_peft.provenance import provenance_of, weights_digest
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import BrokenAdapterError, SpecMismatchError
from ltdi_peft.task import Example

PROMPT = "please a second twice"
EXAMPLES = [("w0 w1 w2", "w1 w1"), ("w3 w1 w4", "w1 w1"), ("w2 w4 w0", "w4 w4")]
# The tiny generator is hardly trained; that its norms are scaled is tested in test_generator.
pytestmark = pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")


@pytest.fixture
def model(world):
    return load_base(str(world.base), dtype="float32").model


@pytest.fixture
def generator(world):
    return load_generator(world.recipe.generator_folder)


@pytest.fixture
def ids():
    return torch.tensor([[10, 13, 17, 20, 21, 5, 6]])


def base_weights(model):
    """The base model's own weights by name, as bits; PEFT moves a wrapped layer's to base_layer."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if "lora_" not in name
    }


def flags_of(model):
    """Which weights ask for a gradient; an empty LoRA layer may stay around one whose adapter was deleted."""
    return {n.replace(".base_layer", ""): w.requires_grad for n, w in model.named_parameters()}


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_adapter(left, right):
    return all(torch.equal(x, y) for site in left for x, y in zip(left[site], right[site], strict=True))


# ---- what comes back


def test_a_peft_model_comes_back_and_the_base_is_what_it_was(model, generator, ids):
    before, plain = base_weights(model), model(ids).logits
    made = generate_adapter(PROMPT, generator=generator, base_model=model)
    assert isinstance(made, PeftModel)
    assert same_weights(before, base_weights(made))
    assert not torch.equal(made(ids).logits, plain)
    with made.disable_adapter():
        assert torch.equal(made(ids).logits, plain)
    assert not made.training
    (wanted,) = generator.generate([PROMPT], base=load_base(model.name_or_path, dtype="float32"))
    assert same_adapter(read_adapter(made), wanted.adapter)
    assert spec_of(made) == generator.spec


def test_the_base_is_found_by_the_generator(world, monkeypatch):
    monkeypatch.setenv("LTDI_GENERATOR", str(world.recipe.generator_folder))
    made = generate_adapter(PROMPT, device="cpu", dtype="float32")
    named = generate_adapter(PROMPT, base_model=str(world.base), device="cpu", dtype="float32")
    assert same_adapter(read_adapter(made), read_adapter(named))
    assert made.peft_config["default"].base_model_name_or_path == str(world.base)


def test_one_generator_serves_many_models(world, generator):
    adapters = []
    for _ in range(2):
        model = load_base(str(world.base), dtype="float32").model
        adapters.append(read_adapter(generate_adapter(PROMPT, generator=generator, base_model=model)))
    assert same_adapter(*adapters)


def test_seeds_and_guidance_matter(world, generator):
    def made(**options):
        base = load_base(str(world.base), dtype="float32").model
        return read_adapter(generate_adapter(PROMPT, generator=generator, base_model=base, **options))

    first = made()
    assert same_adapter(first, made(seed=0))
    assert not same_adapter(first, made(seed=1))
    assert not same_adapter(first, made(guidance_scale=0.0))


def test_a_peft_model_gets_one_more_adapter(model, generator, ids):
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=["k_proj"]), "mine")
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    mine = read_adapter(wrapped, "mine")
    made = generate_adapter(PROMPT, generator=generator, base_model=wrapped, adapter_name="new")
    assert made is wrapped
    assert made.active_adapters == ["new"]
    assert same_adapter(read_adapter(made, "mine"), mine)
    # the active adapter was off while the prompt was read
    clean = load_base(model.name_or_path, dtype="float32")
    (wanted,) = generator.generate([PROMPT], base=clean)
    assert same_adapter(read_adapter(made, "new"), wanted.adapter)


def test_a_model_in_training_mode_stays_so(model, generator):
    model.train()
    made = generate_adapter(PROMPT, generator=generator, base_model=model)
    assert made.training
    assert made.get_base_model().training


def test_gradient_flags_come_back_after_the_adapters_were_off(model):
    """PEFT asks for gradients of what it switches on again, also of an adapter loaded for inference."""
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=["k_proj"]), "mine").requires_grad_(False)
    before = flags_of(wrapped)
    with as_base(wrapped):
        pass
    assert flags_of(wrapped) == before


def test_a_passed_model_keeps_its_name_or_none(model, generator):
    model.name_or_path = model.config._name_or_path = ""
    made = generate_adapter(PROMPT, generator=generator, base_model=model)
    assert model.name_or_path == ""
    assert made.peft_config["default"].base_model_name_or_path == generator.spec.base_model


def test_a_tokenizer_can_be_passed(model, generator):
    model.name_or_path = "nobody/knows"
    with pytest.raises(ValueError, match=r"(?s)tokenizer of base model 'nobody/knows' .*pass token"):
        generate_adapter(PROMPT, generator=generator, base_model=model)
    made = generate_adapter(PROMPT, generator=generator, base_model=model, tokenizer=tokenizer())
    assert model.name_or_path == "nobody/knows"
    assert isinstance(made, PeftModel)


# ---- saved, and loaded by peft alone

ALONE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    logits = model(torch.tensor([[10, 13, 17, 20, 21, 5, 6]])).logits
assert not any(name.startswith("ltdi_peft") for name in sys.modules)
print(json.dumps(logits.tolist()))
"""


def test_peft_alone_loads_it_to_equal_logits(world, model, generator, ids, tmp_path):
    made = generate_adapter(PROMPT, generator=generator, base_model=model)
    made.save_pretrained(str(tmp_path / "adapter"))
    said = run("-c", ALONE, world.base, tmp_path / "adapter")
    assert said.returncode == 0, said.stderr
    with torch.no_grad():
        want = made(ids).logits
    # the same kernels in another process; the attention may be another implementation
    assert_close(torch.tensor(json.loads(said.stdout.splitlines()[-1])), want, rtol=1e-5, atol=1e-6)
    spec, adapter = load_adapter_folder(tmp_path / "adapter")
    assert spec == generator.spec
    assert same_adapter(adapter, read_adapter(made))


# ---- candidates


def through(generator):
    """Let the noise through to the adapter, far out, so that seeds differ: F = 2 W c + x."""
    with torch.no_grad():
        generator.denoiser.gains.bias.fill_(1.0)
        generator.spread.mul_(30)


def test_examples_that_nothing_reads_are_refused(world, generator):
    base = load_base(str(world.base), dtype="float32")
    with pytest.raises(ValueError, match=r"num_candidates is 1 with 3 examples.*give both"):
        generate_adapter(
            PROMPT, generator=generator, base_model=base.model, examples=EXAMPLES, num_candidates=1
        )


def test_the_candidate_with_the_least_loss_is_taken(world, generator):
    base = load_base(str(world.base), dtype="float32")
    through(generator)
    wide = {site: (low, high * 1e3) for site, (low, high) in generator.config.norm_range.items()}
    generator.config = replace(generator.config, norm_range=wide)
    made = [generator.generate([PROMPT], seed=seed, base=base)[0] for seed in range(5, 13)]
    adapted = AdaptedBase(base, generator.spec.sites)
    examples = [Example(*pair) for pair in EXAMPLES]
    sheet = make_sheet(adapted, examples, [PROMPT])
    losses = score(adapted, sheet, stack_adapters([one.adapter for one in made])).loss.mean(1)
    best = int(losses.argmin())
    assert losses.max() - losses.min() > 0.01
    assert best_candidate(made, base, examples).seed == 5 + best
    wanted = best_candidate(generator.candidates(PROMPT, OFFERED, seed=5, base=base), base, examples)
    got = generate_adapter(
        PROMPT, generator=generator, base_model=base.model, examples=EXAMPLES, num_candidates=8, seed=5
    )
    assert same_adapter(read_adapter(got), made[best].adapter)
    model = got.unload()
    unsaid = generate_adapter(PROMPT, generator=generator, base_model=model, examples=EXAMPLES, seed=5)
    assert same_adapter(read_adapter(unsaid), wanted.adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 4}, "num_candidates is 4 with 0 examples"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"examples": [("a", "b", "c")], "num_candidates": 2}, r"an \(input, answer\) pair"),
    ],
)
def test_candidates_and_examples_come_together(options, message):
    with pytest.raises(ValueError, match=message):
        generate_adapter(PROMPT, generator="never/opened", **options)


def test_examples_come_as_pairs_dicts_or_examples():
    pairs = [("a", "b"), ["a", "b"], {"input": "a", "answer": "b"}, Example("a", "b")]
    assert as_examples(pairs) == [Example("a", "b")] * 4
    assert as_examples(zip("ac", "bd", strict=True)) == [Example("a", "b"), Example("c", "d")]


@pytest.mark.parametrize("one", ["ab", 3, ("a",), {"input": "a", "output": "b"}, {"a", "b"}])
def test_other_examples_are_refused(one):
    with pytest.raises(ValueError, match=r"an \(input, answer\) pair, .* or an Example, got"):
        as_examples([one])


def test_a_file_of_examples_has_a_pair_or_a_dict_a_line(tmp_path):
    file = tmp_path / "examples.jsonl"
    file.write_text('["a", "b"]\n\n{"input": "c", "answer": "d"}\n')
    assert read_examples(file) == [Example("a", "b"), Example("c", "d")]
    for line in ('{"input": "a", "output": "b"}', '["a", null]', '"ab"', "3", "a b"):
        file.write_text(f'["a", "b"]\n{line}\n')
        with pytest.raises(ValueError, match=r"examples\.jsonl:2: expected \[.input., .answer.\] or"):
            read_examples(file)


# ---- refusals, before anything is changed


def test_adapters_come_to_a_16_bit_base_unrounded(world, generator):
    base = load_base(str(world.base), dtype="bfloat16").model
    made = generate_adapter(PROMPT, base_model=base, generator=generator)
    weights = [weight for pair in live_factors(made).values() for weight in pair]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert made.get_base_model().dtype == torch.bfloat16
    assert weights_digest(read_adapter(made)) == provenance_of(made).weights


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="task_prompt is empty"):
        generate_adapter("  \n", generator="never/opened")


def test_what_is_no_prompt_or_no_model_is_refused(model):
    with pytest.raises(ValueError, match=r"task_prompt is a list.*Generator\.generate takes several"):
        require_prompt(["one", "two"])
    with pytest.raises(ValueError, match=r"base_model is a tuple; expected a PreTrainedModel"):
        require_base_model((model, None), {})
    options = {"device": "cpu", "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"loaded already, so \['device', 'load_in_4bit'\] would change"):
        generate_adapter(PROMPT, generator="never/opened", base_model=model, **options)
    with pytest.raises(ValueError, match=r"adapter_name is 'a\.b'; expected a name, without dots"):
        generate_adapter(PROMPT, generator="never/opened", adapter_name="a.b")


def test_without_a_generator(no_generator):
    with pytest.raises(ValueError, match=r"no generator: pass generator=.*\$LTDI_GENERATOR"):
        find_generator(None)


def test_a_wrong_base_is_refused_by_name_and_untouched(model, generator):
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})
    other = LlamaForCausalLM(config)
    names = [name for name, _ in other.named_modules()]
    other.name_or_path = "other/llama"
    with pytest.raises(SpecMismatchError, match=r"base model 'other/llama' has spec.*trained for .*base"):
        generate_adapter(PROMPT, generator=generator, base_model=other, tokenizer=tokenizer())
    assert [name for name, _ in other.named_modules()] == names


def test_other_weights_are_warned_about(model, generator):
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(UserWarning, match=r"weights of base model .* are not those"):
        generate_adapter(PROMPT, generator=generator, base_model=model)


def test_a_name_in_use_is_refused(model, generator):
    made = generate_adapter(PROMPT, generator=generator, base_model=model)
    before = read_adapter(made)
    with pytest.raises(ValueError, match=r"already has an adapter 'default'.*in use: \['default'\]"):
        generate_adapter(PROMPT, generator=generator, base_model=made, seed=1)
    assert same_adapter(read_adapter(made), before)


# ---- the proof of load refuses, and undoes


def broken(monkeypatch, change):
    """Generators whose every adapter is `change`d after it was made."""
    whole = Generator.generate

    def generate(self, *args, **options):
        made = whole(self, *args, **options)
        return [replace(one, adapter={s: change(*pair) for s, pair in one.adapter.items()}) for one in made]

    monkeypatch.setattr(Generator, "generate", generate)


BREAKS = {
    "zero": (lambda a, b: (a, torch.zeros_like(b)), r"outside \[|has no effect"),
    "NaN": (lambda a, b: (a, b * torch.nan), "NaN or infinite"),
    "huge": (lambda a, b: (a, b * 1e4), r"outside \["),
}


@pytest.mark.parametrize(("kind", "wrapped"), list(itertools.product(BREAKS, (False, True))))
def test_a_broken_adapter_is_refused_and_undone(model, generator, ids, monkeypatch, kind, wrapped):
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["k_proj"]), "mine").eval()
    before, logits = base_weights(model), model(ids).logits
    flags = flags_of(model)
    change, message = BREAKS[kind]
    broken(monkeypatch, change)
    with pytest.raises(BrokenAdapterError, match=message):
        generate_adapter(PROMPT, generator=generator, base_model=model, adapter_name="new")
    assert same_weights(before, base_weights(model))
    assert torch.equal(model(ids).logits, logits)
    assert flags_of(model) == flags
    if wrapped:
        assert model.active_adapters == ["mine"]


def test_without_effect_is_refused_even_where_the_norms_allow_it(model, generator, monkeypatch):
    free = {site: (0.0, high) for site, (_, high) in generator.config.norm_range.items()}
    generator.config = replace(generator.config, norm_range=free)
    broken(monkeypatch, BREAKS["zero"][0])
    with pytest.raises(BrokenAdapterError, match="has no effect"):
        generate_adapter(PROMPT, generator=generator, base_model=model)


def test_the_proof_can_be_left_out(model, generator, monkeypatch):
    broken(monkeypatch, BREAKS["huge"][0])
    monkeypatch.setattr(room, "prove_loaded", lambda *args, **options: pytest.fail("proved"))
    assert isinstance(
        generate_adapter(PROMPT, generator=generator, base_model=model, verify=False), PeftModel
    )


def warned(model, generator):
    """What is said while an adapter is generated, whatever the filters of this file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generate_adapter(PROMPT, generator=generator, base_model=model)
    return [str(one.message) for one in said if issubclass(one.category, UserWarning)]


def test_a_scaled_norm_is_warned_about(model, generator):
    through(generator)
    (message,) = warned(model, generator)
    assert "of 2 of 2 sites was scaled into the range" in message


def test_inside_the_range_nothing_is_said(model, generator):
    wide = {site: (0.0, 1e6) for site in generator.config.norm_range}
    generator.config = replace(generator.config, norm_range=wide)
    assert warned(model, generator) == []


def test_a_truncated_generator_is_refused(world, tmp_path):
    source = world.recipe.generator_folder
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: weights[key] for key in list(weights)[1:]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or does not fit"):
        generate_adapter(PROMPT, generator=tmp_path)
