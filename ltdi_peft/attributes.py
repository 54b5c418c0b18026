"""Which attributes a prompt asks for: condition → probabilities, from tasks whose attributes are known.

In: conditions of training prompts, perhaps what their tasks' inputs are about, and the attributes of these
tasks, e.g. {"question": "plural", "format": "capitals"}.  Out: `AttributeClassifier`.
Idea: adapters of tasks that share an attribute share a part, and the parts of a combination that nobody
trained on add up to nearly its own adapter (docs/log.md). A linear map from prompt to adapter blurs the parts
with every new wording. So a ridge regression tells how much a condition speaks for each value, a softmax over
the values of an attribute makes that sharp, and adapters are predicted from these probabilities.
A prompt may fit several tasks ("Which weekday is it?"), and a few inputs, without answers, tell what they are
about. A second regression reads those: how much likelier they make a value is added to what the prompt says.
Source: direct attribute prediction, Lampert et al. 2009 (doi:10.1109/CVPR.2009.5206594).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from ltdi_peft.centre import Ridge, fit_ridge, task_rows
from ltdi_peft.files import read_header, replace_file

FILE, HEADER, WEIGHT = "attributes.safetensors", "attributes", "weight"
INPUTS, RATES = "inputs", "rates"
STRENGTH = 1e-4  # of the regression; 3e-5 … 3e-4 are as good on held-out wordings (docs/log.md)
SHARPNESS = 30.0  # of the softmax: scores are shares of 1; 20 … 50 are as good
INPUT_STRENGTH = 1e-3  # of the regression on inputs; 1e-4 … 1e-2 are as good
INPUT_WEIGHT = 2.0  # of what inputs say, a logarithm; 1 leaves more to the prompt, 4 is as good
LEAST_RATIO = 0.02  # inputs make no value unlikelier than that

Attributes = tuple[tuple[str, str], ...]
"""(attribute, value) pairs of a task, as `Task.attributes` has them."""
Values = dict[str, tuple[str, ...]]
"""Attribute → its known values; both in the order of the probabilities."""


@dataclass(frozen=True, eq=False)
class AttributeClassifier:
    """Conditions → for each attribute the probability of each of its values."""

    values: Values
    weight: Float[Tensor, "input value"]  # of a `centre.Ridge`
    inputs: Float[Tensor, "meaning value"] | None = None  # of a `centre.Ridge` on what inputs are about
    rates: Float[Tensor, " value"] | None = None  # share of the training tasks that have each value

    @property
    def width(self) -> int:
        """Numbers of a result."""
        return sum(map(len, self.values.values()))

    def __call__(
        self,
        conditions: Float[Tensor, "*row condition"],
        about: Float[Tensor, "row hidden"] | None = None,
    ) -> Float[Tensor, "*row value"]:
        """Those of an attribute add up to 1; float32. about: of each row's inputs, or None."""
        scores = Ridge(self.weight)(conditions.flatten(0, -2)) * SHARPNESS
        if about is not None:
            scores = scores + INPUT_WEIGHT * self.likelier(about)
        sharp = torch.cat([part.softmax(1) for part in self._parts(scores)], 1)
        return sharp.view(*conditions.shape[:-1], -1)

    def likelier(self, about: Float[Tensor, "row hidden"]) -> Float[Tensor, "row value"]:
        """Logarithm of how many times likelier each value is for a task with such inputs than for any."""
        if self.inputs is None or self.rates is None:
            raise ValueError("this classifier was fitted on prompts alone; it reads no inputs.")
        told = zip(self._parts(Ridge(self.inputs)(about)), self._parts(self.rates), strict=True)
        ratios = [as_shares(said) / as_shares(rate) for said, rate in told]
        return torch.cat(ratios, 1).clamp_min(LEAST_RATIO).log()

    def reading(self, probabilities: Float[Tensor, " value"]) -> dict[str, str]:
        """Attribute → its most probable value."""
        parts = zip(self.values.items(), self._parts(probabilities), strict=True)
        return {name: values[int(part.argmax())] for (name, values), part in parts}

    def readings(self, probabilities: Float[Tensor, " value"], count: int) -> Float[Tensor, "reading value"]:
        """The `count` most probable combinations of values, best first, each as if it were certain.

        Fewer where there are fewer combinations.
        """
        found = [(1.0, torch.zeros(0))]
        for part in self._parts(probabilities):
            chances, places = part.topk(min(count, len(part)))
            sure = functional.one_hot(places, len(part)).to(probabilities)
            longer = [
                (chance * more.item(), torch.cat([said, one]))
                for chance, said in found
                for more, one in zip(chances, sure, strict=True)
            ]
            # Of a combination that is among the best its beginning is too: the attributes are independent.
            found = sorted(longer, key=lambda one: -one[0])[:count]
        return torch.stack([said for _, said in found]) if found else probabilities.new_zeros(0, self.width)

    def _parts(self, probabilities: Float[Tensor, "*row value"]) -> tuple[Tensor, ...]:
        """Those of each attribute."""
        return probabilities.split([len(values) for values in self.values.values()], dim=-1)


