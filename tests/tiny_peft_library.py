"""Adapters as people have them: made by PEFT alone, each from its own start, saved by `save_pretrained`."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_bench import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def save_base(folder):
    """A 2-layer Llama, hidden 32, with a word tokenizer."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_peft(base, seed=0, *, config=LoraConfig, trained=True, **overrides):
    """A model with an adapter whose weights have all moved, or with trained=False as PEFT starts it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**overrides))
        if trained:
            move(model)
    return model.eval()


def move(model):
    """A training step in a random direction."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1 * torch.randn_like(weight))


def save_lora(base, folder, seed=0, **overrides):
    """A LoRA of rank 2 on q_proj and v_proj, in a folder."""
    make_peft(base, seed, **{**LORA, **overrides}).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    """`change` maps a tensor's key and value to new ones."""
    file = folder / "adapter_model.safetensors"
    weights = dict(change(key, weight) for key, weight in load_file(file).items())
    save_file(weights, file, metadata={"format": "pt"})


def write_manifest(file, *lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def line(path, task="polite", prompts=("Say it politely.",), **more):
    return {"path": str(path), "task": task, "prompts": list(prompts), **more}
