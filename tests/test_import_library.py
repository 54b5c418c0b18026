"""docs/import.md as it stands: adapters made by PEFT, each from its own start, become a generator."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from test_examples import SMALL, SMOLLM2, example
from test_readme import used_names
from tiny_peft_library import save_base, save_lora
from transformers import AutoModelForCausalLM

import ltdi_peft
from ltdi_peft.cli import main, make_parser
from ltdi_peft.config import load_recipe
from ltdi_peft.generator import load_generator
from ltdi_peft.sources import Line
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.strict import build

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "import.md").read_text()

pytestmark = [
    # Two steps of training on four adapters: norms outside the training range are clamped, and said to be.
    pytest.mark.filterwarnings("ignore:‖ΔW‖ of:UserWarning"),
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(text) for block in blocks("bash") for text in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, the page's manifest and its four adapters, and the page's recipe, small."""
    folder = tmp_path_factory.mktemp("import")
    base = save_base(folder / "base")
    (folder / "adapters.jsonl").write_text(blocks("jsonl")[0])
    for seed, text in enumerate(blocks("jsonl")[0].splitlines()):
        save_lora(base, folder / json.loads(text)["path"], seed, r=4, lora_alpha=8)
    recipe = yaml.safe_load(blocks("yaml")[0]) | {"base": {"model": str(base)}}
    for section, values in SMALL.items():
        recipe[section] = recipe.get(section, {}) | values | recipe.get(section, {})
    recipe["adapter"]["layers"] = 2
    (folder / "library.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_page_has_its_blocks():
    assert len(blocks("yaml")) == 1
    assert [command[1] for command in COMMANDS] == [
        "import", "import", "inspect", "examples/import_library.py", "train", "generate",
    ]  # fmt: skip
    assert SMOLLM2 in blocks("yaml")[0]


@pytest.mark.parametrize("text", [text for block in blocks("jsonl") for text in block.splitlines()])
def test_lines_of_the_page_are_manifest_lines(text):
    assert build(Line, json.loads(text), "page").prompts


def test_keys_of_the_page_are_all_there_are():
    table = PAGE.partition("| key | value |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(
        Line.__dataclass_fields__
    )


def test_the_recipe_of_the_page_is_valid(tmp_path):
    (tmp_path / "r.yaml").write_text(blocks("yaml")[0])
    assert load_recipe(tmp_path / "r.yaml").collect.gauge == "canonical"


def test_the_whole_way(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    dry, real, inspect, script, train, generate = (command[1:] for command in COMMANDS)
    for command in (dry, real, inspect):
        assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 fits" in said
    assert "4 imported" in said
    runs = TrajectoryStore("runs/library/trajectories", create=False).trajectories()
    assert len({run.start_path for run in runs}) == 4
    example(Path(script[0]).stem).main()
    assert capsys.readouterr().out.count("already there") == 4
    assert main(train) == 0
    assert main(generate) == 0
    generator = load_generator(Path("runs/library/generator"))
    assert generator.codec.gauge == "canonical"
    assert set(generator.config.training_tasks) == {"polite", "french", "plural", "opposite"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "french").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(ids).logits)


def test_the_shared_gauge_refuses_the_same_store(place, monkeypatch, capsys):
    """Negative control: it is the canonical gauge that lets adapters of different starts in."""
    monkeypatch.chdir(place)
    example("import_library").main(store="other/trajectories")
    assert main(["train", "library.yaml", "--output=other", "--collect.gauge=shared_start"]) == 2
    assert "all runs need one start. Use collect.gauge: canonical" in capsys.readouterr().err


def test_commands_of_the_page_are_known_and_names_public():
    for command in COMMANDS:
        if command[0] == "ltdi":
            make_parser().parse_args(command[1:])
    assert used_names((ROOT / "examples" / "import_library.py").read_text()) <= set(ltdi_peft.__all__)
