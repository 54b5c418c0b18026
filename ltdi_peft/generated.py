"""One generated adapter, before it is on any model.

In: spec, weights, provenance.  Out: a PEFT folder with its page.
Idea: what a server or a hot swap needs; no base model is loaded to make or to save it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from peft import PeftModel

from ltdi_peft.adapter import (
    Adapter,
    AdapterSpec,
    refuse_merged,
    require_same_spec,
    save_adapter_folder,
    set_adapter_weights,
    spec_of,
)
from ltdi_peft.cards import adapter_card, write_card
from ltdi_peft.provenance import Provenance, note_provenance, weights_digest, write_provenance


@dataclass(frozen=True)
class GeneratedAdapter:
    """What a server or a hot swap needs: the spec and the weights, with where they came from."""

    spec: AdapterSpec
    adapter: Adapter
    origin: Provenance  # but for the digest of the weights
    clamped: tuple[str, ...]  # sites whose norm was scaled into the training range

    @cached_property
    def provenance(self) -> Provenance:
        """Where it came from; the weights are hashed at the first call."""
        return replace(self.origin, weights=weights_digest(self.adapter))

    @property
    def prompt(self) -> str:
        """The sentence that it was made from."""
        return self.origin.task_prompt

    @property
    def seed(self) -> int:
        """Of the noise that its chain began with."""
        return self.origin.seed

    @property
    def nearest_task(self) -> str:
        """The training task whose prompts are the most similar."""
        return self.origin.nearest_task

    @property
    def nearest_similarity(self) -> float:
        """Cosine of the prompt's condition and that task's."""
        return self.origin.nearest_similarity

    def swap_into(self, model: PeftModel, adapter_name: str = "default") -> PeftModel:
        """Hot swap: overwrite an adapter that is on a model by this one, in place, in milliseconds.

        The same model comes back; its parameters stay the same objects, so a compiled model stays compiled.
        Of the proof of load only the checks that need no forward pass are made: same spec, shapes, all
        finite. Raises SpecMismatchError, BrokenAdapterError, or ValueError for a merged adapter, before
        anything is changed.
        """
        require_same_spec(self.spec, spec_of(model, adapter_name), f"hot swap of {adapter_name!r}")
        refuse_merged(model, adapter_name)
        set_adapter_weights(model, self.adapter, adapter_name)
        return note_provenance(model, self.provenance, adapter_name)

    def save_pretrained(self, folder: str | Path) -> None:
        """A PEFT folder with its page and provenance.json; the same adapter gives the same bytes."""
        save_adapter_folder(Path(folder), self.spec, self.adapter)
        write_provenance(Path(folder), self.provenance)
        write_card(Path(folder), adapter_card(self.spec, self.provenance))
