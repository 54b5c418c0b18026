"""A saved generated adapter in the hands of others: every consumer computes what the generated model did."""

import copy
import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from scripts import script
from tiny_bench import tiny_task
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ltdi_peft.adapter import read_adapter, set_adapter_weights, spec_of
from ltdi_peft.base import load_base
from ltdi_peft.generate import generate_adapter
from ltdi_peft.generator import load_generator
from ltdi_peft.spec import delta_w

PROMPTS = ("please a second twice", "please b first plain")
IDS = torch.tensor([[10, 13, 17, 20, 21, 5, 6]])
# The tiny generator is hardly trained: norms outside the training range are clamped, and said to be.
pytestmark = pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")


@pytest.fixture(scope="module")
def base_folder(world):
    """The base model on disk, with a tokenizer; `base_model_name_or_path` of the adapters."""
    return str(world.base)


@pytest.fixture
def base(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(world, base_folder):
    """Two generated models; read only."""
    generator = load_generator(world.recipe.generator_folder)
    models = [load_base(base_folder, dtype="float32").model for _ in PROMPTS]
    return [
        generate_adapter(prompt, generator=generator, base_model=model)
        for prompt, model in zip(PROMPTS, models, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    """What their `save_pretrained` wrote."""
    found = [tmp_path_factory.mktemp("adapter") for _ in made]
    for model, folder in zip(made, found, strict=True):
        model.save_pretrained(folder)
    return [str(folder) for folder in found]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_two_differ_from_each_other_and_from_the_base(made, base):
    """Without this, every equality below would also hold for adapters that do nothing."""
    first, second = (logits(model) for model in made)
    assert (first - logits(base)).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


def test_peft_model_from_pretrained(made, folders, base):
    loaded = PeftModel.from_pretrained(base, folders[0]).eval()
    assert torch.equal(logits(loaded), logits(made[0]))


def test_pipeline_from_the_adapter_folder_alone(made, folders, base_folder):
    """The folder names its base model, and that has the tokenizer."""
    words = AutoTokenizer.from_pretrained(base_folder)
    writer = pipeline("text-generation", model=folders[0], device="cpu")
    text, count = "say a first plain Input : w1 w2 w3 Output :", 8
    got = writer(text, max_new_tokens=count, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert got.split() == greedy(made[0], words, text, count).split()
    assert torch.equal(logits(writer.model), logits(made[0]))


def greedy(model, words, text, count):
    ids = words(text, return_tensors="pt")
    ids.pop("token_type_ids", None)
    out = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return words.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_transformers_load_adapter(made, folders, base):
    base.load_adapter(folders[0])
    assert torch.equal(logits(base), logits(made[0]))
    base.disable_adapters()
    assert (logits(base) - logits(made[0])).abs().max() > 1e-3


def test_hotswap(made, folders, base):
    model = PeftModel.from_pretrained(base, folders[0]).eval()
    hotswap_adapter(model, folders[1], adapter_name="default")
    assert torch.equal(logits(model), logits(made[1]))


def test_weighted_sum_of_two_generated_adapters(made, folders, base):
    """`cat` adds the deltas themselves; the sum is compared with ΔW added to the base by hand."""
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="one").eval()
    model.load_adapter(folders[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.75, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    by_hand = copy.deepcopy(made[0]).unload()
    for site in spec_of(made[0]).sites:
        for share, one in zip((0.75, 0.5), made, strict=True):
            delta = delta_w(*read_adapter(one)[site.name], site.scaling)
            by_hand.get_submodule(site.name).weight.data += share * delta
    assert_close(logits(model), logits(by_hand), rtol=0, atol=1e-5)  # float32, another order of sums
    assert (logits(model) - logits(made[0])).abs().max() > 1e-3


def test_merge_and_unload_is_a_plain_model(made, folders, base, tmp_path):
    merged = PeftModel.from_pretrained(base, folders[0]).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert_close(logits(merged), logits(made[0]), rtol=0, atol=1e-5)  # (W + ΔW)x for Wx + ΔWx
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(merged))


# ---- lm-evaluation-harness


@pytest.fixture
def loud(made):
    """A generated adapter, 50 times as large: a random model's greedy words change."""
    model = copy.deepcopy(made[0])
    set_adapter_weights(model, {site: (a, 50 * b) for site, (a, b) in read_adapter(model).items()})
    return model


def test_a_loud_adapter_changes_the_words(loud, base, base_folder):
    words = AutoTokenizer.from_pretrained(base_folder)
    text = "please a second twice Input : w0 w1 w2 Output :"
    assert greedy(loud, words, text, 4) != greedy(base, words, text, 4)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'lm-eval[hf]' (docs/consumers.md)",
)
def test_lm_evaluation_harness(loud, base_folder, base, tmp_path, monkeypatch):
    """A local task, offline, without and with the adapter: its answers are those of the model in memory."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check = script("benchmarks/lm_eval_check.py")
    task = tiny_task("a/first/plain")
    name = check.write_task(task, PROMPTS[0], tmp_path, 4)
    words = AutoTokenizer.from_pretrained(base_folder)
    answers = {}
    loud.save_pretrained(tmp_path / "loud")
    for label, adapter, model in (("base", None, base), ("adapter", tmp_path / "loud", loud)):
        out = tmp_path / label
        found = check.harness(base_folder, adapter, [name], tmp_path, out)
        (file,) = out.rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        answers[label] = [row["filtered_resps"][0] for row in rows]
        wanted = [greedy(model, words, row["doc"]["text"], check.LONGEST) for row in rows]
        assert [a.split() for a in answers[label]] == [w.split() for w in wanted]
        right = [row["filtered_resps"][0] == row["doc"]["answer"] for row in rows]
        assert found == {name: pytest.approx(sum(right) / 4)}
    assert answers["base"] != answers["adapter"]
