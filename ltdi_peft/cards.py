"""The pages that people read on the Hub: of an adapter, and of a store of runs.

In: an adapter's spec and provenance, or the runs of a store.  Out: the text of README.md.
Idea: a page is a function of what it describes, without a date, a path or a machine: equal adapters, equal
bytes. The program on it runs as printed. A page that its owner wrote is never replaced: ours carry a mark.
(A generator's page is in generator_config.py.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ltdi_peft.batched import example_text
from ltdi_peft.files import replace_file
from ltdi_peft.provenance import Provenance
from ltdi_peft.spec import AdapterSpec
from ltdi_peft.store import Trajectory

CARD_FILE = "README.md"
MARK = (
    "<!-- Written by ltdi_peft, which writes this page anew when it pushes, unless you delete this line. -->"
)
UNFILLED = "# Model Card for Model ID"  # the title of the template that PEFT leaves to be filled in
SHOWN = ("base", "mean", "ridge", "multi_task_lora", "ours", "oracle")  # rows of a table of scores
UNSEEN = {"unseen_tasks": "unseen tasks", "unseen_domains": "unseen domains"}
AUTO_CLASSES = {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Place:
    """Where a page will be read: what loads the folder there, and under which licence it is."""

    name: str = "."  # a repository id; "." is the folder itself
    revision: str | None = None  # a branch; None is main
    license: str | None = None  # a Hub licence id, e.g. apache-2.0

    @property
    def argument(self) -> str:
        """What stands between the brackets of `from_pretrained`."""
        return f'"{self.name}"' + (f', revision="{self.revision}"' if self.revision else "")


@dataclass(frozen=True)
class Nearest:
    """The stored run that an adapter is nearest to: ‖ΔW − ΔW'‖ over all sites, relative to ‖ΔW'‖."""

    task: str
    distance: float


def front_matter(**entries: object) -> str:
    """The YAML head of a page, without empty entries."""
    kept = {key: value for key, value in entries.items() if value is not None}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n"


def own_card(folder: Path) -> str | None:
    """README.md as the folder's owner wrote it; None where there is none, or ours, or PEFT's template."""
    file = folder / CARD_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else MARK
    return None if MARK in text or UNFILLED in text else text


def write_card(folder: Path, text: str) -> None:
    """README.md, unless the folder has one of its owner's own."""
    if own_card(folder) is None:
        replace_file(folder / CARD_FILE, text.encode())


# ---- an adapter


def adapter_card(
    spec: AdapterSpec,
    provenance: Provenance | None,
    place: Place = Place(),
    *,
    changed: bool = False,
    nearest: Nearest | None = None,
) -> str:
    """The page of one adapter. `changed`: its weights are no longer those that were generated."""
    causal = spec.config.get("task_type") in (None, "CAUSAL_LM")
    tags = [f"base_model:adapter:{spec.base_model}", "lora", "ltdi_peft", "transformers"]
    head = front_matter(
        base_model=spec.base_model,
        library_name="peft",
        pipeline_tag="text-generation" if causal else None,
        license=place.license,
        tags=[*tags, "generated-adapter"] if provenance else tags,
    )
    made = generated_part(spec, provenance, changed, nearest) if provenance else [described(spec)]
    title = f"# {'Generated ' if provenance else ''}LoRA adapter for {spec.base_model}"
    return "\n".join([head + title, "", *made, "", *use_part(spec, provenance, place), MARK, ""])


