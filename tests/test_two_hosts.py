"""Collecting and training over two hosts that share a folder; one of them dies, and nothing is lost."""

import os
import subprocess
import sys
import time

import pytest
import torch
from test_recipes import recipe_over
from tiny_bench import SPLITS
from tiny_hosts import refused, two_hosts
from tiny_world import ROOT

from ltdi_peft.store import TrajectoryStore

WHY = refused()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]
PATIENCE = 240  # seconds; a run takes about 30 on a quiet machine


def finished(*programs):
    """Exit statuses and what was said."""
    said = [program.communicate(timeout=PATIENCE)[0] for program in programs]
    return [program.returncode for program in programs], said


def finals(folder):
    """Last adapters of the finished runs; reading them proves that they are whole."""
    runs = TrajectoryStore(folder, create=False).trajectories()
    return {(run.task.name, run.seed): run.adapter(run.snapshots[-1]) for run in runs}


def test_two_hosts_collect_one_store(world, tmp_path):
    file = world.recipe_file(tmp_path / "run")
    with two_hosts() as hosts:
        codes, said = finished(*(host.launch("-m", "ltdi_peft.cli", "collect", file) for host in hosts))
    assert codes == [0, 0], said
    whole, shared = finals(world.recipe.store_folder), finals(tmp_path / "run" / "trajectories")
    assert set(shared) == set(whole) == {(name, seed) for name in SPLITS["train"] for seed in (0, 1)}
    for key, adapter in shared.items():
        for site, (_, b) in adapter.items():
            assert torch.allclose(b, whole[key][site][1], rtol=1e-3, atol=1e-4)  # other groups


def test_a_host_that_dies_costs_nothing_that_was_recorded(world, tmp_path):
    # Runs long enough that the second host dies in the middle of its own; one run after the other.
    single = {"steps": 60, "batch_size": 4, "learning_rate": 3e-2}
    file = world.recipe_file(tmp_path / "run", collect={"together": 1, "single": single})
    runs = tmp_path / "run" / "trajectories"
    with two_hosts() as hosts:
        programs = [host.launch("-m", "ltdi_peft.cli", "collect", file) for host in hosts]
        began = time.monotonic()
        while len(list(runs.glob("runs/*/step-*"))) < 4:
            assert time.monotonic() - began < PATIENCE, "nothing was recorded"
            assert [program.poll() for program in programs] == [None, None]
            time.sleep(0.1)
        hosts[1].die()
        recorded = set(finals(runs))
        (code, _), (said, _) = finished(*programs)
    assert code != 0  # its own share is done, but it cannot know that the others' is
    assert "gloo" in said.lower() or "connection" in said.lower(), said
    left = finals(runs)
    assert recorded <= set(left) < {(name, seed) for name in SPLITS["train"] for seed in (0, 1)}
    before = {path: path.read_bytes() for path in runs.glob("runs/*/step-*")}
    done = subprocess.run(
        [sys.executable, "-m", "ltdi_peft.cli", "collect", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(finals(runs)) == 2 * len(SPLITS["train"])
    assert {path: path.read_bytes() for path in before} == before


def test_two_hosts_train_as_one_process_does(world, tmp_path):
    file = recipe_over(world, tmp_path / "run")
    script = ROOT / "recipes/train_generator.py"
    with two_hosts() as hosts:
        codes, said = finished(*(host.launch(script, file) for host in hosts))
    assert codes == [0, 0], said
    assert sum(text.count("trained on 5 tasks") for text in said) == 1  # by the main process alone
