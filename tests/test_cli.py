"""`ltdi`: exit states, one line for bad input, and quick help."""

import json
import time
from pathlib import Path

import pytest
import torch
from tiny_bigbench import cached_bigbench
from tiny_world import run

from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.cli import main, make_parser, one_line
from ltdi_peft.generator import load_generator
from ltdi_peft.suite.bigbench import BIGBENCH_SPLITS

pytestmark = pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
COMMANDS = ("collect", "calibrate", "train", "evaluate", "tasks", "inspect", "generate")
PROMPT = "please a second twice"


@pytest.fixture
def generator_folder(world):
    return str(world.recipe.generator_folder)


def failed(capsys, *arguments):
    """What a call that ends with status 2 says on stderr: one line, progress bars apart."""
    assert main(list(map(str, arguments))) == 2
    lines = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()
    (line,) = [
        line for line in lines if line and "it/s]" not in line and "?]" not in line and "/s]" not in line
    ]
    return line


def test_help_is_quick_and_names_every_subcommand():
    import ltdi_peft.cli

    seconds = []
    for _ in range(3):
        began = time.process_time_ns(), time.perf_counter()
        said = run(ltdi_peft.cli.__file__, "--help")
        seconds.append(time.perf_counter() - began[1])
    assert said.returncode == 0
    assert all(
        name in said.stdout for name in ("collect", "train", "evaluate", "tasks", "inspect", "generate")
    )
    code = "import sys, ltdi_peft.cli; ltdi_peft.cli.make_parser(); print('torch' in sys.modules)"
    heavy = run("-c", code)
    assert heavy.stdout.strip() == "False"
    assert min(seconds) < 2  # 0.1 s on an idle machine; importing torch alone takes 3 s on a busy one


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    assert f"example: ltdi {name}" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize("name", ["collect", "train", "evaluate"])
def test_recipes_are_checked(name, capsys, tmp_path):
    assert "no.yaml does not exist" in failed(capsys, name, tmp_path / "no.yaml")
    file = tmp_path / "r.yaml"
    file.write_text("train: {stepz: 3}\n")
    assert "unknown keys ['stepz']" in failed(capsys, name, file)
    file.write_text("train: {steps: [\n")
    assert "is not valid YAML" in failed(capsys, name, file)
    file.write_text("seed: 1\n")
    assert "expected int, got 'x'" in failed(capsys, name, file, "--train.steps=x")
    assert "expected --section.field=value" in failed(capsys, name, file, "--train.steps", "3")


def test_an_empty_output_is_refused(world, tmp_path, capsys):
    file = world.recipe_file(tmp_path)
    assert "finished runs of 0 training tasks" in failed(capsys, "train", file)
    assert "unseen tasks, first" in failed(capsys, "evaluate", file)


def test_overrides_reach_the_recipe(world, tmp_path, capsys):
    file = world.recipe_file(tmp_path)
    line = failed(capsys, "train", file, f"--output={tmp_path / 'elsewhere'}")
    assert "elsewhere" in line


def test_a_gate_prints_its_numbers(world, tmp_path, capsys):
    file = world.recipe_file(tmp_path)
    options = ("--codec.width=1", "--codec.gate=1.0", f"--output={world.recipe.folder}")
    line = failed(capsys, "train", file, *options)
    assert line.startswith("ltdi train: the codec keeps ")
    assert "codec.gate asks for 1.0" in line


def test_unknown_arguments_of_others_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tasks", "--train.steps=3"])
    assert ended.value.code == 2
    assert "unknown arguments ['--train.steps=3']" in capsys.readouterr().err


def test_messages_are_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError("no such task")) == "no such task"


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ltdi_peft.cli.list_tasks", interrupted)
    assert main(["tasks"]) == 130
    assert "the same command continues" in capsys.readouterr().err


# ---- tasks, inspect


