"""Tiny random models that every test file may use. Seeded, so that two calls give the same weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that asks the Hub must fail

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ltdi_peft.base import Base, wrap_base

VOCABULARY = 64


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of the libraries below us, about each other, that no call of ours can avoid."""
    # peft 0.21 get_peft_model reads a property that transformers 5.23 renamed.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
    )


@pytest.fixture
def tiny_base() -> Callable[..., LlamaForCausalLM]:
    """tiny_base(seed=0) → a fresh 2-layer Llama, hidden 32, vocabulary 64, float32; named "tiny/llama"."""

    def build(seed: int = 0, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).eval()
        model.name_or_path = "tiny/llama"
        return model

    return build


@pytest.fixture
def tiny_peft(tiny_base) -> Callable[..., PeftModel]:
    """tiny_peft(seed=0, **LoraConfig overrides) → tiny_base, r=4 on q_proj and v_proj, random non-zero B."""

    def build(seed: int = 0, **overrides) -> PeftModel:
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(tiny_base(), LoraConfig(**{**config, **overrides}))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return model

    return build


@pytest.fixture
def probe_ids() -> torch.Tensor:
    """Two rows of seven token ids."""
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w6 … w63, "Input:", "Output:", and the special tokens of `tiny_base`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "Input:", "Output:"]
    words += [f"w{index}" for index in range(len(words), VOCABULARY)]
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture
def tiny_wrapped(tiny_base, tiny_tokenizer) -> Callable[..., Base]:
    """tiny_wrapped(seed=0, layers=4, dtype=torch.float32) → `tiny_base` with `tiny_tokenizer`."""

    def build(seed: int = 0, layers: int = 4, dtype: torch.dtype = torch.float32) -> Base:
        return wrap_base(tiny_base(seed, layers).to(dtype), tiny_tokenizer)

    return build


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A `tiny_world.World` with collected runs and a trained generator, once a session. Read only."""
    from tiny_world import make_world

    from ltdi_peft.collect import collect
    from ltdi_peft.train import train_generator

    made = make_world(tmp_path_factory.mktemp("world"))
    collect(made.recipe, progress=False)
    train_generator(made.recipe, progress=False)
    return made


@pytest.fixture
def no_generator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the package had no generator of its own, and $LTDI_GENERATOR named none."""
    monkeypatch.setattr("ltdi_peft.generate.default_folder", lambda: tmp_path / "none")
    monkeypatch.delenv("LTDI_GENERATOR", raising=False)
