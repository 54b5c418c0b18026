"""Collecting: everything once, whatever interrupts it, and nothing mixed."""

import importlib
import signal
from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, tiny_bench, tiny_recipe, tiny_suite
from tiny_world import ROOT, run
from torch.testing import assert_close

from ltdi_peft.adapter import BrokenAdapterError, load_adapter_folder
from ltdi_peft.collect import (
    collect,
    differing,
    interrupted_if_left,
    record_group,
    record_jobs,
    require_examples,
    run_seed,
    shared_start,
)
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task, TaskSuite

room = importlib.import_module("ltdi_peft.collect")  # the package's own `collect` is the function
HELD_OUT = [name for split in ("validation", "unseen_tasks", "unseen_domains") for name in SPLITS[split]]


def bench_of(folder, **changes):
    recipe = tiny_recipe(folder)
    return tiny_bench(replace(recipe, collect=replace(recipe.collect, **changes)))


def finals(store):
    return {(r.task.name, r.seed): r.adapter(r.snapshots[-1]) for r in store.trajectories()}


def bytes_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def never(*args, **kwargs):
    raise AssertionError("done again")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    bench = bench_of(tmp_path_factory.mktemp("collect"))
    collect(bench.recipe, bench=bench, progress=False)
    return bench


def test_every_task_and_seed_is_recorded_once_from_one_start(done):
    training = TrajectoryStore(done.recipe.store_folder, create=False).trajectories()
    held_out = TrajectoryStore(done.recipe.held_out_folder, create=False).trajectories()
    assert sorted((r.task.name, r.seed) for r in training) == sorted(
        (name, seed) for name in SPLITS["train"] for seed in (0, 1)
    )
    assert sorted((r.task.name, r.seed) for r in held_out) == sorted((name, 0) for name in HELD_OUT)
    start = load_adapter_folder(done.recipe.folder / "start")[1]
    for one in (*training, *held_out):
        assert [s.progress for s in one.snapshots] == [1 / 3, 2 / 3, 1]
        for site, (a, b) in one.start().items():
            assert torch.equal(a, start[site][0])
            assert torch.equal(b, start[site][1])
            last_a, last_b = one.adapter(one.snapshots[-1])[site]
            assert torch.equal(last_a, a)  # shared_a: frozen
            assert not torch.equal(last_b, b)


