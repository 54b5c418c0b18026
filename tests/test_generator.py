"""The generator's folder and what comes out of it."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ltdi_peft.base import load_base
from ltdi_peft.config import load_recipe
from ltdi_peft.generator import BUFFERS, Generator, load_generator, nearest_conditions
from ltdi_peft.generator_config import GeneratorConfig, shown_recipe
from ltdi_peft.spec import BrokenAdapterError, site_norms

PROMPTS = ["please a second twice", "please b second plain"]


@pytest.fixture(scope="module")
def base(world):
    return load_base(str(world.base), dtype="float32")


@pytest.fixture
def generator(world):
    return load_generator(world.recipe.generator_folder)


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the generator's folder, to be damaged."""
    return shutil.copytree(world.recipe.generator_folder, tmp_path / "generator")


def edit(folder, **fields):
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **fields}))


# ---- the folder


def test_saved_and_loaded_makes_the_same_tokens(generator, base, tmp_path):
    generator.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    conditions = generator.encode_prompts(PROMPTS, base)
    assert torch.equal(again.tokens(conditions, seed=3), generator.tokens(conditions, seed=3))
    assert again.config == generator.config
    assert not again.training


def test_equal_generators_have_equal_bytes(generator, folder, tmp_path):
    generator.save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_readme_says_what_and_for_whom_and_is_not_overwritten(generator, folder):
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: ltdi_peft\nbase_model: base\n")
    text = " ".join(text.split())
    assert "fine-tunes of 5 tasks: `a/first/plain`" in text
    assert "rank 2, 2 sites (q_proj, v_proj)" in text
    assert "ltdi_peft.generate_adapter(" in text
    assert "Limits" in text
    (folder / "README.md").write_text("mine")
    generator.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_no_folder_of_the_user_is_told(world, generator):
    text = json.dumps(generator.config.recipe) + (world.recipe.generator_folder / "README.md").read_text()
    assert str(world.folder) not in text
    assert "output" not in generator.config.recipe
    recipe = shown_recipe(load_recipe("recipes/demo.yaml"))
    assert recipe["base"]["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe["suite"]["source"] == "builtin"


def test_configuration_round_trip(generator):
    table = json.loads(json.dumps(asdict(generator.config)))
    assert GeneratorConfig.from_dict(table, "here") == generator.config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "codec.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"is no generator: {name} is missing"):
        Generator.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "codec.safetensors"])
def test_a_truncated_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Generator.from_pretrained(folder)


def test_a_newer_format_is_refused_whatever_it_holds(folder):
    edit(folder, format_version=2, something_new={})
    with pytest.raises(ValueError, match=r"config\.json: format_version is 2, this ltdi_peft reads 1"):
        Generator.from_pretrained(folder)


def test_unknown_keys_and_missing_tensors_are_named(folder):
    edit(folder, surprise=1)
    with pytest.raises(ValueError, match=r"missing or unknown keys \['surprise'\]"):
        load_generator(folder)


def test_weights_of_another_network_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("denoiser.null")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r'(?s)model\.safetensors .*Missing key.*"denoiser.null"'):
        load_generator(folder)


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder/anywhere"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(
        FileNotFoundError, match=rf"no generator '{name}': no such folder, and not on the Hub"
    ):
        Generator.from_pretrained(name)


# ---- what comes out


def test_generation_is_the_formula(generator, base):
    conditions = generator.encode_prompts(PROMPTS, base)
    with torch.no_grad():
        for weight in generator.denoiser.parameters():
            weight.zero_()
    x = torch.cat([conditions, torch.full((2, 1), 10.0)], 1)
    centre = (x @ generator.centre).view(2, *generator.mean.shape)
    for scale in (0.0, 1.0, 2.0):
        # a denoiser of zeros ends its chain at zero
        want = generator.mean + scale * (centre - generator.mean)
        assert_close(generator.tokens(conditions, guidance_scale=scale), want, rtol=1e-4, atol=1e-5)
        generator.config = replace(generator.config, mean_share=0.25)
        want = want - 0.75 * generator.mean
        assert_close(generator.tokens(conditions, guidance_scale=scale), want, rtol=1e-4, atol=1e-5)
        generator.config = replace(generator.config, mean_share=1.0)


