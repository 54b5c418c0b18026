"""All of a generator that is not a tensor, and the page that tells people about it.

In: a recipe and what training chose.  Out: `GeneratorConfig` (config.json) and the text of README.md.
Idea: both say where the generator came from without a path, a date or a machine: equal training, equal bytes.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ltdi_peft.cards import MARK, Place, score_part
from ltdi_peft.config import Recipe, to_dict
from ltdi_peft.spec import AdapterSpec

FORMAT_VERSION = 1


@dataclass(frozen=True)
class GeneratorConfig:
    """All of a generator that is not a tensor."""

    base_model: str
    base_revision: str | None
    spec_fingerprint: str
    weights_fingerprint: str
    encoder: str
    condition_width: int
    loss: str
    law: str
    k: int
    steps: int  # T
    sampler: str
    guidance_scale: float  # the default of generation, chosen on validation tasks
    mean_share: float  # how much of the way from the start to the mean adapter is gone, chosen with it
    denoiser: dict[str, Any]
    training_tasks: tuple[str, ...]
    norm_range: dict[str, tuple[float, float]]  # ‖ΔW‖ per site over the training adapters, least and most
    recipe: dict[str, Any]
    format_version: int = FORMAT_VERSION
    condition_examples: int = 0  # the most examples that a training condition had; 0: it reads prompts alone
    tuned: bool = False  # whether the encoder was tuned: encoder.safetensors
    attributes: bool = False  # whether conditions are probabilities of attributes: attributes.safetensors
    # guidance_scale and mean_share of adapters that work without the prompt in context; None: as the others
    alone: dict[str, float] | None = None
    alone_share: float = 0.0  # of what the network of those makes, in adapters beside a prompt
    shrunk: dict[str, Any] | None = None  # from which width, and the error; matrices are then int8

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str) -> "GeneratorConfig":
        """The inverse of `asdict`; refuses an unknown format version and unknown or missing keys by name."""
        if table.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version is {table.get('format_version')!r}, this ltdi_peft reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or train again."
            )
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING}
        if wrong := sorted((set(table) - known) | (required - set(table))):
            raise ValueError(
                f"{where}: missing or unknown keys {wrong}; a generator's config has {sorted(known)}."
            )
        ranges = {site: (float(low), float(high)) for site, (low, high) in table["norm_range"].items()}
        return cls(**{**table, "training_tasks": tuple(table["training_tasks"]), "norm_range": ranges})


def default_folder() -> Path:
    """Where the package's own generator lies, in a package that has one; `ltdi shrink` puts it there."""
    return Path(__file__).with_name("default_generator")


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a generator carries it: of a user's own files and folders only the last name."""
    table = to_dict(recipe)
    del table["output"]
    about = table["suite"]
    for key in ("source", "split_file"):
        about[key] = Path(about[key]).name if about[key] else about[key]
    table["base"]["model"] = shown_name(recipe.base.model)
    for key in ("encoded", "origin"):
        table["train"][key] = Path(table["train"][key]).name if table["train"][key] else None
    return table


def shown_name(model: str) -> str:
    """A Hub id as it is, a local folder by its last name."""
    return Path(model).name if Path(model).is_absolute() else model


CARD = """---
library_name: ltdi_peft
base_model: {base}
{license}tags: [ltdi_peft, lora, peft, adapter-generator]
---

# Adapter generator for {base}

Makes a LoRA adapter for `{base}` from one sentence that describes a task.

```python
import ltdi_peft

model = ltdi_peft.generate_adapter("Answer in formal French.", generator={argument})
model.save_pretrained("french")  # an ordinary PEFT adapter from here on
```

Trained by trajectory diffusion (`{loss}`, k = {k}, T = {steps}) on recorded fine-tunes of {tasks} tasks:
{examples}. Adapters: rank {rank}, {sites} sites ({modules}). Condition: encoder `{encoder}`. Guidance scale
{guidance:g}, chosen on validation tasks. The recipe is in `config.json`.
{more}
{scores}Limits: it knows the kinds of task that it was trained on, and a prompt far from them gives an
adapter near the mean one or a wrong one; generated adapters are to be evaluated before use. It fits
`{base}` alone.

{mark}
"""

ALONE = """
It has a network of its own for adapters that work without the task prompt in the model's context:
`generate_adapter(…, prompt_in_context=False)`, guidance scale {guidance_scale:g}.
"""

TUNED = """
The encoder's last layers were tuned on the prompts of its training tasks (`encoder.safetensors`).
"""

ATTRIBUTES = """
It reads a prompt by a classifier of attributes that its training tasks share (`attributes.safetensors`): a
prompt is a combination of them to it, and what is none of them it does not know.
"""

READS = """
It reads examples of the task beside the prompt: `generate_adapter(…, examples=[(input, answer), …])`; trained
with 1 to {count} of them.
"""

SHRUNK = """
{how} in 8 bits: what it generates moved by {error:.1%} of its
way from the shared start (mean over {prompts} prompts that had no part in choosing what is kept).
"""


def shrunk_text(about: dict[str, Any]) -> str:
    """How a generator was made smaller, and what that changed."""
    narrower = f"Shrunk from {about['from_width']} to {about['width']} numbers a site, stored"
    how = narrower if about["width"] < about["from_width"] else "Stored"
    return SHRUNK.format(how=how, **about)


def card_text(
    config: GeneratorConfig,
    spec: AdapterSpec,
    place: Place | None = None,
    scores: dict[str, Any] | None = None,
) -> str:
    """The folder's README.md. place: the repository that it is pushed to; scores: of `evaluate`."""
    sites, names = spec.sites, config.training_tasks
    return CARD.format(
        argument=place.argument if place else '"THIS_FOLDER_OR_HUB_ID"',
        license=f"license: {place.license}\n" if place and place.license else "",
        scores="\n".join([*score_part(scores), ""]) if scores else "",
        mark=MARK,
        base=shown_name(config.base_model),
        loss=config.loss,
        k=config.k,
        steps=config.steps,
        tasks=len(names),
        examples=", ".join(f"`{name}`" for name in names[:5]) + (", …" if len(names) > 5 else ""),
        rank=", ".join(str(rank) for rank in sorted({site.rank for site in sites})),
        sites=len(sites),
        modules=", ".join(sorted({site.name.rpartition(".")[2] for site in sites})),
        encoder=config.encoder,
        guidance=config.guidance_scale,
        more="".join(
            [
                ALONE.format(**config.alone) if config.alone else "",
                TUNED if config.tuned else "",
                ATTRIBUTES if config.attributes else "",
                READS.format(count=config.condition_examples) if config.condition_examples else "",
                shrunk_text(config.shrunk) if config.shrunk else "",
            ]
        ),
    )