def test_tasks(world, capsys):
    source = world.recipe.suite.source
    assert main(["tasks", "--source", source]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "split", "examples", "prompt", "example"]
    assert lines[-1] == "11 rows"
    assert main(["tasks", "--source", source, "--domain", "c", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["domain"] for row in rows} == {"c"}
    assert "has no domains ['x']; it has ['a', 'b', 'c']" in failed(
        capsys, "tasks", "--source", source, "--domain", "x"
    )
    assert "no such file or folder" in failed(capsys, "tasks", "--source", "nowhere.jsonl")


def test_tasks_of_a_calibrated_suite_show_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LTDI_CACHE", str(cached_bigbench(tmp_path, BIGBENCH_SPLITS)))
    assert main(["tasks", "--source", "bigbench"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "split", "examples", "base", "oracle", "chance", "prompt", "example"]
    assert 0 <= float(first.split()[3]) < float(first.split()[4]) <= 1


def test_calibrate_prints_a_row_a_task(world, tmp_path, capsys):
    file = str(world.recipe_file(tmp_path / "run"))
    assert main(["calibrate", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "base", "oracle", "chance", "constant"]
    assert lines[-1] == "11 rows"


def test_inspect(world, capsys, tmp_path):
    store = str(world.recipe.store_folder)
    assert main(["inspect", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "10 rows"
    assert lines[1].split()[:4] == ["a-first-plain-s0", "a/first/plain", "0", "finished"]
    assert main(["inspect", store, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert "is no trajectory store" in failed(capsys, "inspect", tmp_path)


# ---- collect, train: the same functions, nothing left to do


def test_collect_and_train_again(world, tmp_path, capsys):
    file = str(world.recipe_file(tmp_path))
    options = [f"--output={world.recipe.folder}"]
    assert main(["collect", file, *options]) == 0
    assert f"10 finished runs in {world.recipe.store_folder}" in capsys.readouterr().out
    assert main(["train", file, *options]) == 0
    assert "trained on 5 tasks; guidance scale" in capsys.readouterr().out


# ---- generate


def test_generate_writes_a_folder_and_overwrites_nothing(generator_folder, tmp_path, capsys):
    out = tmp_path / "adapter"
    arguments = [PROMPT, "--generator", generator_folder, "--seed", "3", "--out"]
    assert main(["generate", *arguments, str(out)]) == 0
    assert "PeftModel.from_pretrained(base_model" in capsys.readouterr().out
    spec, _ = load_adapter_folder(out)
    assert spec == load_generator(Path(generator_folder)).spec
    assert "exists already; nothing is overwritten" in failed(capsys, "generate", *arguments, out)


def test_equal_seeds_are_equal_bytes_in_two_processes(generator_folder, tmp_path):
    arguments = ["generate", PROMPT, "--generator", generator_folder, "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    said = run("-m", "ltdi_peft.cli", *arguments, tmp_path / "two", PYTHONHASHSEED="7")
    assert said.returncode == 0, said.stderr
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_generate_refuses(generator_folder, tmp_path, capsys, monkeypatch):
    out = ("--out", tmp_path / "adapter")
    monkeypatch.delenv("LTDI_GENERATOR", raising=False)
    assert "task_prompt is empty" in failed(capsys, "generate", " ", *out)
    assert "no generator: pass generator=" in failed(capsys, "generate", PROMPT, *out)
    named = ("generate", PROMPT, "--generator", generator_folder, *out)
    assert "num_candidates is 3 with 0 examples" in failed(capsys, *named, "--candidates", 3)
    examples = tmp_path / "examples.jsonl"
    examples.write_text('["w0 w1 w2", "w1 w1"]\n["only one"]\n')
    line = failed(capsys, *named, "--candidates", 3, "--examples", examples)
    assert 'examples.jsonl:2: expected ["input", "answer"]' in line
    assert "--refine-steps is 2: give --examples" in failed(capsys, *named, "--refine-steps", 2)
    assert not (tmp_path / "adapter").exists()


def test_generate_chooses_by_examples(generator_folder, tmp_path, capsys):
    examples = tmp_path / "examples.jsonl"
    examples.write_text('["w0 w1 w2", "w1 w1"]\n')
    arguments = ["--generator", generator_folder, "--candidates", "3", "--examples", str(examples)]
    assert main(["generate", PROMPT, *arguments, "--out", str(tmp_path / "a")]) == 0
    _, adapter = load_adapter_folder(tmp_path / "a")
    assert all(torch.isfinite(b).all() for _, b in adapter.values())


def test_generate_refines_by_examples(generator_folder, tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text('["w0 w1 w2", "w1 w1"]\n["w2 w3 w4", "w3 w3"]\n')
    arguments = ["generate", PROMPT, "--generator", generator_folder, "--examples", str(examples)]
    assert main([*arguments, "--refine-steps", "2", "--out", str(tmp_path / "refined")]) == 0
    assert main(["generate", PROMPT, "--generator", generator_folder, "--out", str(tmp_path / "plain")]) == 0
    (spec, refined), (same_spec, plain) = (load_adapter_folder(tmp_path / n) for n in ("refined", "plain"))
    assert spec == same_spec
    assert not any(torch.equal(x, y) for s in plain for x, y in zip(plain[s], refined[s], strict=True))
