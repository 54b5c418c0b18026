"""Task prompts, and perhaps examples, → conditions.

In: prompts, and the examples or inputs that came with each.  Out: (prompt, condition) float32, a unit vector
each; or probabilities of attributes (attributes.py).
Idea: the generator never sees text, only where its encoder puts the prompt. A sentence embedding says what
a prompt means; which words it has in common with the training prompts says more about new wordings of the
same parts (measured: docs/log.md), so the two can stand side by side.
Examples say by their answers what wordings leave open. Their part is a mean, so their order says nothing; it
is zero where there are none, and beside it the prompt weighs less, so one linear map can tell both cases.
A sentence encoder may be tuned on the training tasks (tuning.py); examples are then read as before.
Source: all-MiniLM-L6-v2 pools by the mean over tokens and normalises (sentence-transformers' model card);
signed feature hashing, arXiv:0902.2206.
"""

import copy
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ltdi_peft.attributes import AttributeClassifier
from ltdi_peft.base import MINILM, Base, locate, weights_fingerprint
from ltdi_peft.config import ENCODERS
from ltdi_peft.provenance import weights_digest
from ltdi_peft.spec import Adapter, delta_w
from ltdi_peft.task import Example

VERSION = 1  # of what is made of a text, for conditions that are kept
BATCH = 64  # prompts a forward pass
WORDS = 512  # numbers that the words of a prompt are hashed into
PROMPT_WEIGHT = 0.5  # of a prompt that has examples beside it
WORD = re.compile(r"\w+|[^\w\s]")


