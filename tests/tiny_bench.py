"""A tiny random model with a word tokenizer, eleven tasks over shared inputs, and their collected runs."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ltdi_peft.adapter import fresh_adapter
from ltdi_peft.base import wrap_base
from ltdi_peft.collect import Bench, collect
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import (
    AdapterConfig,
    CodecConfig,
    CollectConfig,
    ConditionConfig,
    DenoiserSection,
    DiffusionConfig,
    EvaluateConfig,
    FitConfig,
    Recipe,
    TrainConfig,
)
from ltdi_peft.prepare import prepare
from ltdi_peft.task import Example, Task, TaskSuite
from ltdi_peft.train import Session, build_generator

WORDS = [f"w{i}" for i in range(20)]
SPLITS = {
    "train": ("a/first/plain", "a/first/twice", "a/second/plain", "b/first/plain", "b/second/twice"),
    "validation": ("b/first/twice",),
    "unseen_tasks": ("a/second/twice", "b/second/plain", "a/third/plain"),
    "unseen_domains": ("c/first/plain", "c/second/twice"),
}


def tokenizer():
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "Input", "Output", ":", "say", "name", "please"]
    words += ["a", "b", "c", "first", "second", "third", "plain", "twice", *WORDS]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_task(name):
    """Three words in, one of them (once or twice) out, offered as choices: chance is 1/3."""
    domain, question, form = name.split("/")
    offset = "abc".index(domain)
    examples = []
    for words in list(itertools.permutations(WORDS[offset : offset + 5], 3))[:24]:
        choices = tuple(" ".join([w] * (2 if form == "twice" else 1)) for w in words)
        answer = choices[("first", "second", "third").index(question)]
        examples.append(Example(" ".join(words), answer, choices))
    about = f"{domain} {question} {form}"
    held_out = (f"please {about}", f"please say {about}")
    prompts, attributes = (f"say {about}", f"name {about}"), {"question": question, "form": form}
    return Task(name, prompts, domain, "", examples[:12], examples[12:], held_out, attributes)


def tiny_suite():
    tasks = {name: tiny_task(name) for names in SPLITS.values() for name in names}
    return TaskSuite("tiny", tasks, SPLITS)


def tiny_recipe(folder: Path, gauge: str = "shared_a") -> Recipe:
    return Recipe(
        name="tiny",
        output=str(folder),
        adapter=AdapterConfig(rank=2, alpha=4.0, layers=1),
        collect=CollectConfig(
            gauge=gauge,
            seeds=2,
            together=4,
            rows=8,
            equal_parts=3,
            multi_task=FitConfig(steps=4, batch_size=4, learning_rate=1e-2),
            single=FitConfig(steps=6, batch_size=4, learning_rate=3e-2),
        ),
        codec=CodecConfig(width=8, gate=0.0),
        condition=ConditionConfig(encoder="base"),
        diffusion=DiffusionConfig(k=3, steps=6),
        denoiser=DenoiserSection(hidden=8, layers=1, heads=2),
        train=TrainConfig(steps=1, batch_size=2, log_with=None),
        evaluate=EvaluateConfig(examples=6, seeds=2, wrong_prompts=2, bootstrap=200),
    )


def tiny_bench(recipe: Recipe) -> Bench:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, eos_token_id=2, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    base = wrap_base(model, tokenizer(), name="tiny/llama")
    about = recipe.adapter
    spec, fresh = fresh_adapter(
        model,
        rank=about.rank,
        alpha=about.alpha,
        target_modules=about.target_modules,
        top_layers=about.layers,
        seed=0,
    )
    return Bench(recipe, tiny_suite(), base, spec, fresh, {})


def collected(folder: Path) -> Bench:
    """A bench whose runs are recorded."""
    bench = tiny_bench(tiny_recipe(folder))
    collect(bench.recipe, bench=bench, progress=False)
    return bench


def prepared_of(bench, centre="ridge"):
    """Codec, data and centre of the bench's runs."""
    recipe = replace(bench.recipe, diffusion=replace(bench.recipe.diffusion, centre=centre))
    return prepare(recipe, PromptEncoder("base", base=bench.base), bench.suite)


def untrained_generator(bench, centre="ridge"):
    """Its denoiser adds nothing: it generates the ridge's prediction, or for every prompt the mean."""
    session = Session(bench.recipe, prepared_of(bench, centre), Accelerator(cpu=True), bench)
    return build_generator(session, bench, guidance=1.0)


def link_runs(recipe: Recipe, folder: Path) -> Path:
    """`folder`, as an output of its own with links to the recipe's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("trajectories", "held_out", "start"):
        if not (folder / name).exists():
            (folder / name).symlink_to(recipe.folder.resolve() / name)
    return folder


def conditioned_bench(runs: Bench, folder: Path, condition: ConditionConfig) -> Bench:
    """The collected runs, to be trained on for two steps in another output, with other conditions."""
    link_runs(runs.recipe, folder)
    train = replace(runs.recipe.train, steps=2)
    return replace(runs, recipe=replace(runs.recipe, output=str(folder), condition=condition, train=train))