@pytest.mark.parametrize("sampler", ["mean_only", "ddim"])
def test_a_linear_networks_chain_is_taken_at_once(generator, sampler):
    own = replace(
        generator.config, sampler=sampler, denoiser={**generator.config.denoiser, "nonlinear": False}
    )
    one = Generator(own, generator.codec, **{name: getattr(generator, name) for name in BUFFERS})
    rng = torch.Generator().manual_seed(0)
    conditions = torch.randn(3, generator.config.condition_width, generator=rng)
    with torch.no_grad():
        for weight in one.denoiser.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
    for options in ({}, {"steps": 3}, {"guidance_scale": 2.0, "seed": 1}, {"guidance_scale": 0.0}):
        *_, want = one.token_path(conditions, **options)
        got = one.tokens(conditions, **options)
        assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        assert not torch.equal(got, one.tokens(conditions, **{**options, "steps": 5}))


def test_fewer_steps_than_task_loss_trained_are_warned_of(generator, base):
    """The second stage goes through the last step of the whole chain: of fewer it taught nothing."""
    generator.generate(PROMPTS, base=base, steps=3)  # says nothing: there was no second stage
    train = {**generator.config.recipe["train"], "task_loss": {"steps": 2}}
    generator.config = replace(generator.config, recipe={**generator.config.recipe, "train": train})
    with pytest.warns(UserWarning, match="by task loss through all .* steps of its chain; in 3 steps"):
        generator.generate(PROMPTS, base=base, steps=3)
    generator.generate(PROMPTS, base=base)


@pytest.mark.parametrize("sampler", ["mean_only", "ddim", "stochastic"])
def test_a_batch_changes_nothing_and_seeds_do(generator, base, sampler):
    generator.config = replace(generator.config, sampler=sampler)
    together = generator.generate(PROMPTS, seed=1, base=base)
    for prompt, made in zip(PROMPTS, together, strict=True):
        (alone,) = generator.generate([prompt], seed=1, base=base)
        for site, (_, b) in alone.adapter.items():
            assert_close(made.adapter[site][1], b, rtol=1e-4, atol=1e-6)  # float32, other shapes
    conditions = generator.encode_prompts(PROMPTS, base)
    first, second = (generator.tokens(conditions, seed=seed) for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(generator.tokens(conditions, seed=1), first)


def test_a_generated_adapter_says_where_it_comes_from(generator, base, tmp_path):
    (made,) = generator.generate(["say a second plain"], seed=4, base=base)
    assert (made.prompt, made.seed, made.spec) == ("say a second plain", 4, generator.spec)
    # the nearest task is the one whose paraphrases are meant on average
    means = generator.conditions
    similarity = generator.encode_prompts([made.prompt], base) @ means.mT
    assert made.nearest_similarity == pytest.approx(similarity.max().item())
    assert made.nearest_task == generator.config.training_tasks[int(similarity.argmax())]
    made.save_pretrained(tmp_path / "one")
    (again,) = generator.generate(["say a second plain"], seed=4, base=base)
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_norms_are_scaled_into_the_training_range(generator, base):
    (made,) = generator.generate(PROMPTS[:1], base=base)
    site = generator.spec.sites[0].name
    low, high = generator.config.norm_range[site]
    for factor, wanted in ((1e3, high), (1e-3, low)):
        a, b = made.adapter[site]
        clamped, sites = generator.clamp({**made.adapter, site: (a, b * factor)})
        assert site in sites
        assert site_norms(generator.spec, clamped)[site] == pytest.approx(wanted, rel=1e-5)
        assert_close(clamped[site][1] / clamped[site][1].norm(), b / b.norm())  # the direction stays
    inside, sites = generator.clamp(made.adapter)
    assert sites == ()
    assert inside == made.adapter
    zero, sites = generator.clamp({**made.adapter, site: (a, torch.zeros_like(b))})
    assert sites == ()
    assert not zero[site][1].any()


def test_nan_tokens_are_not_decoded(generator, base):
    with torch.no_grad():
        generator.mean[0, 0] = torch.nan
    with pytest.raises(BrokenAdapterError, match="NaN"):
        generator.generate(PROMPTS, base=base)


def test_prompts_are_checked(generator, base):
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.generate([" "], base=base)
    with pytest.raises(ValueError, match=r"list of prompts, got one text: \['say'\] is meant"):
        generator.generate("say", base=base)
    with pytest.raises(ValueError, match="needs the base model"):
        generator.generate(PROMPTS)


def test_nearest_conditions():
    training = torch.eye(3)
    assert nearest_conditions(torch.tensor([[0.1, 0.9, 0.2], [1.0, 0.0, 0.0]]), training).tolist() == [1, 0]
