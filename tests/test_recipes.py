"""Every recipe loads; Accelerate's files parse, and those that a CPU can run are launched: equal work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_bigbench import cached_bigbench
from tiny_world import ROOT, run

from ltdi_peft.collect import recipe_suite
from ltdi_peft.config import load_recipe
from ltdi_peft.launch import asked_processes, processes_in
from ltdi_peft.suite.bigbench import BIGBENCH_SPLITS

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))  # recipes/accelerate/ holds Accelerate's own files
CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
LAUNCHED = {"one.yaml": 1, "cpu2.yaml": 2}  # file → processes
LAUNCH = ("-m", "accelerate.commands.launch")
SCRIPT = ROOT / "recipes/train_generator.py"


def test_there_are_recipes():
    assert RECIPES, "no recipe found: the tests below would guard nothing"
    assert {path.name for path in CONFIGS} == {"one.yaml", "cpu2.yaml", "ddp.yaml", "fsdp.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_says_how_to_run_it(path, tmp_path, monkeypatch):
    recipe = load_recipe(path)
    if recipe.suite.source == "bigbench":  # made-up tasks under the names of the committed splits
        monkeypatch.setenv("LTDI_CACHE", str(cached_bigbench(tmp_path, BIGBENCH_SPLITS)))
    assert not Path(recipe.output).is_absolute()
    suite = recipe_suite(recipe)
    assert suite.split("train")
    assert suite.split("validation")
    assert suite.split("unseen_tasks") or suite.split("unseen_domains")
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.match("# (make|ltdi|accelerate launch|python) ", head), "a recipe begins with its command"
    assert re.search("CPU cores?", head), "a recipe says on what machine it takes how long"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_accelerate_file_parses_and_says_whether_it_was_run(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    if path.name in LAUNCHED:
        assert "launched in the tests" in head
        assert config.num_processes == LAUNCHED[path.name]
    else:
        assert "Untested" in head


def test_sharding_is_for_plain_training_and_the_file_says_so():
    assert "meta.method: plain" in (ROOT / "recipes/accelerate/fsdp.yaml").read_text()


# ---- launched


def recipe_over(world, folder):
    """The world's recipe over a copy of its runs, nothing trained yet; four units a step."""
    for name in ("trajectories", "held_out", "start"):
        shutil.copytree(world.recipe.folder / name, folder / name)
    about = {"steps": 2, "tasks": 4, "examples": 2}
    return world.recipe_file(folder, train={"steps": 3, "units": 4, "task_loss": about})


def launched(world, folder, *options):
    """The report of a training that `accelerate launch` started."""
    said = run(*LAUNCH, *options, SCRIPT, recipe_over(world, folder), "--train.log_every=1")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("trained on 5 tasks") == 1  # by the main process alone
    return json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    return launched(
        world, tmp_path_factory.mktemp("one") / "run", "--config_file", ROOT / "recipes/accelerate/one.yaml"
    )


def equal_work(report, alone):
    assert [step for step, _ in report["losses"]] == [1, 2, 3, 4, 5]
    for (_, got), (_, want) in zip(report["losses"], alone["losses"], strict=True):
        assert got == pytest.approx(want, rel=1e-4)  # float32, gradients summed in another order
    assert report["final_loss"] == pytest.approx(alone["final_loss"], rel=1e-4)


@pytest.mark.slow
def test_one_process(alone):
    assert alone["world_size"] == LAUNCHED["one.yaml"]
    assert alone["final_loss"] == alone["losses"][-1][1]


@pytest.mark.slow
def test_two_processes(world, alone, tmp_path):
    report = launched(world, tmp_path / "run", "--config_file", ROOT / "recipes/accelerate/cpu2.yaml")
    assert report["world_size"] == LAUNCHED["cpu2.yaml"]
    equal_work(report, alone)


@pytest.mark.slow
def test_the_plain_flags_start_two_as_well(world, alone, tmp_path):
    report = launched(world, tmp_path / "run", "--num_processes", 2, "--cpu")
    assert report["world_size"] == 2
    equal_work(report, alone)


@pytest.mark.slow
def test_a_launched_program_says_in_one_line_what_is_wrong(world, tmp_path):
    said = run(*LAUNCH, "--config_file", ROOT / "recipes/accelerate/one.yaml", SCRIPT, tmp_path / "no.yaml")
    assert said.returncode != 0
    assert "train_generator: recipe " in said.stderr
    assert "no.yaml does not exist" in said.stderr


# ---- how many were asked for


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("/v/bin/python /v/bin/accelerate launch --num_processes 2 --cpu a.py b.yaml --x.y=3", 2),
        ("python -m accelerate.commands.launch --cpu --num_processes=3 a.py", 3),
        ("accelerate-launch --num-processes 4 --cpu a.py", 4),
        ("python /v/bin/accelerate launch --cpu a.py --num_processes 5", 1),  # that is the program's own
        (f"accelerate launch --config_file {ROOT}/recipes/accelerate/cpu2.yaml a.py", 2),
        ("bash -c something", 1),
        ("", 1),
    ],
)
def test_processes_in_a_command_line(command, count):
    assert processes_in(command.split()) == count


THREADS = "from ltdi_peft.launch import use_all_cores as a; import torch; a(); print(torch.get_num_threads())"


@pytest.mark.slow
def test_one_process_has_every_core_unless_told_otherwise(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}

    def threads(*flags, **variables):
        command = [*map(str, (sys.executable, *LAUNCH, *flags, script))]
        about = {"capture_output": True, "text": True, "check": True, "env": {**environment, **variables}}
        return int(subprocess.run(command, **about).stdout.split()[-1])

    assert threads() == psutil.cpu_count(logical=False)
    assert threads("--num_cpu_threads_per_process", 1) == 1
    assert threads(OMP_NUM_THREADS="1") == 1


def test_nothing_is_asked_for_outside_the_launcher(monkeypatch):
    for name in ("MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert asked_processes() == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert asked_processes() == 1  # started by torchrun, with all the others
