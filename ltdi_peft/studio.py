"""What the local page does, without the page: adapters made, measured, talked to and packed.

In: a generator and its base model, loaded once; an `Order` (a task, perhaps examples).  Out: `Made`.
Idea: one model in memory carries the adapters of all open pages by name; a lock lets one request at a time
use it. Every number that is shown is one that generating or scoring finds.
"""

import itertools
import re
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ltdi_peft.adapter import read_adapter, spec_of
from ltdi_peft.base import Base
from ltdi_peft.batched import AdaptedBase, stack_adapters
from ltdi_peft.generate import (
    as_base,
    best_device,
    find_generator,
    generate_adapter,
    load_base_of,
    require_same_base,
)
from ltdi_peft.generator import Generator
from ltdi_peft.provenance import Provenance, provenance_of
from ltdi_peft.publish import save_adapter
from ltdi_peft.refine import refine
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import AdapterSpec
from ltdi_peft.talk import Question, answer
from ltdi_peft.task import Example

ARROW = "=>"
SHOWN_TASKS = 5  # nearest training tasks
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say: equal adapters give equal bytes


@dataclass(frozen=True)
class Order:
    """What to make. Candidates and refinement steps are used with examples only."""

    prompt: str
    examples: tuple[Example, ...] = ()
    seed: int = 0
    guidance_scale: float | None = None  # None is the generator's own
    candidates: int = 1
    refine_steps: int = 0


@dataclass(frozen=True)
class Measured:
    """Examples answered right, of `count`, with the task prompt in context."""

    count: int
    base: int
    adapter: int


@dataclass(frozen=True)
class Made:
    """One adapter that lies on the studio's model as `name`."""

    name: str
    order: Order
    spec: AdapterSpec
    provenance: Provenance
    nearest: tuple[tuple[str, float], ...]  # training tasks and the cosine of their prompts, nearest first
    measured: Measured | None  # None without examples
    warnings: tuple[str, ...]
    archive: Path  # zip of its PEFT folder