def generated_part(
    spec: AdapterSpec, provenance: Provenance, changed: bool, nearest: Nearest | None
) -> list[str]:
    """What it was made from and what is known of it, then what it cannot do."""
    beside = provenance.prompt_in_context
    quoted = [f"> {line}" for line in provenance.task_prompt.splitlines()]
    near = f"`{provenance.nearest_task}`, cosine {provenance.nearest_similarity:.2f} of the task prompts"
    adapter = "not measured"
    if nearest:
        adapter = f"a run of `{nearest.task}`, ‖ΔW − ΔW'‖ / ‖ΔW'‖ = {nearest.distance:.3f}"
    rows = {
        "generator": generator_row(provenance),
        "seed, guidance scale": f"{provenance.seed}, {provenance.guidance_scale:g}",
        "made for a model": "with the sentence in its context" if beside else "without the sentence",
        **({"read as": read_as(provenance)} if provenance.reading else {}),
        f"nearest of {provenance.training_tasks} training tasks": near,
        "nearest training adapter": adapter,
        "adapter": described(spec),
    }
    counts = {"examples": provenance.examples, "inputs without answers": provenance.inputs}
    seen = " ".join(f"and {count} {name}" for name, count in counts.items() if count) or "alone"
    lines = [f"Generated by ltdi_peft from this sentence {seen}:", ""]
    lines += [*quoted, "", *table_of(("", ""), rows.items()), ""]
    if changed:
        lines += [
            "**The weights were changed after they were generated** (refined, trained, or rounded).",
            "",
        ]
    return lines + score_part(provenance.scores) + LIMITS.format(base=spec.base_model).splitlines()


LIMITS = """## What it cannot do

It was never trained on its task, only generated from what stands above, and it was not scored on it: evaluate
it before use. It adds no knowledge that the base model lacks. The generator knows the kinds of task that it
was trained on; far from them (see the nearest one above) the adapter is close to an average one, or wrong.
It fits `{base}` and no other model.
"""


def read_as(provenance: Provenance) -> str:
    """Which value of each attribute the prompt was taken for."""
    return ", ".join(f"{name} {value}" for name, value in provenance.reading.items())


def generator_row(provenance: Provenance) -> str:
    """Id and revision, as far as there are any."""
    if provenance.generator is None:
        return "one that was never saved"
    if provenance.generator_revision is None:
        return f"`{provenance.generator}`, a folder that is not on the Hub"
    return f"`{provenance.generator}` on the Hub, revision `{provenance.generator_revision}`"


def described(spec: AdapterSpec) -> str:
    """Rank, alpha and sites in a line."""
    ranks = ", ".join(str(rank) for rank in sorted({site.rank for site in spec.sites}))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({site.alpha for site in spec.sites}))
    names = ", ".join(sorted({site.name.rpartition(".")[2] for site in spec.sites}))
    return f"rank {ranks}, alpha {alphas}, {len(spec.sites)} sites ({names})"


def use_part(spec: AdapterSpec, provenance: Provenance | None, place: Place) -> list[str]:
    """A program that loads the adapter, with PEFT alone, and asks it something."""
    auto = AUTO_CLASSES.get(str(spec.config.get("task_type")), "AutoModelForCausalLM")
    base = Place(spec.base_model, provenance.base_revision if provenance else None).argument
    text = example_text(provenance.task_prompt if provenance else None, "your input")
    program = [f"from transformers import {auto}, AutoTokenizer", ""]
    program += [
        f"base = {auto}.from_pretrained({base})",
        f"tokenizer = AutoTokenizer.from_pretrained({base})",
    ]
    program += [f"model = PeftModel.from_pretrained(base, {place.argument})"]
    program += [f'ids = tokenizer({text!r}, return_tensors="pt").input_ids']
    if auto == "AutoModelForSequenceClassification":
        program += ["print(model(input_ids=ids).logits)"]
    else:
        program += ["answer = model.generate(input_ids=ids, max_new_tokens=32)"]
        program += ["print(tokenizer.decode(answer[0], skip_special_tokens=True))"]
    where = ["In this folder:", ""] if place.name == "." else []
    return ["## Use", "", *where, "```python", "from peft import PeftModel", *program, "```", ""]


# ---- scores