def as_shares(values: Float[Tensor, "*row value"]) -> Float[Tensor, "*row value"]:
    """What is below 0 taken as 0, then of 1 together; all equal where nothing is left."""
    kept = values.clamp_min(0) + 1e-6
    return kept / kept.sum(-1, keepdim=True)


def known_values(tasks: Sequence[Attributes]) -> Values:
    """Of every attribute that any of the tasks has, sorted."""
    pairs = sorted({pair for task in tasks for pair in task})
    return {name: tuple(value for key, value in pairs if key == name) for name, _ in pairs}


def fit_classifier(
    conditions: Float[Tensor, "task prompt condition"], tasks: Sequence[Attributes]
) -> AttributeClassifier:
    """From every prompt of the training tasks. An attribute that a task lacks speaks for none of its values.

    Raises ValueError where no task has attributes.
    """
    values = known_values(tasks)
    if not values:
        raise ValueError(
            f"condition.attributes is true, but none of the {len(tasks)} training tasks has attributes. Give "
            f'them some, e.g. Task(…, attributes={{"language": "German"}}), or set it to false.'
        )
    rows, task = task_rows(conditions)
    return AttributeClassifier(values, fit_ridge(rows, one_hot(values, tasks)[task], STRENGTH).weight.float())


def reading_inputs(
    classifier: AttributeClassifier, about: Float[Tensor, "task draw hidden"], tasks: Sequence[Attributes]
) -> AttributeClassifier:
    """The classifier, which reads inputs too. about: what draws of each training task's inputs are about."""
    targets = one_hot(classifier.values, tasks)
    rows, task = task_rows(about)
    inputs = fit_ridge(rows, targets[task], INPUT_STRENGTH).weight.float()
    return replace(classifier, inputs=inputs, rates=targets.mean(0))


def one_hot(values: Values, tasks: Sequence[Attributes]) -> Float[Tensor, "task value"]:
    """1 for what a task has."""
    pairs = [(name, value) for name, own in values.items() for value in own]
    return torch.tensor([[float(pair in own) for pair in pairs] for own in tasks])


def save_classifier(classifier: AttributeClassifier, file: Path, plan: dict[str, Any] | None = None) -> None:
    """One safetensors file; `plan`: what it depends on."""
    about = {"values": {name: list(values) for name, values in classifier.values.items()}, "plan": plan}
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(classifier).items()}
    replace_file(file, save(tensors, metadata={HEADER: json.dumps(about)}))


def tensors_of(classifier: AttributeClassifier) -> dict[str, Tensor]:
    """Its tensors by their names in a file."""
    named = {WEIGHT: classifier.weight, INPUTS: classifier.inputs, RATES: classifier.rates}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def load_classifier(file: Path) -> AttributeClassifier:
    """The inverse of `save_classifier`. KeyError for another file, SafetensorError for a damaged one."""
    values = {name: tuple(values) for name, values in read_header(file, HEADER)["values"].items()}
    found = load_file(file)
    return AttributeClassifier(values, found[WEIGHT], found.get(INPUTS), found.get(RATES))


def classifier_plan(file: Path) -> dict[str, Any]:
    """What it was saved with."""
    return read_header(file, HEADER)["plan"]