class PromptEncoder:
    """Prompts → unit vectors by mean-pooled hidden states.

    `minilm` is a sentence encoder of 23 M parameters (Hub, or the wheel), `minilm_words` the same with
    `hashed_words` beside it; `base` reads the middle layer of the base model itself (of an encoder-decoder's
    encoder), so that nothing more is downloaded. `examples`: the most that a training condition has of them;
    0 reads prompts alone. `tuning`: what is added to a sentence encoder's weights, site for site. With
    `attributes` conditions are the probabilities that it tells, no unit vectors. A sentence encoder runs on
    the device of `base`, else on the CPU.
    """

    def __init__(
        self,
        name: str,
        *,
        base: Base | None = None,
        token: str | None = None,
        examples: int = 0,
        tuning: Adapter | None = None,
        attributes: AttributeClassifier | None = None,
    ) -> None:
        self.name = name
        self.examples = examples
        self.words = name == "minilm_words"
        if name == "minilm" or self.words:
            source = locate(MINILM, token=token)
            model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
            self.model = model.to(base.model.device) if base else model  # type: ignore[arg-type]
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
            self.layer = -1
        elif name == "base":
            if base is None:
                raise ValueError(
                    "condition.encoder 'base' needs the base model to encode a prompt: pass base=."
                )
            self.model, self.tokenizer = text_reader(base.model), base.tokenizer
            self.layer = base.model.config.num_hidden_layers // 2
        else:
            raise ValueError(f"condition.encoder is {name!r}; known encoders are {sorted(ENCODERS)}.")
        self.plain = copy.deepcopy(self.model) if tuning and examples else self.model
        with torch.no_grad():
            for site, weight in added(self.model, tuning or {}).items():
                self.model.get_parameter(site).copy_(weight)
        hidden = int(self.model.config.hidden_size)
        self.prompt_width = hidden + (WORDS if self.words else 0)
        self.evidence_width = hidden + WORDS if examples else 0
        self.attributes = attributes
        self._tuned = weights_digest(tuning) if tuning else None

    @property
    def width(self) -> int:
        """Numbers of a condition."""
        return self.attributes.width if self.attributes else self.prompt_width + self.evidence_width

    def identity(self) -> dict[str, Any]:
        """What conditions depend on beside the texts and attributes, as JSON."""
        model = self.model
        where = [str(model.dtype), model.device.type]
        about = {"version": VERSION, "encoder": self.name, "examples": self.examples, "tuned": self._tuned}
        return {**about, "weights": weights_fingerprint(model), "computed": where}

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        examples: Sequence[Sequence[Example]] = (),
        inputs: Sequence[Sequence[str]] = (),
    ) -> Float[Tensor, "prompt condition"]:
        """Unit vectors on the CPU. `examples`, or `inputs` without answers: of each prompt, or none at all.

        Raises ValueError for an empty prompt, for a text that is longer than the encoder reads, for examples
        or inputs where it reads none, and unless there is a list of them for each prompt.
        """
        self._require_readable(prompts, examples, inputs)
        said = self.said(prompts)
        if self.attributes:
            return self.attributes(said, self.about(inputs) if inputs else None)
        if not self.examples:
            return said
        shown = torch.zeros(len(prompts), self.evidence_width)
        if examples:
            shown, said = self.evidence(examples), PROMPT_WEIGHT * said
        return functional.normalize(torch.cat([said, shown], 1), dim=-1)

    def _require_readable(
        self, prompts: Sequence[str], examples: Sequence[Sequence[Example]], inputs: Sequence[Sequence[str]]
    ) -> None:
        """ValueError as `__call__` says."""
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError("a task prompt is empty; describe the task, e.g. 'Translate to French.'")
        if examples and not self.examples:
            raise ValueError(
                "these conditions are of prompts alone; a recipe with condition.examples above 0 trains a "
                "generator that reads examples."
            )
        if inputs and (self.attributes is None or self.attributes.inputs is None):
            raise ValueError(
                "inputs tell which of its attributes a task has, and these conditions read none: a recipe "
                "with condition.attributes, whose training tasks have examples, trains a generator that does."
            )
        for name, lists in (("examples", examples), ("inputs", inputs)):
            if lists and (len(lists) != len(prompts) or not all(lists)):
                raise ValueError(
                    f"{name} are one list a prompt, none of them empty: {len(prompts)} prompts came with "
                    f"lists of {[len(own) for own in lists]}."
                )

    def with_attributes(self, attributes: AttributeClassifier | None) -> "PromptEncoder":
        """The same encoder, told what these tell of its conditions; None: nothing."""
        twin = copy.copy(self)
        twin.attributes = attributes
        return twin

    def said(
        self, prompts: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "prompt said"]:
        """Unit vectors of prompts alone, on the CPU; differentiable in `weights`, put in place of its own."""
        pooled = self._pooled(self.model, prompts, weights)
        if not self.words:
            return pooled
        # Both are unit vectors, so each has half a say.
        return functional.normalize(torch.cat([pooled, hashed_words(prompts)], 1), dim=-1)

    def about(self, inputs: Sequence[Sequence[str]]) -> Float[Tensor, "task hidden"]:
        """Unit vectors of what inputs are about: the mean of their meanings."""
        return functional.normalize(torch.stack(self._means(inputs)), dim=-1)

    def evidence(self, examples: Sequence[Sequence[Example]]) -> Float[Tensor, "task evidence"]:
        """Unit vectors of what examples show: what they are about, and the words of their answers."""
        shown, rows = [[f"{e.input} -> {e.answer}" for e in own] for own in examples], []
        for own, about in zip(examples, self._means(shown), strict=True):
            form = hashed_words([e.answer for e in own]).mean(0)
            rows.append(torch.cat([functional.normalize(part, dim=-1) for part in (about, form)]))
        return functional.normalize(torch.stack(rows), dim=-1)

    def _means(self, groups: Sequence[Sequence[str]]) -> list[Float[Tensor, " hidden"]]:
        """The mean over each group's texts; a text is read once, however often it occurs."""
        texts = list(dict.fromkeys(text for group in groups for text in group))
        places = {text: place for place, text in enumerate(texts)}
        meaning = self._pooled(self.plain, texts)
        return [meaning[[places[text] for text in group]].mean(0) for group in groups]

    def _pooled(
        self, model: PreTrainedModel, texts: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "text hidden"]:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # so that little is padding
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        parts = [self._pooled_batch(model, [texts[i] for i in batch], weights or {}) for batch in batches]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _pooled_batch(
        self, model: PreTrainedModel, prompts: list[str], weights: Mapping[str, Tensor]
    ) -> Float[Tensor, "prompt hidden"]:
        ids, mask = (tensor.to(model.device) for tensor in padded(self.tokenizer, prompts))
        most = longest_text(model.config)
        if most is not None and ids.shape[1] > most:
            raise ValueError(
                f"a prompt has {ids.shape[1]} tokens, encoder {self.name!r} reads at most {most}: shorten it."
            )
        asked = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
        out = functional_call(model, dict(weights), (), asked) if weights else model(**asked)
        hidden = out.hidden_states[self.layer].float()
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(pooled, dim=-1).cpu()


def added(model: PreTrainedModel, tuning: Adapter) -> dict[str, Tensor]:
    """Weights of the model's linear layers at these sites with B A added; differentiable in both."""
    weights = {site: model.get_parameter(f"{site}.weight") for site in tuning}
    return {
        f"{site}.weight": weight + delta_w(*tuning[site], 1.0).to(weight) for site, weight in weights.items()
    }


def hashed_words(prompts: Sequence[str]) -> Float[Tensor, "prompt word"]:
    """Unit vectors: each word and mark adds ±1 at a place, both told by its hash; then signed square roots.

    A prompt whose words cancel out gives zeros.
    """
    out = torch.zeros(len(prompts), WORDS)
    for row, prompt in zip(out, prompts, strict=True):
        for word in WORD.findall(prompt.lower()):
            hashed = zlib.crc32(word.encode())
            row[hashed % WORDS] += 1 if hashed >> 20 & 1 else -1
    return functional.normalize(out.sign() * out.abs().sqrt(), dim=-1)


def text_reader(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text into hidden states."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()  # type: ignore[return-value]
    return model.get_decoder() if model.can_generate() else model.base_model  # type: ignore[return-value]


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None for relative positions without a limit (T5)."""
    key = "max_position_embeddings"
    return config.to_dict().get(config.attribute_map.get(key, key))


def padded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[Int[Tensor, "text length"], Int[Tensor, "text length"]]:
    """Token ids padded on the right with 0, and the mask."""
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(mask, batch_first=True)
