"""`ltdi`: exit status, one line for bad input, JSON, colours, completion, and quick help."""

import io
import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_bigbench import cached_bigbench
from tiny_world import run

from ltdi_peft import __version__
from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.cli import COMPLETION, main, make_parser
from ltdi_peft.commands import COMMANDS
from ltdi_peft.generator import load_generator
from ltdi_peft.suite.bigbench import BIGBENCH_SPLITS
from ltdi_peft.task import UnknownTaskError
from ltdi_peft.terminal import in_colour, one_line

pytestmark = pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
NAMES = [command.name for command in (*COMMANDS, COMPLETION)]
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


def test_there_are_subcommands():
    assert {"collect", "train", "evaluate", "tasks", "inspect", "generate", "plan", "import", "push"} <= set(
        NAMES
    )
    assert len(set(NAMES)) == len(NAMES)


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_names_every_subcommand():
    seconds = []
    for _ in range(3):
        began = children_seconds()
        said = run("-m", "ltdi_peft.cli", "--help")
        seconds.append(children_seconds() - began)
    assert said.returncode == 0
    assert all(f"\n    {name}" in said.stdout for name in NAMES)
    assert min(seconds) < 0.5  # of CPU time, what an idle machine needs; importing torch takes 2 s
    code = (
        "import sys, ltdi_peft.cli; ltdi_peft.cli.make_parser(); "
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'yaml'} & set(sys.modules)))"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ltdi_peft {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_subcommand_is_documented(name, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"example: ltdi {name} " in said
    assert all(option in said for option in ("--json", "--quiet", "--no-color"))


def test_examples_are_command_lines_that_parse():
    for command in (*COMMANDS, COMPLETION):
        known, rest = make_parser().parse_known_args([command.name, *shlex.split(command.example)])
        assert known.command is command
        assert not rest or command.overrides


# ---- bad input


