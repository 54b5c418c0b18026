"""Every block of every page runs, or is what it says it is; the site builds, and has every public name."""

import importlib
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from tiny_docs import ROOT, blocks, commands, make_place, own_place, require_language, run_command, run_page
from tiny_peft_library import edit_config, edit_weights
from tiny_world import run

import ltdi_peft

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Pages that other tests run whole, because they need a Hub or a library of adapters.
ELSEWHERE = {
    "README.md": "test_examples.test_program_of_the_readme",
    "docs/hub.md": "test_publish.test_the_programs_of_the_docs_run",
    "docs/import.md": "test_import_library.test_the_whole_way",
}
RECORDS = {"docs/results/demo/README.md"}  # commands of long runs: parsed

pytestmark = [
    # Steps of training by the dozen: norms outside the training range are clamped, and said to be.
    pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning"),
    # PyTorch's word to a Trainer without an accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


RUN = [page for page in PAGES if blocks(page.read_text()) and name_of(page) not in {*ELSEWHERE, *RECORDS}]


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"), world)


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A working directory of a page's own, with the generator also where no page names one."""
    monkeypatch.chdir(own_place(place, tmp_path))
    monkeypatch.setenv("LTDI_GENERATOR", "runs/demo/generator")
    monkeypatch.setenv("LTDI_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def french(place, here):
    """A generated adapter that a test may break."""
    (here / "french").unlink()
    return shutil.copytree(place / "french", here / "french")


# ---- pages


def test_there_are_pages():
    names = {name_of(page) for page in RUN}
    assert names > {f"docs/{name}.md" for name in ("quickstart", "record", "few_shot", "many_gpus", "no_op")}
    assert {name for name in (*ELSEWHERE, *RECORDS) if (ROOT / name) not in PAGES} == set()


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_blocks_of_a_page_run_as_printed(page, here, tiny_base, capsys):
    names = {"model": tiny_base()} if page.name == "four_bit.md" else {}  # "a model that you loaded"
    run_page(page.read_text(), name_of(page), {"__name__": "page", **names})


@pytest.mark.parametrize("name", [*ELSEWHERE, *RECORDS])
def test_pages_that_others_run_are_of_known_blocks(name, here):
    """Their commands are parsed here, their programs compiled."""
    for block in blocks((ROOT / name).read_text()):
        require_language(block, name)
        if block.language == "python":
            compile(block.text, name, "exec")
        for words in commands(block) if block.language == "bash" else []:
            run_command(words, only_parse=True)


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_the_tests_of_other_pages_exist(test):
    module, _, name = test.partition(".")
    assert callable(vars(importlib.import_module(module))[name])


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("```python\nimport ltdi_peft\nltdi_peft.no_such_door\n```", AttributeError, "no_such_door"),
        ("```python\nx = 1\n```\n\n```python\nprint(x, y)\n```", NameError, "'y'"),
        ("```\nltdi tasks\n```", ValueError, "language ''"),
        ("text\n\n    ltdi tasks\n", ValueError, "language 'indented'"),
        ("```ruby\nputs 1\n```", ValueError, "language 'ruby'"),
        ("```text\nltdi tasks --no-such\n```", ValueError, "a program in a block of output"),
        ("```bash\nltdi inspect runs/demo/trajectories --no-such\n```", ValueError, "unknown arguments"),
        ("```bash\nltdi no-such\n```", ValueError, "the parser ended with 2"),
        ("```bash\nltdi inspect runs/nothing\n```", ValueError, "ended with status 2"),
        ("```bash\nltdi train recipes/demo.yaml --train.no_such=1\n```", ValueError, "no_such"),
        ("```bash\nltdi collect recipes/no_such.yaml\n```", FileNotFoundError, "no_such"),
        ("```bash\npip install 'ltdi_peft[no_such]'\n```", ValueError, "no such package or extra"),
        ("```bash\nmake no-such\n```", ValueError, "the targets are"),
        ("```bash\nrm -rf runs\n```", ValueError, "unknown program 'rm'"),
        ("```bash\npython examples/no_such.py\n```", FileNotFoundError, "no_such"),
        ("```bash\npython benchmarks/codec_error.py --no-such 1\n```", ValueError, "unknown options"),
        ("```yaml\nno_such_section: 1\n```", ValueError, "no_such_section"),
        ('```jsonl\n{"name": "a", "prompts": []}\n```', ValueError, "no prompts"),
        ('```jsonl\n["one"]\n```', ValueError, "neither a task nor an example"),
        (
            "```bash\naccelerate launch --config_file recipes/accelerate/ddp.yaml "
            "recipes/train_generator.py recipes/demo.yaml\n```",
            ValueError,
            "units do not fit 8 processes",
        ),
    ],
)
def test_a_broken_page_fails(text, error, says, here, capsys):
    """Negative control of everything above."""
    with pytest.raises(error, match=re.escape(says)):
        run_page(text, "page.md", {})


