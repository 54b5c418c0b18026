"""What a recipe works on, without any weights: tasks, runs, adapted sites, parameters, lengths of rows.

In: a recipe.  Out: `Shapes`.
Idea: the base model is laid out on the meta device from its configuration, and PEFT adapts that as it will
adapt the real one, so sites and sizes are those of the real run; rows are made as they will be made, of a
part of the tasks.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ltdi_peft.adapter import spec_of, top_config
from ltdi_peft.base import SMOLLM2, converted_folder, hub_reachable
from ltdi_peft.batched import decoder_layers, example_text, first_adapted_layer, layer_kinds_shift, make_row
from ltdi_peft.collect import HELD_OUT, recipe_suite, require_examples
from ltdi_peft.config import Recipe
from ltdi_peft.spec import AdapterSpec, Site
from ltdi_peft.task import Task, TaskSuite

# The shape of the default base model, for a machine that has not seen it yet (its config.json on the Hub).
SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LETTERS = 4.0  # a token, in English prose; assumed where there is no tokenizer
SAMPLED_TASKS, SAMPLED_ROWS = 48, 8  # rows that lengths are taken from


@dataclass(frozen=True)
class Rows:
    """Mean lengths in tokens: of a row with and without the task prompt, and of its answer."""

    prompted: float
    plain: float
    answer: float

    def mean(self, share: float) -> float:
        """Of rows of which a share carries the prompt."""
        return share * self.prompted + (1 - share) * self.plain


@dataclass(frozen=True)
class Shapes:
    """Sizes that bytes, memory and time follow from."""

    recipe: Recipe
    suite: TaskSuite
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    spec: AdapterSpec
    parameters: int  # of the base model
    layers: int
    cut: int  # frozen lower layers whose output is kept
    rows: Rows
    prompt_tokens: float  # of a task prompt alone
    assumed: tuple[str, ...]

    @property
    def hidden(self) -> int:
        """Width of the base model."""
        return int(self.config.hidden_size)

    def tasks(self, *splits: str) -> list[Task]:
        """Of these splits."""
        return [task for split in splits for task in self.suite.split(split)]

    def coordinates(self, site: Site) -> int:
        """Numbers that describe one site in the recipe's gauge: of B alone where A is every run's."""
        of_a = 0 if self.recipe.collect.gauge == "shared_a" else site.rank * site.fan_in
        return of_a + site.rank * site.fan_out

    @property
    def training_runs(self) -> int:
        """Runs in the store of trajectories."""
        return len(self.tasks("train")) * self.recipe.collect.seeds

    @property
    def held_out_runs(self) -> int:
        """One a task of the other splits."""
        return len(self.tasks(*HELD_OUT))


def shapes(recipe: Recipe) -> Shapes:
    """Sizes of a recipe. ValueError for a suite that cannot be collected; OSError without a configuration."""
    suite = recipe_suite(recipe)
    require_examples(suite)
    config, tokenizer, assumed = found_config(recipe)
    model = empty_model(config, recipe.base.model)
    adapter = recipe.adapter
    lora = top_config(
        model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        top_layers=adapter.layers,
    )
    parameters, decoder = sum(p.numel() for p in model.parameters()), model.get_decoder()
    depth = len(decoder_layers(decoder)[1])
    adapted = get_peft_model(model, lora)
    spec = spec_of(adapted, base_model=recipe.base.model)
    adapted.unload()
    cut = first_adapted_layer(decoder, spec.sites, model)
    cut = cut if cut and layer_kinds_shift(decoder, cut) else 0
    tasks = list(suite.tasks.values())
    rows = row_lengths(tasks, tokenizer)
    prompts = [prompt for task in sampled(tasks) for prompt in task.prompts[:4]]
    prompt_tokens = sum(length(prompt, tokenizer) for prompt in prompts) / len(prompts)
    return Shapes(
        recipe, suite, config, tokenizer, spec, parameters, depth, cut, rows, prompt_tokens, tuple(assumed)
    )


def found_config(recipe: Recipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None, list[str]]:
    """The base model's configuration and tokenizer, and sentences about what had to be assumed.

    Takes them from where the model is, or, some kB, from the Hub. OSError for a model of which there is
    nothing.
    """
    name, revision = recipe.base.model, recipe.base.revision
    converted = converted_folder(name)
    source = str(converted) if revision is None and converted.is_dir() else name
    options = {"revision": revision, "local_files_only": not Path(source).is_dir() and not hub_reachable()}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        return config, AutoTokenizer.from_pretrained(source, **options), []
    except OSError as error:
        if name != SMOLLM2 or revision is not None:
            raise OSError(
                f"the configuration of base model {name!r} is not on this machine and the Hub cannot be "
                f"asked; give base.model a folder with its config.json, or connect ({error})."
            ) from error
    about = f"base model {name!r} is not on this machine yet: its published shape is assumed"
    return LlamaConfig(**SMOLLM2_SHAPE), None, [f"{about}, and {LETTERS:g} letters a token"]


def empty_model(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.name_or_path = name
    return model


def sampled(tasks: list[Task]) -> list[Task]:
    """Some tasks, spread over all."""
    return tasks[:: math.ceil(len(tasks) / SAMPLED_TASKS)]


def row_lengths(tasks: list[Task], tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    """Mean lengths of training rows."""
    prompted, plain, answers = [], [], []
    for task in sampled(tasks):
        for index, example in enumerate(task.train[:SAMPLED_ROWS]):
            prompt = task.prompts[index % len(task.prompts)]
            if tokenizer is None:
                answer = length(example.answer, None) + 1
                both = [length(example_text(p, example.input), None) + answer for p in (prompt, None)]
            else:
                rows = [make_row(tokenizer, p, example) for p in (prompt, None)]
                both, answer = [len(row.ids) for row in rows], len(rows[0].ids) - rows[0].answer
            prompted.append(both[0])
            plain.append(both[1])
            answers.append(answer)
    return Rows(*(sum(lengths) / len(lengths) for lengths in (prompted, plain, answers)))


def length(text: str, tokenizer: PreTrainedTokenizerBase | None) -> float:
    """Tokens of a text."""
    return len(text) / LETTERS if tokenizer is None else float(len(tokenizer(text)["input_ids"]))


def dtype_bytes(dtype: torch.dtype) -> int:
    """Bytes a number."""
    return torch.empty(0, dtype=dtype).element_size()