@pytest.mark.parametrize("name", ["collect", "train", "evaluate", "plan"])
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
    assert one_line(UnknownTaskError("no such task")) == "no such task"


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ltdi_peft.task.load_suite", interrupted)
    assert main(["tasks"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_what_is_not_foreseen_ends_with_1_and_its_traceback():
    code = (
        "import ltdi_peft.task, ltdi_peft.cli\n"
        "def broken(source): raise ZeroDivisionError('a bug')\n"
        "ltdi_peft.task.load_suite = broken\n"
        "raise SystemExit(ltdi_peft.cli.main(['tasks']))"
    )
    said = run("-c", code)
    assert said.returncode == 1
    assert "Traceback" in said.stderr
    assert "ZeroDivisionError: a bug" in said.stderr


# ---- colours


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_and_switch_off(world, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert in_colour(True, no_color=False)
    assert not in_colour(False, no_color=False)
    assert not in_colour(True, no_color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour(True, no_color=False)
    monkeypatch.delenv("NO_COLOR")
    said = {}
    for options in ((), ("--no-color",), ("--json",)):
        monkeypatch.setattr(sys, "stdout", out := Terminal())
        monkeypatch.setattr(sys, "stderr", err := Terminal())
        assert main(["tasks", "--source", world.recipe.suite.source, *options]) == 0
        assert main(["tasks", "--source", "nowhere.jsonl", *options]) == 2
        said[options] = out.getvalue(), err.getvalue()
    assert said[()][0].startswith("\x1b[1mname ")
    assert said[()][1].startswith("\x1b[31mltdi tasks:\x1b[0m suite")
    assert "\x1b" not in "".join(said["--no-color",])
    assert "\x1b" not in said["--json",][0]


# ---- completion


def completed(tmp_path, *words):
    """What bash offers for a command line whose last word is being typed."""
    file = tmp_path / "ltdi.bash"
    file.write_text(run("-m", "ltdi_peft.cli", "completion", "bash").stdout)
    line = " ".join(f"'{word}'" for word in words)
    script = (
        f"source {file}; compopt() {{ :; }}; COMP_WORDS=(ltdi {line}); COMP_CWORD={len(words)}; _ltdi; "
        'printf "%s\n" "${COMPREPLY[@]}"; complete -p ltdi'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    *offered, registered = done.stdout.split("\n")[:-1]
    assert registered == "complete -o default -F _ltdi ltdi"
    return [word for word in offered if word]


def test_bash_completes(tmp_path):
    assert completed(tmp_path, "t") == ["tasks", "train"]
    assert completed(tmp_path, "generate", "a prompt", "--re") == ["--refine-steps"]
    assert completed(tmp_path, "train", "--train.task_loss.st") == ["--train.task_loss.steps="]
    assert completed(tmp_path, "completion", "z") == ["zsh"]
    assert completed(tmp_path, "collect", "rec") == []  # file names, which bash has itself
    assert completed(tmp_path, "tasks", "--train.st") == []  # takes no overrides


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_subcommand_and_option(shell, capsys):
    assert main(["completion", shell, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == shell
    dash = "-l " if shell == "fish" else "--"
    words = [*NAMES, f"{dash}refine-steps", f"{dash}train.task_loss.steps", f"{dash}quiet"]
    assert [word for word in words if word not in found["script"]] == []
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=found["script"], text=True, check=True)


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "csh"])
    assert ended.value.code == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err


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
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "split", "examples", "base", "oracle", "chance", "prompt", "example"]
    measured = [row.split()[3:5] for row in rows[:-1] if row.split()[3] != "None"]
    assert measured
    assert all(0 <= float(base) < float(oracle) <= 1 for base, oracle in measured)


def test_calibrate_prints_a_row_a_task(world, tmp_path, capsys):
    file = str(world.recipe_file(tmp_path / "run"))
    assert main(["calibrate", file, "--quiet"]) == 0
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
    for name, key, value in (("collect", "runs", 10), ("train", "tasks", 5)):
        assert main([name, file, *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[key] == value


def test_progress_is_on_stderr_and_goes_with_quiet(world, tmp_path, capsys):
    file, said = str(world.recipe_file(tmp_path)), []
    for index, options in enumerate(([], ["--quiet"])):
        output = f"--output={tmp_path / str(index)}"
        assert main(["collect", file, output, "--suite.train=2", "--json", *options]) == 0
        found = capsys.readouterr()
        assert json.loads(found.out)["runs"] == 4
        said.append(found.err)
    assert "training tasks" in said[0]
    assert not any(bar in said[1] for bar in ("training tasks", "lower layers", "multi-task adapter"))


def test_evaluate_prints_its_result(world, tmp_path, capsys):
    file = str(world.recipe_file(tmp_path, evaluate={"methods": ["ours"], "seeds": 1, "examples": 2}))
    # It writes beside the runs and into the generator's folder, and the world is read only.
    shutil.copytree(world.recipe.folder, tmp_path / "run")
    options = ["--json", "--quiet", f"--output={tmp_path / 'run'}", "--results", str(tmp_path / "results")]
    assert main(["evaluate", file, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) >= {"base", "ours", "oracle"}
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == found
    other, config = tmp_path / "other", tmp_path / "run" / "generator" / "config.json"
    shutil.copytree(tmp_path / "run" / "generator", other)
    (tmp_path / "run" / "generator" / "evaluation.json").unlink()
    (other / "config.json").write_text(config.read_text().replace('"mean_share": 1.0', '"mean_share": 0.25'))
    assert main(["evaluate", file, *options, "--generator", str(other), "--name=other"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"]["ours"]["mean_share"] == 0.25
    assert (tmp_path / "results" / "other.json").is_file()
    assert not (config.parent / "evaluation.json").exists()  # its scores are not the recipe's generator's


def test_plan(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ltdi_peft.speed.EACH", 0.01)  # what is measured here does not matter
    file = str(world.recipe_file(tmp_path))
    assert main(["plan", file, "--collect.seeds=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "15 of training tasks, 6 held out" in lines[2]
    assert main(["plan", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == {"training": 10, "held_out": 6}
    assert set(found["seconds"]) == set(found["memory_bytes"]) == {"collect", "train", "evaluate"}
    assert not (tmp_path / "run").exists()


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
    options = ("--json", "--quiet")
    said = run("-m", "ltdi_peft.cli", *arguments, tmp_path / "two", *options, PYTHONHASHSEED="7")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["out"] == str(tmp_path / "two")
    assert "%|" not in said.stderr  # no bar of any library
    for file in ("adapter_model.safetensors", "adapter_config.json", "provenance.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_generate_refuses(generator_folder, tmp_path, capsys, no_generator):
    out = ("--out", tmp_path / "adapter")
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
