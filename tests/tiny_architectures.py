"""Tiny random models of many architectures, and the whole way from their fine-tunes to a generated adapter.

`Case.row` is a row of docs/architectures.md; `Case.cells` is what it says there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_bench import tiny_task, tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from ltdi_peft.base import Base, load_base
from ltdi_peft.config import Recipe, build
from ltdi_peft.record import Schedule, TrajectoryRecorder, record
from ltdi_peft.task import Task, TaskSuite

COLUMNS = ("record", "train", "generate", "collect", "evaluate", "refine")
CAUSAL = dict.fromkeys(COLUMNS, True)
RECORDED = CAUSAL | {"collect": False}  # a recipe has one rank and alpha, and adapts decoder layers
WEIGHTS_ONLY = dict.fromkeys(COLUMNS, False) | {"record": True, "train": True, "generate": True}

TASKS = {
    "train": ("a/first/plain", "a/second/plain", "b/first/plain"),
    "validation": (),
    "unseen_tasks": ("b/second/plain",),
    "unseen_domains": (),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}


def llama(**other) -> PreTrainedModel:
    config = SIZES | SPECIAL | {"num_key_value_heads": 2} | other
    return LlamaForCausalLM(LlamaConfig(**config))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **SPECIAL, **HEADS))


def gemma3() -> PreTrainedModel:
    kinds = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **SPECIAL, **HEADS, **kinds))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **SPECIAL, **HEADS, final_logit_softcapping=5.0))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL))


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES, **SPECIAL, num_labels=3))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **special))


QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Case:
    """A row of the table: a model, the LoRA on it, how many layers that adapts, and what is promised."""

    row: str
    build: Callable[..., PreTrainedModel]
    cells: dict[str, bool]
    sites: int
    targets: tuple[str, ...] = QV
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return self.cells["refine"]


CASES = (
    Case("Llama", llama, CAUSAL, 4),
    Case("Qwen3", qwen3, CAUSAL, 8, ("q_proj", "k_proj", "v_proj", "o_proj")),
    Case("Gemma 2", gemma2, CAUSAL, 4),
    Case("Gemma 3 (text)", gemma3, CAUSAL, 10, (*QV, "gate_proj", "up_proj", "down_proj")),
    Case("GPT-2 (Conv1D)", gpt2, CAUSAL, 6, ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
    Case("BERT-like sequence classifier", bert, WEIGHTS_ONLY, 4, ("query", "value"), {"task_type": None}),
    Case("T5-like encoder-decoder", t5, WEIGHTS_ONLY, 12, ("q", "v"), {"task_type": "SEQ_2_SEQ_LM"}),
    Case(
        "`rank_pattern`, `alpha_pattern`",
        llama,
        RECORDED,
        4,
        lora={"rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"q_proj": 7}},
    ),
    Case("`use_rslora`", llama, RECORDED, 4, lora={"use_rslora": True}),
    Case("tied embeddings", lambda: llama(tie_word_embeddings=True), CAUSAL, 4),
    Case("adapted `lm_head`", llama, RECORDED, 5, (*QV, "lm_head")),
)


@dataclass(frozen=True)
class Studio:
    """A case's base model as a folder, and the recipe whose runs lie there."""

    case: Case
    folder: Path
    recipe: Recipe

    def base(self) -> Base:
        return load_base(str(self.folder / "base"), dtype="float32")

    def adapted(self) -> PeftModel:
        """A fresh LoRA on a fresh base model; always the same factors."""
        torch.manual_seed(0)
        config = {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": list(self.case.targets),
            "task_type": "CAUSAL_LM",
        }
        return get_peft_model(self.base().model, LoraConfig(**config | self.case.lora))


def make_studio(case: Case, folder: Path) -> Studio:
    """Save the base model, the suite and the recipe."""
    torch.manual_seed(0)
    case.build().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    suite = TaskSuite("tiny", {n: tiny_task(n) for names in TASKS.values() for n in names}, TASKS)
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(t.to_dict()) for t in suite.tasks.values()))
    suite.save_splits(folder / "splits.json")
    table = yaml.safe_load(RECIPE) | {"output": str(folder / "run")}
    table["base"] = {"model": str(folder / "base"), "dtype": "float32"}
    table["suite"] = {"source": str(folder / "tasks.jsonl"), "split_file": str(folder / "splits.json")}
    return Studio(case, folder, build(Recipe, table, case.row))


# What a user writes for recorded runs; the rest makes it small.
RECIPE = """
collect: {start: recorded, gauge: shared_start, single: {steps: 2, batch_size: 2}, multi_task: {steps: 2}}
codec: {gate: 0, width: null}
condition: {encoder: base}
diffusion: {k: 2, steps: 4}
denoiser: {hidden: 8, layers: 1, heads: 2}
train: {steps: 2, batch_size: 4, log_with: null}
evaluate: {methods: [mean, ours], examples: 3, seeds: 1, wrong_prompts: 1, bootstrap: 20}
"""


def record_task(studio: Studio, name: str, store: Path) -> None:
    """Two steps on random rows, recorded: architectures by Trainer, options by a plain loop."""
    rows = random_rows(studio.case, seed=sorted(sum(TASKS.values(), ())).index(name))
    by = record_trainer if studio.case.lora.keys() <= {"task_type", "fan_in_fan_out"} else record_loop
    by(studio, tiny_task(name), store, rows)


def record_loop(studio: Studio, task: Task, store: Path, rows: list[dict[str, Any]]) -> None:
    """`record` around two steps of AdamW."""
    model = studio.adapted()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=3e-2)
    ids = torch.stack([row["input_ids"] for row in rows])
    with record(model, store, task, total_steps=2, schedule=Schedule.every(1)) as run:
        for part in ids.split(2):
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)


def record_trainer(studio: Studio, task: Task, store: Path, rows: list[dict[str, Any]]) -> None:
    """The callback in transformers' Trainer."""
    arguments = TrainingArguments(
        str(studio.folder / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    recorder = TrajectoryRecorder(store, task=task, schedule=Schedule.every(1))
    Trainer(studio.adapted(), arguments, train_dataset=rows, callbacks=[recorder]).train()


def random_rows(case: Case, seed: int) -> list[dict[str, Any]]:
    """Four rows; a classifier's labels are classes, the others' tokens."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (4, 6), generator=rng)
    labels = torch.randint(3, (4,), generator=rng) if case.build is bert else ids
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, of a decoder's first tokens for an encoder-decoder."""
    decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **decoded).logits