def test_done_is_done(done, monkeypatch):
    before = bytes_of(done.recipe.folder)
    monkeypatch.setattr(room, "fit_steps", never)
    collect(done.recipe, bench=done, progress=False)
    after = bytes_of(done.recipe.folder)
    for measured in ("timings.json", "memory.json"):
        assert before.pop(done.recipe.folder / measured) is not None
        assert after.pop(done.recipe.folder / measured) is not None
    assert after == before


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from ltdi_peft import store
from tiny_bench import collected
left = {writes}
whole = store.RunWriter.write
def write(self, *args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args, **kwargs)
store.RunWriter.write = write
collected(Path({folder!r}))
"""


def test_killed_in_a_group_goes_on(tmp_path, done, monkeypatch):
    # 12 writes a group of four; the second group is killed at its fifth
    code = KILLED.format(tests=str(ROOT / "tests"), writes=17, folder=str(tmp_path))
    died = run("-c", code)
    assert died.returncode == -signal.SIGKILL, died.stderr
    store = TrajectoryStore(tmp_path / "trajectories")
    kept = [one.path for one in store.trajectories()]
    assert len(kept) == 4
    assert len(store.trajectories(finished_only=False)) == 8
    before = {path: bytes_of(path) for path in (*kept, tmp_path / "start")}
    monkeypatch.setattr(room, "multi_task_fit", never)
    bench = bench_of(tmp_path)
    store = collect(bench.recipe, bench=bench, progress=False)
    assert all(bytes_of(path) == content for path, content in before.items())
    assert sum(not one.finished for one in store.trajectories(finished_only=False)) == 4
    whole = finals(TrajectoryStore(done.recipe.store_folder))
    assert finals(store).keys() == whole.keys()
    for key, adapter in finals(store).items():
        for site, (_, b) in adapter.items():
            # other groups after the kill: float32 sums in another order, through Adam
            assert_close(b, whole[key][site][1], rtol=1e-3, atol=1e-4)


def test_a_half_written_start_is_trained_again(tmp_path):
    bench = bench_of(tmp_path)
    first = shared_start(bench, progress=False)
    (tmp_path / "start" / "adapter_config.json").unlink()
    again = shared_start(bench_of(tmp_path), progress=False)
    assert all(torch.equal(again[site][1], b) for site, (_, b) in first.items())


def test_a_fresh_start_is_the_fresh_adapter(tmp_path):
    bench = bench_of(tmp_path, start="fresh")
    assert shared_start(bench) is bench.fresh
    assert not (tmp_path / "start").exists()


def test_runs_start_from_an_adapter_that_is_there(done, tmp_path):
    given = done.recipe.folder / "start"
    bench = bench_of(tmp_path / "run", start=str(given))
    collect(bench.recipe, bench=bench, progress=False)
    (start,) = {run.start_path for run in TrajectoryStore(bench.recipe.store_folder).trajectories()}
    run = TrajectoryStore(bench.recipe.store_folder).trajectories()[0]
    expected = load_adapter_folder(given)[1]
    assert run.start_path == start
    assert all(torch.equal(run.start()[site][1], b) for site, (_, b) in expected.items())
    assert not (tmp_path / "run" / "start").exists()


def test_a_start_that_is_not_there_is_named_before_the_base_model_is_loaded(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, collect=replace(recipe.collect, start=f"{tmp_path}/nothing"))
    monkeypatch.setattr(room, "open_bench", never)
    monkeypatch.setattr(room, "recipe_suite", lambda recipe: tiny_suite())
    with pytest.raises(BrokenAdapterError, match="nothing"):
        collect(recipe, progress=False)


def test_groups_change_only_the_rounding(done, tmp_path):
    start, tasks = shared_start(done), done.suite.split("train")[:2]
    stores = [TrajectoryStore(tmp_path / "together"), TrajectoryStore(tmp_path / "alone")]
    record_group(done, stores[0], start, [(task, 0) for task in tasks])
    for task in tasks:
        record_group(done, stores[1], start, [(task, 0)])
    together, alone = map(finals, stores)
    for key, adapter in together.items():
        for site, (_, b) in adapter.items():
            assert_close(b, alone[key][site][1], rtol=1e-3, atol=1e-4)  # float32, six Adam steps
    assert len({run_seed(recipe, seed) for recipe in (0, 1) for seed in (0, 1)}) == 4


def test_sam_is_another_run(done, tmp_path):
    job = [(done.suite.split("train")[0], 0)]
    found = []
    for rho in (0.0, 0.05):
        collecting = done.recipe.collect
        single = replace(collecting.single, sam_rho=rho)
        bench = replace(done, recipe=replace(done.recipe, collect=replace(collecting, single=single)))
        store = TrajectoryStore(tmp_path / str(rho))
        record_group(bench, store, shared_start(done), job)
        (one,) = store.trajectories()
        found.append(one)
    plain, sharp = (one.adapter(one.snapshots[-1]) for one in found)
    assert found[0].snapshots[0].loss == pytest.approx(found[1].snapshots[0].loss, rel=0.2)
    assert all(not torch.equal(plain[site][1], b) for site, (_, b) in sharp.items())


def test_shared_start_gauge_trains_a(tmp_path):
    bench = bench_of(tmp_path, gauge="shared_start", start="fresh")
    store = TrajectoryStore(tmp_path / "store")
    record_group(bench, store, shared_start(bench), [(bench.suite.split("train")[0], 0)])
    (one,) = store.trajectories()
    moved = one.adapter(one.snapshots[-1])
    assert all(not torch.equal(moved[site][0], a) for site, (a, _) in one.start().items())


def test_activations_of_recorded_tasks_are_let_go(done, tmp_path):
    bench = replace(done, pools={})
    jobs = [(task, 0) for task in bench.suite.split("train")[:3]]
    record_jobs(bench, TrajectoryStore(tmp_path), shared_start(bench), jobs, "", False)
    assert bench.pools == {}


def test_an_interrupted_group_says_so(done, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "fit_steps", interrupted)
    store = TrajectoryStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        record_group(done, store, shared_start(done), [(done.suite.split("train")[0], 0)])
    (row,) = store.describe()
    assert row["status"] == "interrupted"


def test_a_run_that_cannot_be_marked_keeps_no_other_from_it(done, tmp_path):
    """Its error is a note of the one that ended the group."""
    store, run = TrajectoryStore(tmp_path), TrajectoryStore(done.recipe.store_folder).trajectories()[0]
    about = {"start": run.start(), "planned_steps": 4}
    writers = [store.start_run(run.spec, run.task, seed=seed, **about) for seed in range(2)]
    (writers[0].path / "run.json").unlink()
    writers[0].path.rmdir()
    with pytest.raises(RuntimeError, match="the power went out") as caught, interrupted_if_left(writers):
        raise RuntimeError("the power went out")
    assert any("could not be marked as interrupted" in note for note in caught.value.__notes__)
    assert store.trajectory(writers[1].run_id).status == "interrupted"


def test_other_settings_are_refused_in_one_output(done):
    collecting = done.recipe.collect
    single = replace(collecting.single, steps=7)
    other = replace(done.recipe, collect=replace(collecting, single=single))
    with pytest.raises(ValueError, match=r"other \['collect.single.steps'\]"):
        collect(other, bench=done)
    more = replace(done.recipe, collect=replace(collecting, seeds=3, together=2))
    room.require_same_settings(more)  # these only add runs


def test_differing_names_dotted_keys():
    assert differing({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == ["a.c", "d", "e"]


def test_tasks_without_examples_are_refused_before_the_base_is_loaded(tmp_path, monkeypatch):
    empty = Task("empty", ("do nothing",))
    suite = TaskSuite("odd", {"empty": empty}, {s: ("empty",) if s == "train" else () for s in SPLITS})
    with pytest.raises(ValueError, match=r"no training examples, first 'empty'"):
        require_examples(suite)
    monkeypatch.setattr(room, "load_base", never)
    monkeypatch.setattr(room, "recipe_suite", lambda recipe: tiny_suite().parts(train=0))
    with pytest.raises(ValueError, match=r"no training tasks; set suite.train"):
        collect(tiny_recipe(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_two_processes_share_the_runs(world, tmp_path):
    file = world.recipe_file(tmp_path / "run")
    launch = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate/cpu2.yaml")
    said = run(*launch, "-m", "ltdi_peft.cli", "collect", file)
    assert said.returncode == 0, said.stderr
    one, two = (
        TrajectoryStore(world.recipe.store_folder),
        TrajectoryStore(tmp_path / "run" / "trajectories"),
    )
    assert [r.run_id for r in two.trajectories()] == [r.run_id for r in one.trajectories()]
    whole = finals(one)
    for key, adapter in finals(two).items():
        for site, (_, b) in adapter.items():
            assert_close(b, whole[key][site][1], rtol=1e-3, atol=1e-4)  # other groups