def scores_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a generator keeps of the result of `evaluate`: recipe, and accuracy and gain of every method."""
    keys = ("tasks", "accuracy", "G", "ci")
    methods = {
        method: {split: {key: row[split][key] for key in keys} for split in UNSEEN if split in row}
        for method, row in result["methods"].items()
    }
    return {"recipe": result["recipe"], "methods": methods}


def score_part(scores: dict[str, Any] | None) -> list[str]:
    """The generator's own evaluation as a table, if there is one."""
    if scores is None:
        return []
    methods = {name: scores["methods"][name] for name in SHOWN if name in scores["methods"]}
    splits = [split for split in UNSEEN if any(split in row for row in methods.values())]
    header = ("method", *(f"{UNSEEN[s]} ({methods['ours'][s]['tasks']}): accuracy, G [95 %]" for s in splits))
    rows = {f"`{name}`": " | ".join(score_cell(row[s]) for s in splits) for name, row in methods.items()}
    about = (
        "Of the generator, task prompt in context: `ours` are its adapters, `oracle` each task's own LoRA, "
        "`multi_task_lora` one LoRA for all tasks; G is the share of the oracle's gain over `base`."
    )
    return ["## Scores", "", about, "", *table_of(header, rows.items()), ""]


def score_cell(row: dict[str, Any]) -> str:
    """Accuracy, G and its interval; what is unknown is a dash."""
    gain = "–" if row["G"] is None else f"{row['G']:.2f}"
    return f"{row['accuracy']:.2f}, {gain}" + (
        "" if row["ci"] is None else " [{:.2f}, {:.2f}]".format(*row["ci"])
    )


def table_of(header: Sequence[str], rows: Iterable[tuple[str, str]]) -> list[str]:
    """A Markdown table; a row's second text holds all its further cells."""
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + "---|" * len(header), *(f"| {name} | {cells} |" for name, cells in rows)]


# ---- a store


def store_card(runs: Sequence[Trajectory], place: Place) -> str:
    """The page of a dataset repository that holds these runs."""
    bases = sorted({run.spec.base_model for run in runs})
    starts = {run.start_path.name for run in runs}
    frozen = sorted({name.rpartition(".")[2] for run in runs for name in run.frozen})
    examples = sum(bool(run.task.train or run.task.evaluation) for run in runs)
    rows = {
        "base model": ", ".join(f"`{base}`" for base in bases),
        "runs, tasks, snapshots": f"{len(runs)}, {len({run.task.name for run in runs})}, "
        f"{sum(len(run.snapshots) for run in runs)}",
        "adapters": "; ".join(sorted({described(run.spec) for run in runs})),
        "start": "one for all runs" if len(starts) == 1 else f"{len(starts)} different ones",
        "never trained": ", ".join(frozen) or "nothing: both factors move",
        "gauge to learn in": gauge_of(runs),
        "task prompts, examples": f"of every run, of {examples} runs",
    }
    head = front_matter(
        base_model=bases[0] if len(bases) == 1 else bases,
        license=place.license,
        tags=["lora", "lora-trajectories", "ltdi_peft", "peft"],
        viewer=False,  # weights are no table
    )
    text = STORE.format(
        table="\n".join(table_of(("", ""), rows.items())),
        argument=place.argument,
        license=place.license or "none was given",
    )
    return f"{head}# Recorded LoRA fine-tunes of {', '.join(bases)}\n\n{text}\n{MARK}\n"


STORE = """Trajectories: of every run its task prompts and the LoRA factors at several optimiser steps, as
ltdi_peft recorded them. They train generators of adapters.

{table}

## Read them

```python
import ltdi_peft

store = ltdi_peft.TrajectoryStore.from_hub({argument})
for run in store.trajectories():
    print(run.run_id, run.task.prompts, [(snapshot.step, snapshot.loss) for snapshot in run.snapshots])
adapter = run.adapter(run.snapshots[-1])  # {{site: (A, B)}}
```

`store.path` is the folder of the store: in a recipe, copy or link it to `<output>/trajectories`.
One safetensors file a snapshot, one `run.json` a run; nothing is a pickle. Licence: {license}.
"""


def gauge_of(runs: Sequence[Trajectory]) -> str:
    """The gauge that fits how these runs started (gauge.py)."""
    if len({run.start_path.name for run in runs}) > 1:
        return "`canonical`"
    if all(f"{site.name}.lora_A" in run.frozen for run in runs for site in run.spec.sites):
        return "`shared_a`"
    return "`shared_start`"
