"""Where a generated adapter came from, and how that stays with it.

In: what the generator knew when it made the adapter.  Out: `Provenance`, in the model's memory as part of its
PEFT configuration, in a folder as provenance.json.
Idea: PEFT keeps one configuration an adapter, copies it with the model, and asks it to save itself; so a
configuration that knows its provenance writes it beside the weights whoever saves the model. A digest of the
weights tells whether they are still the generated ones.
"""

import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, no_type_check

from peft import LoraConfig, PeftModel

from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.spec import Adapter

PROVENANCE_FILE = "provenance.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """What is needed to make the adapter again, and what is known about it."""

    task_prompt: str
    seed: int
    guidance_scale: float
    generator: str | None  # Hub id, or a folder's last name; None for one that was never saved
    generator_revision: str | None  # commit on the Hub; None for a folder
    base_revision: str | None  # of the base model that the generator was trained on
    training_tasks: int
    nearest_task: str  # the training task with the most similar prompts
    nearest_similarity: float  # cosine of the conditions of both
    weights: str  # `weights_digest` of what was generated
    scores: dict[str, Any] | None  # the generator's own evaluation, if it carries one
    prompt_in_context: bool = True  # whether it was made for a model that has the prompt in its context
    examples: int = 0  # so many were read beside the prompt,
    inputs: int = 0  # and so many inputs without answers
    reading: dict[str, str] = field(
        default_factory=dict
    )  # attribute → the value that the prompt was taken for
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str) -> "Provenance":
        """The inverse of `asdict`; ValueError names missing and unknown keys, and another format version."""
        if table.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version is {table.get('format_version')!r}, this ltdi_peft reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or delete the file."
            )
        since = {"prompt_in_context": True, "examples": 0, "inputs": 0, "reading": {}}
        table = {**since, **table}  # older files do not say
        if wrong := sorted({f.name for f in fields(cls)} ^ set(table)):
            raise ValueError(f"{where}: missing or unknown keys {wrong}. Delete the file to push without it.")
        return cls(**table)


@no_type_check  # of fields that it inherits: PEFT takes a float alpha and a set of names, and says otherwise
class GeneratedConfig(LoraConfig):
    """PEFT's LoraConfig with its adapter's provenance, which is no part of adapter_config.json.

    No field of the dataclass, so that PEFT's derived configurations (`add_weighted_adapter`) do not claim it.
    """

    provenance: Provenance | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # noqa: ANN401  # PEFT's signature
        """adapter_config.json as PEFT writes it, and provenance.json beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.provenance is not None:
            write_provenance(Path(save_directory), self.provenance)


def note_provenance(model: PeftModel, provenance: Provenance, adapter_name: str = "default") -> PeftModel:
    """The same model; its adapter's configuration now knows where the adapter came from."""
    plain = vars(model.peft_config[adapter_name])
    config = GeneratedConfig(**{f.name: plain[f.name] for f in fields(LoraConfig)})
    config.provenance = provenance
    model.peft_config[adapter_name] = config
    return model


def provenance_of(model: PeftModel, adapter_name: str = "default") -> Provenance | None:
    """None for an adapter that `generate_adapter` did not make in this process."""
    config = model.peft_config[adapter_name]
    return config.provenance if isinstance(config, GeneratedConfig) else None


def weights_digest(adapter: Adapter) -> str:
    """16 hex digits of all factors in token order."""
    digest = hashlib.sha256()
    for site, pair in sorted(adapter.items()):
        digest.update(site.encode())
        for factor in pair:
            digest.update(factor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """provenance.json in an adapter's folder."""
    replace_file(folder / PROVENANCE_FILE, json_bytes(asdict(provenance)))


def read_provenance(folder: Path) -> Provenance | None:
    """None for a folder without provenance.json."""
    file = folder / PROVENANCE_FILE
    return Provenance.from_dict(read_json(file), str(file)) if file.is_file() else None