def test_commands_in_the_prose_are_known():
    """`ltdi X --option` between backticks: the subcommand and the options exist."""
    from ltdi_peft.cli import COMMANDS, COMPLETION, make_parser

    known = {command.name for command in (*COMMANDS, COMPLETION)}
    found = [match for page in PAGES for match in re.findall(r"`ltdi ([a-z]+)([^`]*)`", page.read_text())]
    assert {name for name, _ in found if name not in known} == set()
    assert len(found) > 20
    help_of = {}
    for name, rest in found:
        for option in re.findall(r"--[a-z][a-z0-9-]*(?![\w.=])", rest):
            if name not in help_of:
                (choices,) = [a.choices for a in make_parser()._actions if a.choices]
                help_of[name] = choices[name].format_help()
            assert option in help_of[name], f"ltdi {name} {option}"


# ---- what the pages claim


def program_of(page):
    return next(block.text for block in blocks((DOCS / page).read_text()) if block.language == "python")


BROKEN = {
    "renamed": (lambda key, w: (key.replace("lora_B", "lora_up"), w), "missing adapter keys", 0.0),
    "prefix": (lambda key, w: (key.removeprefix("base_model.model."), w), "missing adapter keys", 0.0),
    "nan": (lambda key, w: (key, w * torch.nan), None, None),
    "untrained": (lambda key, w: (key, w * ("lora_A" in key)), None, 0.0),
    "whole": (lambda key, w: (key, w), None, "above"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_no_op_page_tells_broken_folders_apart(name, french, recwarn):
    change, warning, effect = BROKEN[name]
    edit_weights(french, change)
    names = {}
    exec(program_of("no_op.md"), names)
    said = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert len(said) == bool(warning)
    assert not warning or warning in said[0]
    if effect is None:
        assert names["effect"] != names["effect"]
    else:
        assert (names["effect"] > 0) == (effect == "above")
        assert (names["weight"] > 0) == (effect == "above")


def test_peft_says_nothing_of_another_base_model(french):
    edit_config(french, base_model_name_or_path="other/model")
    names = {}
    exec(program_of("no_op.md"), names)
    assert names["effect"] > 0
    assert isinstance(names["model"], PeftModel)


def test_numbers_of_the_limits_page_are_those_of_the_demo():
    found = json.loads((DOCS / "results/demo.json").read_text())
    page = (DOCS / "limits.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\**[+-]\d[^|]*) \| ([^|]+) \|$", page, re.MULTILINE)
    rivals = {"base": "base", "mean": "mean", "start": "start", "wrong": "ours_wrong_prompt"}
    rivals |= {"multi-task": "multi_task_lora", "ridge": "ridge"}
    assert len(rows) == len(rivals)
    for about, *cells in rows:
        (rival,) = [method for word, method in rivals.items() if word in about]
        pair = found["paired"][f"ours - {rival}"]["unseen_tasks"]
        for cell, suffix in zip(cells, ("", "no_prompt"), strict=True):
            of = pair[suffix] if suffix else pair
            assert cell.strip("* ") == "{:+.2f} [{:.2f}, {:.2f}]".format(of["G"], *of["ci_G"]), about


# ---- the reference and the site


def on_page(text):
    """Public names that api.md shows; a function that shares its module's name needs its full path."""
    paths = re.findall(r"^::: ltdi_peft\.([\w.]+)$", text, re.MULTILINE)
    return [path.split(".")[-1] for path in paths]


def test_every_public_name_is_in_the_reference_once():
    assert sorted(on_page((DOCS / "api.md").read_text())) == sorted(ltdi_peft.__all__)
    assert sorted(on_page("::: ltdi_peft.Task\n")) != sorted(ltdi_peft.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = run("-m", "mkdocs", "build", "--strict", "--site-dir", folder, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_has_every_page_and_name(site):
    for page in DOCS.rglob("*.md"):
        path = page.relative_to(DOCS)
        html = path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html")
        assert (site / html).is_file()
    shown = set(re.findall(r'id="ltdi_peft\.([\w.]+)"', (site / "api.html").read_text()))
    assert {name for name in ltdi_peft.__all__ if not {name, f"{name}.{name}"} & shown} == set()
    assert {"TaskSuite.split", "generate_adapter"} <= shown
    assert not {"refine.require_examples", "collect.open_bench"} & shown  # modules of the same name


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^" >]+)', page.read_text())
        loaded += re.findall(r'<link[^>]* href="?([^" >]+)[^>]*>', page.read_text())
        assert [link for link in loaded if "//" in link] == [], page
        assert len(loaded) > 3


def test_every_page_is_in_the_navigation():
    """Strict building refuses a page that is not there; this says so without building."""
    text = (ROOT / "mkdocs.yml").read_text()
    assert [name for page in PAGES[1:] if (name := page.relative_to(DOCS).as_posix()) not in text] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("::: ltdi_peft.no_such_door", ["ltdi_peft.no_such_door"]),
        ("[a](no_such.md) [b](page.md#no-such)", ["'no_such.md'", "'page.md#no-such'"]),
    ],
)
def test_a_wrong_name_or_link_fails_the_build(text, says, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{text}\n")
    own = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nsite_dir: site\nnav: [page.md]\n"
    (tmp_path / "mkdocs.yml").write_text(own)
    done = run("-m", "mkdocs", "build", "--strict", "--config-file", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert [word for word in says if word not in done.stderr] == []
