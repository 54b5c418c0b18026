"""A shrunk generator's folder; and the guard before the folder that everybody gets.

In: a trained generator's folder, the result file of its recipe.  Out: a folder that loads like any other.
Idea: what lies in the package answers people who chose no generator, so it goes there only if a result file
shows, on unseen tasks with the prompt in context, that it beats the mean adapter and a wrong prompt.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ltdi_peft.cards import scores_of
from ltdi_peft.collect import recipe_suite
from ltdi_peft.config import Recipe
from ltdi_peft.evaluate import guidance_of
from ltdi_peft.files import json_bytes, read_json, replace_file, replacing_folder
from ltdi_peft.generate import load_base_of
from ltdi_peft.generator import EVALUATION_FILE, Generator, load_generator
from ltdi_peft.generator_config import default_folder
from ltdi_peft.report import table
from ltdi_peft.shrink import MAX_BYTES, shrink, stored_bytes
from ltdi_peft.tables import shown, shown_ends

CARD_FILE = "README.md"
SPLIT = "unseen_tasks"
SHOWN = ("base", "mean", "multi_task_lora", "ridge", "ours", "ours_wrong_prompt", "oracle")
RIVALS = {"ci_mean": "the mean adapter", "ci": "its own with a wrong prompt"}  # of controls.prompt

SCORES = """
## Scores

Recipe `{recipe}`, measured {when} it was shrunk. G is the recovered gain, Σ(method − base)/Σ(oracle − base);
intervals are 95 %, bootstrapped over tasks.

{table}
On unseen tasks, prompt in context, `ours` is above the mean adapter by G {mean}, and above what it makes of a
wrong prompt by G {wrong}.

## What it cannot do

{limits}
"""


def shrink_folder(
    source: Path,
    out: Path,
    *,
    recipe: Recipe | None = None,
    max_bytes: int = MAX_BYTES,
    results: Path = Path("docs/results"),
) -> dict[str, Any]:
    """Write the generator of `source`, shrunk, to the new folder `out`; returns bytes, widths and the error.

    recipe: the error is measured on its held-out prompts; without, on training tasks left out of the fit.
    One that was shrunk before and fits is written as it is. Into the package's own folder only with
    `<results>/<recipe>.json` as proof, and with its scores on the card. Raises ValueError where `out` exists,
    for a generator that does not fit, and where the proof is missing.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten, remove it or choose another --out.")
    generator = load_generator(source)
    proof = None
    if out.resolve() == default_folder().resolve():
        proof = read_json(results / f"{generator.config.recipe['name']}.json")
        require_proof(generator, proof)
    generator.scores = None  # of what it was before
    small = generator
    if not (generator.config.shrunk and stored_bytes(generator) <= max_bytes):
        held_out = held_out_conditions(generator, recipe) if recipe else None
        small = shrink(generator, held_out=held_out, max_bytes=max_bytes)
    with replacing_folder(out) as partial:
        small.save_pretrained(partial)
        if proof:
            text = (partial / CARD_FILE).read_text(encoding="utf-8") + scores_text(proof)
            replace_file(partial / CARD_FILE, text.encode())
            replace_file(partial / EVALUATION_FILE, json_bytes(scores_of(proof)))
    about = {"bytes_before": stored_bytes(generator), "bytes": stored_bytes(small)}
    return about | (small.config.shrunk or {})


def held_out_conditions(generator: Generator, recipe: Recipe) -> Float[Tensor, "prompt condition"]:
    """Of one held-out paraphrase of every validation and unseen task of the recipe."""
    suite = recipe_suite(recipe)
    tasks = [task for split in ("validation", SPLIT) for task in suite.split(split)]
    base = None
    if generator.config.encoder == "base":
        options = {"token": None, "cache_dir": None}
        base = load_base_of(generator, None, device="cpu", dtype="auto", load_in_4bit=False, **options)
    return generator.encode_prompts([task.held_out_prompts[0] for task in tasks], base)


def require_proof(generator: Generator, result: dict[str, Any]) -> None:
    """ValueError unless the result is this generator's, and shows that it reads its prompt."""
    own = generator.config
    ours = {
        "base_model": own.base_model,
        "training tasks": len(own.training_tasks),
        "guidance": guidance_of(generator),
    }
    guidance = result["trials"]["ours"]
    theirs = {
        "base_model": result["base_model"],
        "training tasks": result["suite"]["train"],
        "guidance": {key: guidance.get(key) for key in ours["guidance"]},
    }
    if odd := [key for key in ours if ours[key] != theirs[key]]:
        raise ValueError(
            f"the result of {result['recipe']!r} is not this generator's: {odd[0]} is {theirs[odd[0]]!r} "
            f"there and {ours[odd[0]]!r} here. Run `ltdi evaluate` with its recipe."
        )
    control = result["controls"]["prompt"].get(SPLIT, {})
    for key, rival in RIVALS.items():
        ends = control.get(key)
        if ends is None or ends[0] <= 0:
            raise ValueError(
                f"the result of {result['recipe']!r} does not show that the generator beats {rival} on "
                f"unseen tasks: the difference of G lies in {shown_ends(ends)}, and the package's own "
                f"generator must have it above 0. Choose another --out."
            )


def scores_text(result: dict[str, Any]) -> str:
    """What a result says of its generator, as the end of its card."""
    methods = {name: result["methods"][name] for name in SHOWN if name in result["methods"]}
    row = result["controls"]["prompt"][SPLIT]
    return SCORES.format(
        recipe=result["recipe"],
        when="after" if result.get("shrunk") else "before",
        table=table({**result, "methods": methods}),
        mean=shown(row["right"] - row["mean"], row["ci_mean"]),
        wrong=shown(row["right"] - row["wrong"], row["ci"]),
        limits="\n".join(limits(result)),
    )


def limits(result: dict[str, Any]) -> list[str]:
    """What the result does not show, a line each; the first always holds."""
    lines = [
        "- Take the place of training where there are examples: the task's own LoRA (`oracle`) is at G = 1."
    ]
    for rival in ("multi_task_lora", "ridge"):
        row = result["paired"].get(f"ours - {rival}", {}).get(SPLIT)
        if row and (row["ci_G"] is None or row["ci_G"][0] <= 0):
            lines.append(
                f"- Be better than `{rival}`, as far as shown: G {shown(row['G'], row['ci_G'], '+')}."
            )
    for split, row in result["controls"]["prompt"].items():
        if not row["reads_its_prompt"]:
            where, right = split.replace("_", " "), shown(row["right"])
            lines.append(
                f"- Read its prompt on {where}, as far as shown: G {right}, with a wrong prompt "
                f"{shown(row['wrong'])}."
            )
    return lines