def parse_examples(text: str) -> tuple[Example, ...]:
    """A line `input => answer` an example, blank lines left out; ValueError names the line that is none."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = [part.strip() for part in line.split(ARROW)]
        if line.strip() and not (len(parts) == 2 and all(parts)):
            raise ValueError(
                f"line {number} of the examples is {line.strip()!r}; expected: input {ARROW} answer, with a "
                f"single {ARROW} and a text on both sides."
            )
        if line.strip():
            found.append(Example(parts[0], parts[1]))
    return tuple(found)


class Studio:
    """A generator and its base model, loaded once, with the adapters that were made here."""

    def __init__(self, generator: Generator, base: Base) -> None:
        if base.model.config.is_encoder_decoder or not base.model.can_generate():
            raise ValueError(
                f"{type(base.model).__name__} is no causal language model, so there is nobody to talk to; "
                f"`ltdi generate` makes its adapters."
            )
        require_same_base(generator, base)
        self.generator = generator
        self.base = base
        self.model: PreTrainedModel | PeftModel = base.model
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._folder = tempfile.TemporaryDirectory(prefix="ltdi-serve-")
        self.nearest_tasks("warm up")  # loads the sentence encoder; what fails should fail now

    def make(self, order: Order) -> Made:
        """Generate, perhaps choose and refine by examples, measure on them, pack.

        Raises what `generate_adapter` and `refine` raise; the model then has no more adapters than before.
        """
        name = f"page-{next(self._numbers)}"
        used = order.candidates > 1 or self.generator.config.condition_examples > 0
        with self._lock, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            self.model = generate_adapter(
                order.prompt,
                generator=self.generator,
                base_model=self.model,
                tokenizer=self.base.tokenizer,
                examples=order.examples if used else (),
                num_candidates=order.candidates if order.examples else 1,
                guidance_scale=order.guidance_scale,
                seed=order.seed,
                adapter_name=name,
            )
            try:
                return self._finish(self.model, order, name, said)
            except BaseException:
                self._remove(name)
                raise

    def nearest_tasks(self, prompt: str) -> tuple[tuple[str, float], ...]:
        """The most similar training tasks, with the cosine of the conditions, nearest first."""
        tasks = self.generator.config.training_tasks
        with self._lock, as_base(self.model), torch.no_grad():
            cosines = self.generator.similarities(self.generator.encode_prompts([prompt], self.base))[0]
        values, indices = cosines.topk(min(SHOWN_TASKS, len(tasks)))
        return tuple((tasks[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True))

    def ask_base(self, question: Question) -> str:
        """The base model's answer."""
        with self._lock, as_base(self.model):
            return answer(self.model, self.base.tokenizer, question)

    def ask_adapted(self, made: Made, question: Question) -> str:
        """The answer of the base model with this adapter."""
        with self._lock:
            if not isinstance(self.model, PeftModel) or made.name not in self.model.peft_config:
                raise ValueError("this adapter is no longer loaded; generate it again.")
            self.model.set_adapter(made.name)
            return answer(self.model, self.base.tokenizer, question)

    def forget(self, made: Made) -> None:
        """Take an adapter off the model and delete its archive; a second call changes nothing."""
        with self._lock:
            if isinstance(self.model, PeftModel) and made.name in self.model.peft_config:
                self._remove(made.name)
            shutil.rmtree(made.archive.parent, ignore_errors=True)

    def close(self) -> None:
        """Delete all archives."""
        self._folder.cleanup()

    def _finish(
        self, model: PeftModel, order: Order, name: str, said: Sequence[warnings.WarningMessage]
    ) -> Made:
        """Refine, measure and pack what was just put on the model."""
        if order.examples and order.refine_steps:
            options = {"prompt": order.prompt, "adapter_name": name, "tokenizer": self.base.tokenizer}
            refine(model, order.examples, steps=order.refine_steps, seed=order.seed, **options)
        provenance = provenance_of(model, name)
        if provenance is None:
            raise ValueError(f"adapter {name!r} was not generated here.")
        return Made(
            name,
            order,
            spec_of(model, name),
            provenance,
            self.nearest_tasks(order.prompt),
            self._measure(model, name, order) if order.examples else None,
            tuple(dict.fromkeys(str(one.message) for one in said if issubclass(one.category, UserWarning))),
            self._pack(model, name, order.prompt),
        )

    def _measure(self, model: PeftModel, name: str, order: Order) -> Measured:
        """The base model and the adapter on the order's examples."""
        with as_base(model):
            spec, adapter = spec_of(model, name), read_adapter(model, name)
            nothing = {site: (a, torch.zeros_like(b)) for site, (a, b) in adapter.items()}
            adapted = AdaptedBase(self.base, spec.sites)
            sheet = make_sheet(adapted, order.examples, [order.prompt])
            right = score(adapted, sheet, stack_adapters([nothing, adapter], adapted.device)).correct.sum(1)
        return Measured(len(order.examples), *right.tolist())

    def _remove(self, name: str) -> None:
        """The adapter off the model; with the last one PEFT's wrapping goes too."""
        if not isinstance(self.model, PeftModel):
            return
        if len(self.model.peft_config) > 1:
            self.model.set_adapter(next(other for other in self.model.peft_config if other != name))
            self.model.delete_adapter(name)
        else:
            self.model.unload()
            self.model = self.base.model

    def _pack(self, model: PeftModel, name: str, prompt: str) -> Path:
        """A zip with one folder in it, called after the prompt."""
        title = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "adapter"
        folder = Path(self._folder.name) / name / title
        save_adapter(model, folder)
        archive = folder.with_name(f"{title}.zip")
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(folder.iterdir()):
                entry = zipfile.ZipInfo(f"{title}/{file.name}", ZIP_DATE)
                packed.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
        shutil.rmtree(folder)
        return archive


def open_studio(
    generator: str | Path | None = None,
    *,
    base_model: str | Path | None = None,
    device: str | None = None,
    load_in_4bit: bool = False,
) -> Studio:
    """Load a generator (a folder or Hub id; else as `generate_adapter` finds one) and its base model.

    Raises ValueError for a device that this machine lacks, and what loading raises.
    """
    place = device_named(device) if device else best_device()
    trained = find_generator(generator)
    options = {"device": place, "dtype": "auto", "load_in_4bit": load_in_4bit}
    return Studio(trained, load_base_of(trained, base_model, token=None, cache_dir=None, **options))


def device_named(name: str) -> torch.device:
    """A device of this machine; ValueError says which there are."""
    known = sorted({"cpu", best_device().type})
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in known:
        raise ValueError(f"device is {name!r}; this machine has {known}.")
    return device
