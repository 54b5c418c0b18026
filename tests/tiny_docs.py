"""The blocks of documentation pages, and a folder in which they run as printed.

`name/of/model` is a folder before it is a Hub id, for transformers and `locate` alike: a tiny model in a
folder of that name, in the working directory, stands for the real one, and no page has to be changed.
"""

import json
import re
import shlex
import tomllib
from contextlib import chdir
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from test_examples import SMALL, SMOLLM2
from tiny_bench import tokenizer
from tiny_bigbench import record_like, write_bigbench
from tiny_world import ROOT
from transformers import BertConfig, BertModel

from ltdi_peft.base import MINILM
from ltdi_peft.cli import main, make_parser
from ltdi_peft.config import load_recipe
from ltdi_peft.task import Task
from ltdi_peft.train import train_generator

LANGUAGES = {"python", "yaml", "bash", "jsonl", "text"}
PROGRAMS = ("ltdi ", "pip ", "make ", "python ", "accelerate ", "hf ", "$ ", "import ", "from ")
CHEAP = {"generate", "import", "inspect", "tasks", "train"}  # run; others are parsed, their recipes loaded
FOREIGN = {"lm-eval[hf]"}  # what pages install that is not ours


@dataclass(frozen=True)
class Block:
    """A block of a page; `line` is its first, from 1, `named` the last .jsonl file in the text above."""

    language: str
    text: str
    line: int
    named: str = ""


def blocks(page):
    """Every block of a page, indented ones with language "indented"."""
    found, lines = [], page.splitlines()
    for token in MarkdownIt().parse(page):
        if token.type in ("fence", "code_block"):
            names = re.findall(r"`([\w/.]+\.jsonl)`", "\n".join(lines[: token.map[0]]))
            language = token.info if token.type == "fence" else "indented"
            found.append(Block(language, token.content, token.map[0] + 2, names[-1] if names else ""))
    return found


