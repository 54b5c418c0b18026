"""Subcommands that bring adapters in and take results out: import, encode, shrink, push.

In: parsed arguments.  Out: an `Answer`.
"""

from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ltdi_peft.command import Command
from ltdi_peft.terminal import Answer, table


def import_arguments(parser: ArgumentParser) -> None:
    """What to import, where to, and what the adapters are for."""
    source = "PEFT folder, folder of checkpoint-* folders, .jsonl manifest, Hub repository or collection"
    parser.add_argument("source", help=source)
    parser.add_argument("--store", type=Path, required=True, help="trajectory store; begun if there is none")
    parser.add_argument("--task", help="name of the task; else the folder's. Not with a manifest")
    prompt = "a sentence that asks for the task; again for a paraphrase. Not with a manifest"
    parser.add_argument("--prompt", action="append", default=[], help=prompt)
    parser.add_argument("--domain", default="general", help="domain of the task")
    base = "base model of all of them, where their configurations name it differently"
    parser.add_argument("--base-model", help=base)
    parser.add_argument("--dry-run", action="store_true", help="write nothing, say what fits and why not")


def import_source(known: Namespace) -> Answer:
    """`ltdi import SOURCE --store FOLDER`; a failure when nothing of it fits."""
    from ltdi_peft.importing import UNFIT, import_adapters

    rows = import_adapters(
        known.source,
        known.store,
        task=known.task,
        prompts=known.prompt,
        domain=known.domain,
        base_model=known.base_model,
        dry_run=known.dry_run,
    )
    counts = Counter(row["status"] for row in rows)
    answer = table(rows, tuple(rows[0]))
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    failure = f"nothing in {known.source} fits; the table says why." if set(counts) == {UNFIT} else ""
    return replace(answer, lines=[*answer.lines, summary], failure=failure)


def push_arguments(parser: ArgumentParser) -> None:
    """What to push, and where to."""
    parser.add_argument("folder", type=Path, help="an adapter's, a generator's or a store's folder")
    parser.add_argument("repo_id", help="owner/name, or a name of yours")
    parser.add_argument("--public", action="store_true", help="anyone may read it; else it is private")
    parser.add_argument("--revision", help="branch; created where it is missing")
    parser.add_argument("--overwrite", action="store_true", help="replace what the branch holds")
    parser.add_argument("--message", default="Push with ltdi_peft", help="of the commit")
    parser.add_argument("--base-model", help="Hub id to name, for a base model that was loaded from a folder")
    parser.add_argument("--license", help="a Hub licence id for the page, e.g. apache-2.0")
    parser.add_argument(
        "--store", type=Path, help="the generator's runs, to tell an adapter's nearest of them"
    )


def push_folder(known: Namespace) -> Answer:
    """`ltdi push FOLDER REPO_ID`."""
    from ltdi_peft.publish import push

    names = ("revision", "overwrite", "message", "base_model", "license", "store")
    options = {name: vars(known)[name] for name in names}
    done = push(known.folder, known.repo_id, private=not known.public, **options)
    said = f"{'private' if done.private else 'public'} {done.repo_type} {done.repo_id}: {done.url}"
    return Answer([vars(done)], [said])


def encode_arguments(parser: ArgumentParser) -> None:
    """The recipe whose runs to encode, and how small."""
    parser.add_argument("recipe", type=Path, help="a YAML file, see recipes/")
    parser.add_argument("--out", type=Path, required=True, help="file to write; must not exist")
    parser.add_argument("--width", type=int, default=60, help="numbers a site, in place of codec.width")
    parser.add_argument("--dtype", default="float16", help="of bases and tokens: float16 or float32")
    parser.add_argument("--onto", type=Path, help="encoded runs of a first round, to add these runs' to")


def encode_recipe(known: Namespace) -> Answer:
    """`ltdi encode RECIPE --out FILE`."""
    from ltdi_peft.config import load_recipe
    from ltdi_peft.encoding import encode_store

    recipe = load_recipe(known.recipe, known.overrides)
    encoded = encode_store(recipe, known.out, width=known.width, dtype=known.dtype, onto=known.onto)
    runs, size = len(encoded.runs.tasks), known.out.stat().st_size
    said = f"{runs} runs in {known.out} ({size / 1e6:.1f} MB); train from it: --train.encoded={known.out}"
    return Answer([{"file": str(known.out), "runs": runs, "bytes": size}], [said])


def shrink_arguments(parser: ArgumentParser) -> None:
    """Which generator, and how small."""
    parser.add_argument("generator", type=Path, help="folder of a trained generator")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--max-megabytes", type=float, default=25, help="of its safetensors files")
    parser.add_argument("--recipe", type=Path, help="measure the error on this recipe's held-out prompts")
    results = "folder of the recipe's result, which must prove what becomes ltdi_peft/default_generator"
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help=results)


def shrink_generator(known: Namespace) -> Answer:
    """`ltdi shrink GENERATOR --out FOLDER`."""
    from ltdi_peft.config import load_recipe
    from ltdi_peft.ship import shrink_folder

    recipe = load_recipe(known.recipe) if known.recipe else None
    options = {"max_bytes": int(known.max_megabytes * 1e6), "results": known.results}
    about = shrink_folder(known.generator, known.out, recipe=recipe, **options)
    before, after = (about[key] / 1e6 for key in ("bytes_before", "bytes"))
    said = (
        f"{before:.1f} → {after:.1f} MB, width {about['from_width']} → {about['width']}; generated adapters "
        f"moved by {about['error']:.1%} of their way from the start; written to {known.out}"
    )
    return Answer([about], [said])


EXCHANGE = (
    Command(
        "encode",
        "write the collected runs as one small file to train from",
        "recipes/demo.yaml --out demo.safetensors",
        encode_arguments,
        encode_recipe,
        overrides=True,
    ),
    Command(
        "shrink",
        "write a generator in fewer bytes",
        "runs/demo/generator --out small",
        shrink_arguments,
        shrink_generator,
    ),
    Command(
        "import",
        "bring adapters that exist into a store",
        "adapters.jsonl --store runs/mine/trajectories --dry-run",
        import_arguments,
        import_source,
    ),
    Command(
        "push",
        "push an adapter, a generator or a store to the Hub",
        "french me/french",
        push_arguments,
        push_folder,
    ),
)