def commands(block):
    """The words of each command line; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# ---- a folder


def make_place(folder, world):
    """Tiny models under the names of the real ones, a generator and an adapter of it, data."""
    (folder / "HuggingFaceTB").mkdir()
    (folder / SMOLLM2).symlink_to(world.base)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(folder / MINILM)
    tokenizer().save_pretrained(folder / MINILM)
    for name in ("recipes", "examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tickets.csv").write_text("text,department\n" + "".join(f"w{n},c{n % 2}\n" for n in range(20)))
    tasks = folder / "bigbench-1.0.0/bigbench/benchmark_tasks"
    for name in ("one", "two"):
        write_bigbench(tasks, name, **record_like("train", name))
    (folder / "runs/smollm2_bigbench").mkdir(parents=True)
    (folder / "runs/smollm2_bigbench/calibration.json").write_text(json.dumps({"tasks": {}}))
    with chdir(folder):  # where the tiny sentence encoder is
        for name, more in (
            ("demo", {}),
            ("read_examples", {"examples": 2}),
            ("attributes", {"attributes": True}),
        ):
            run, reads = folder / "runs" / name, {"encoder": "minilm_words", **more}
            run.mkdir()
            (run / "trajectories").symlink_to(world.recipe.store_folder)
            train_generator(world.changed(run, condition=reads, codec={"gate": 0.0}), progress=False)
        main(["generate", "Answer in French.", "--generator", "runs/demo/generator", "--out", "french"])
    return folder


def own_place(place, folder):
    """A working directory that shows the place, and where a page may write."""
    for entry in place.iterdir():
        if entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    (folder / "runs").mkdir()
    for entry in (place / "runs").iterdir():
        (folder / "runs" / entry.name).symlink_to(entry)
    return folder


# ---- blocks, in the working directory


def run_page(text, name, names):
    """Run every block of a page from top to bottom; what is wrong raises. `names` are its Python names."""
    for block in blocks(text):
        require_language(block, name)
        if block.language == "python":
            # The empty lines make tracebacks name the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), names)
        elif block.language == "yaml":
            check_yaml(block.text)
        elif block.language == "jsonl":
            check_jsonl(block)
        elif block.language == "bash":
            for words in commands(block):
                run_command(words)


def require_language(block, name):
    """ValueError for a block of no known language, and for a program that passes for output."""
    if block.language not in LANGUAGES:
        raise ValueError(f"{name}:{block.line}: block of language {block.language!r}; known: {LANGUAGES}")
    if block.language == "text" and any(line.startswith(PROGRAMS) for line in block.text.splitlines()):
        raise ValueError(f"{name}:{block.line}: a program in a block of output")


def check_yaml(text):
    """Load a recipe or a file of Accelerate; a recipe that begins with `# NAME.yaml` is kept, smaller."""
    name = re.match(r"# (\w+\.yaml)", text)
    file = Path(name[1] if name else "block.yaml")
    file.write_text(text)
    if "distributed_type" in text:
        load_config_from_file(str(file))
        return
    load_recipe(file)
    table = yaml.safe_load(text)
    for section, values in SMALL.items():
        table[section] = values | table.get(section, {})
    table["condition"] = {"encoder": "minilm_words"}
    file.write_text(yaml.safe_dump(table))


def check_jsonl(block):
    """Examples as `read_examples` reads them, or tasks; written where the text above says."""
    if block.named:
        Path(block.named).write_text(block.text)
    for line in block.text.splitlines():
        record = json.loads(line)
        if isinstance(record, dict) and "name" in record:
            Task.from_dict(record, block.named)
        elif not (isinstance(record, list) and len(record) == 2):
            raise ValueError(f"neither a task nor an example: {line}")


def run_command(words, *, only_parse=False):
    """Run or check one command line; ValueError where something of it does not exist."""
    program, *rest = words
    checks = {"pip": check_pip, "make": check_make, "python": check_python, "accelerate": check_accelerate}
    if program in checks:
        checks[program](rest)
    elif program == "ltdi":
        check_ltdi(rest, load=not only_parse)
        if rest[0] in CHEAP and not only_parse and not is_large(rest) and (status := main(rest)):
            raise ValueError(f"{shlex.join(words)} ended with status {status}")
    else:
        raise ValueError(f"unknown program {program!r}")


def is_large(words):
    """What a page's command would take too long for: the project's own recipes, 4-bit models."""
    return "--load-in-4bit" in words or (words[0] == "train" and words[1].startswith("recipes/"))


def check_ltdi(words, *, load=True):
    """The real parser takes every word; a recipe that is named loads, with its overrides."""
    try:
        known, rest = make_parser().parse_known_args(words)
    except SystemExit as stop:
        raise ValueError(f"ltdi {shlex.join(words)}: the parser ended with {stop.code}") from stop
    if rest and not known.command.overrides:
        raise ValueError(f"ltdi {shlex.join(words)}: unknown arguments {rest}")
    if known.command.overrides and load:
        load_recipe(known.recipe, rest)


def check_accelerate(words):
    """`accelerate launch` with its own parser; the program and its recipe fit the number of processes."""
    known = launch_command_parser().parse_args(words[1:])
    processes = load_config_from_file(known.config_file).num_processes
    if known.module:
        if find_spec(known.training_script) is None:
            raise ValueError(f"no module {known.training_script}")
        check_ltdi(known.training_script_args)
        return
    recipe = load_recipe(known.training_script_args[0], known.training_script_args[1:])
    if not Path(known.training_script).is_file() or recipe.train.units % processes:
        raise ValueError(f"{known.training_script}: no such file, or units do not fit {processes} processes")


def check_pip(words):
    """Extras are in pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        match = re.fullmatch(r"(?:ltdi_peft|\.)(?:\[([\w,]+)\])?", word)
        asked = set((match[1] or "").split(",")) - {""} if match else {word}
        if not asked <= {*extras, *FOREIGN}:
            raise ValueError(f"pip install {word}: no such package or extra; extras are {sorted(extras)}")


def check_make(words):
    """Targets of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] not in targets:
        raise ValueError(f"make {words[0]}: the targets are {targets}")


def check_python(words):
    """The script is there, and knows its options."""
    script = (ROOT / words[0]).read_text()
    if unknown := [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in script]:
        raise ValueError(f"python {words[0]}: unknown options {unknown}")
