import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ltdi_peft.adapter import AdapterSpec, Site, SpecMismatchError
from ltdi_peft.store import FORMAT_VERSION, TrajectoryStore
from ltdi_peft.task import Task
from ltdi_peft.trajectory import HEADER

SPEC = AdapterSpec(
    "tiny/llama",
    (Site("layers.0.q_proj", 8, 6, 2, 4.0, 2.0), Site("layers.1.q_proj", 8, 6, 2, 4.0, 2.0)),
    {"r": 2, "target_modules": ["q_proj"]},
)
FROZEN = ("layers.0.q_proj.lora_A", "layers.1.q_proj.lora_A")
TASK = Task("Tone: polite", ("Rewrite politely.", "Be polite."), "style", train=(("hi", "good day"),))


def make_adapter(seed, spec=SPEC):
    rng = torch.Generator().manual_seed(seed)
    return {
        s.name: (torch.randn(s.rank, s.fan_in, generator=rng), torch.randn(s.fan_out, s.rank, generator=rng))
        for s in spec.sites
    }


def assert_same_adapter(got, expected):
    assert list(got) == list(expected)
    for site, (a, b) in expected.items():
        assert torch.equal(got[site][0], a)
        assert torch.equal(got[site][1], b)


def start(store, task=TASK, seed=0, **settings):
    return store.start_run(SPEC, task, seed=seed, start=make_adapter(0), **{"planned_steps": 40, **settings})


def write_run(store, steps=(10, 20, 30, 40), **settings):
    writer = start(store, **settings)
    for step in steps:
        writer.write(step, make_adapter(step), loss=1 / step, learning_rate=1e-3)
    writer.finish(steps[-1])
    return writer


@pytest.fixture
def store(tmp_path):
    return TrajectoryStore(tmp_path / "store")


def test_round_trip_is_bit_exact(store):
    write_run(store)
    (run,) = TrajectoryStore(store.path, create=False).trajectories()
    assert run.run_id == "tone-polite-s0"
    assert (run.spec, run.seed, run.finished, run.planned_steps) == (SPEC, 0, True, 40)
    assert_same_adapter(run.start(), make_adapter(0))
    assert [s.step for s in run.snapshots] == [10, 20, 30, 40]
    assert [s.progress for s in run.snapshots] == [0.25, 0.5, 0.75, 1.0]
    assert run.snapshots[1].loss == 1 / 20
    assert run.snapshots[1].learning_rate == 1e-3
    for snapshot in run.snapshots:
        assert_same_adapter(run.adapter(snapshot), make_adapter(snapshot.step))


def test_examples_are_kept_only_when_asked_for(store):
    write_run(store)
    write_run(store, seed=1, keep_examples=True)
    without, kept = store.trajectories()
    assert (without.task.name, without.task.prompts, without.task.domain) == (
        TASK.name,
        TASK.prompts,
        "style",
    )
    assert without.task.train == ()
    assert kept.task == TASK


def test_unknown_loss_and_rate_stay_unknown(store):
    writer = start(store)
    writer.write(40, make_adapter(1))
    writer.finish(40)
    assert store.trajectories()[0].snapshots[0].loss is None
    assert store.trajectories()[0].snapshots[0].learning_rate is None


def test_half_precision_is_the_rounded_snapshot_on_an_exact_start(store):
    write_run(store, dtype="float16")
    (run,) = store.trajectories()
    assert_same_adapter(run.start(), make_adapter(0))
    expected = {site: (a.half().float(), b.half().float()) for site, (a, b) in make_adapter(10).items()}
    assert_same_adapter(run.adapter(run.snapshots[0]), expected)
    with pytest.raises(ValueError, match=r"run tone-polite-s0-2, step 10: .*lora_A overflows float16"):
        start(store, dtype="float16").write(10, {k: (a * 1e9, b) for k, (a, b) in make_adapter(1).items()})


def test_a_frozen_factor_is_stored_once(store):
    def moved(step):
        return {site: (make_adapter(0)[site][0], b) for site, (_, b) in make_adapter(step).items()}

    whole = write_run(store)
    writer = start(store, frozen=FROZEN)
    writer.write(10, moved(10))
    writer.write(40, moved(40))
    writer.finish(40)
    run = store.trajectory(writer.run_id)
    assert_same_adapter(run.adapter(run.snapshots[1]), moved(40))
    size = run.snapshots[0].path.stat().st_size
    assert size < store.trajectory(whole.run_id).snapshots[0].path.stat().st_size
    with pytest.raises(
        ValueError, match=r"step 10: layers\.0\.q_proj\.lora_A is declared frozen but differs"
    ):
        start(store, frozen=FROZEN).write(10, make_adapter(10))
    with pytest.raises(ValueError, match=r"frozen factors \['x'\] do not exist"):
        start(store, frozen=("x",))


def test_a_mapped_adapter_is_the_adapter(store):
    def moved(step):
        return {site: (make_adapter(0)[site][0], b) for site, (_, b) in make_adapter(step).items()}

    for frozen, adapter in (((), make_adapter(10)), (FROZEN, moved(10))):
        writer = start(store, frozen=frozen)
        writer.write(10, adapter)
        run = store.trajectory(writer.run_id)
        mapped = run.mapped(run.snapshots[0])
        assert_same_adapter(mapped, adapter)
        assert len(mapped) == 2
        with pytest.raises(KeyError, match="nowhere"):
            mapped["nowhere"]


def test_a_mapped_adapter_reads_and_checks_only_what_is_asked_for(store):
    write_run(store)
    (run,) = store.trajectories()
    snapshot = run.snapshots[0]
    data = bytearray(snapshot.path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # float32 NaN, in the last site
    snapshot.path.write_bytes(data)
    mapped = run.mapped(snapshot)
    assert torch.equal(mapped["layers.0.q_proj"][0], make_adapter(10)["layers.0.q_proj"][0])
    with pytest.raises(
        ValueError, match=r"step-00000010\.safetensors: site layers\.1\.q_proj, lora_B: 1 of .*NaN"
    ):
        mapped["layers.1.q_proj"]
    snapshot.path.write_bytes(save({"layers.0.q_proj.lora_A": torch.zeros(2, 8)}))
    mapped = run.mapped(snapshot)
    with pytest.raises(ValueError, match=r"step-00000010\.safetensors: layers\.1\.q_proj\.lora_A is missing"):
        mapped["layers.1.q_proj"]
    snapshot.path.unlink()
    with pytest.raises(ValueError, match=r"step-00000010\.safetensors is missing or truncated"):
        run.mapped(snapshot)


def test_runs_that_share_a_start_store_it_once(store):
    for seed in range(3):
        write_run(store, seed=seed)
    assert len(list((store.path / "starts").iterdir())) == 1
    assert [run.run_id for run in store.trajectories()] == [f"tone-polite-s{i}" for i in range(3)]


# ---- local targets


def test_local_targets_are_the_nearest_to_equal_parts(store):
    write_run(store, steps=(1, 9, 19, 31, 40))
    (run,) = store.trajectories()
    assert [s.step for s in run.local_targets(4)] == [9, 19, 31, 40]
    assert [s.step for s in run.local_targets(2)] == [19, 40]
    assert [s.step for s in run.local_targets(1)] == [40]
    with pytest.raises(ValueError, match="do not give 5 different local targets"):
        run.local_targets(5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run.local_targets(0)


def test_of_two_as_near_the_earlier_is_the_target(store):
    write_run(store, steps=(15, 25, 40))
    assert [s.step for s in store.trajectories()[0].local_targets(2)] == [15, 40]


def test_progress_is_measured_by_the_last_step_not_by_the_plan(store):
    write_run(store, steps=(10, 20))  # stopped early, 40 were planned
    assert [s.progress for s in store.trajectories()[0].snapshots] == [0.5, 1.0]


# ---- crashes, resume


def test_an_unfinished_run_is_readable_up_to_its_last_snapshot(store):
    writer = start(store)
    writer.write(10, make_adapter(10))
    (writer.path / "step-00000020.safetensors.123.partial").write_bytes(b"half")
    assert store.trajectories() == []
    (run,) = store.trajectories(finished_only=False)
    assert (run.finished, run.status) == (False, "recording")
    assert [(s.step, s.progress) for s in run.snapshots] == [(10, 0.25)]
    writer.interrupt("KeyboardInterrupt: ")
    (run,) = store.trajectories(finished_only=False)
    assert (run.status, run.about["interrupted_by"]) == ("interrupted", "KeyboardInterrupt: ")


def test_a_run_folder_without_manifest_is_no_run_yet(store):
    write_run(store)
    (store.path / "runs" / "just-claimed").mkdir()
    assert len(store.trajectories(finished_only=False)) == 1


def test_resume_moves_the_future_aside_and_goes_on(store):
    writer = write_run(store)
    again = store.resume_run(writer.run_id, 20, spec=SPEC, planned_steps=50)
    assert store.trajectories() == []
    again.write(30, make_adapter(300))
    again.write(50, make_adapter(500))
    again.finish(50)
    (run,) = store.trajectories()
    assert [s.step for s in run.snapshots] == [10, 20, 30, 50]
    assert_same_adapter(run.adapter(run.snapshots[1]), make_adapter(20))
    assert_same_adapter(run.adapter(run.snapshots[2]), make_adapter(300))
    aside = run.path / "superseded-1"
    assert sorted(p.name for p in aside.iterdir()) == [
        "run.json",
        "step-00000030.safetensors",
        "step-00000040.safetensors",
    ]
    assert json.loads((aside / "run.json").read_text())["status"] == "finished"
    store.resume_run(writer.run_id, 10)
    assert (run.path / "superseded-2" / "step-00000020.safetensors").is_file()


def test_resume_refuses_another_adapter_and_an_unknown_run(store):
    writer = write_run(store)
    other = replace(SPEC, base_model="other/base")
    with pytest.raises(SpecMismatchError, match="other/base"):
        store.resume_run(writer.run_id, 20, spec=other)
    assert len(store.trajectories()[0].snapshots) == 4
    with pytest.raises(ValueError, match="no run 'nothing' in this store"):
        store.resume_run("nothing", 3)


def test_find_runs_by_task_seed_and_about(store):
    for folder in ("a", "b"):
        start(store, about={"output_dir": folder})
    assert [r.run_id for r in store.find_runs(TASK.name, 0, output_dir="b")] == ["tone-polite-s0-2"]
    assert len(store.find_runs(TASK.name, 0)) == 2
    assert store.find_runs(TASK.name, 1) == store.find_runs("other", 0) == []


def test_describe_has_a_row_a_run(store):
    write_run(store)
    start(store, seed=7)
    finished, begun = store.describe()
    size = finished.pop("bytes")
    assert size == sum(s.path.stat().st_size for s in store.trajectories()[0].snapshots)
    assert finished == {
        "run": "tone-polite-s0",
        "task": "Tone: polite",
        "seed": 0,
        "status": "finished",
        "snapshots": 4,
        "last_step": 40,
        "last_loss": 1 / 40,
    }
    assert (begun["status"], begun["snapshots"], begun["last_loss"], begun["bytes"]) == (
        "recording",
        0,
        None,
        0,
    )


# ---- refusals


def test_nan_is_refused_by_run_step_and_site_and_the_rest_stays(store):
    writer = start(store)
    writer.write(10, make_adapter(10))
    bad = make_adapter(20)
    bad["layers.1.q_proj"][1][0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"run tone-polite-s0, step 20: site layers\.1\.q_proj, lora_B: 1 of 12"
    ):
        writer.write(20, bad)
    writer.write(20, make_adapter(20))
    writer.finish(20)
    assert len(store.trajectories()[0].snapshots) == 2


def test_nan_in_a_frozen_factor_is_called_nan(store):
    bad = make_adapter(10)
    bad["layers.0.q_proj"][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"step 10: site layers\.0\.q_proj, lora_A: 1 of .* NaN"):
        start(store, frozen=FROZEN).write(10, bad)


def test_a_nan_on_disk_is_refused_by_file(store):
    writer = write_run(store)
    snapshot = store.trajectories()[0].snapshots[0]
    data = bytearray(snapshot.path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # float32 NaN
    snapshot.path.write_bytes(data)
    run = store.trajectory(writer.run_id)
    with pytest.raises(ValueError, match=r"step-00000010\.safetensors: .*NaN"):
        run.adapter(snapshot)


@pytest.mark.parametrize("kept", [0, 6, 200, -3])
def test_a_truncated_snapshot_is_refused_by_file(store, kept):
    write_run(store)
    path = store.trajectories()[0].snapshots[2].path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"step-00000030\.safetensors is truncated"):
        store.trajectories()


@pytest.mark.parametrize("header", ["{", "[]", '{"step": 3}'])
def test_a_snapshot_with_another_header_is_refused_by_file(store, header):
    write_run(store)
    path = store.trajectories()[0].snapshots[2].path
    save_file(load_file(path), path, metadata={HEADER: header})
    with pytest.raises(ValueError, match=r"step-00000030\.safetensors is truncated or no snapshot"):
        store.trajectories()


def test_a_missing_or_truncated_start_is_refused_by_file(store):
    write_run(store)
    (run,) = store.trajectories()
    run.start_path.write_bytes(run.start_path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{run.start_path.name} is missing or truncated"):
        run.start()
    run.start_path.unlink()
    with pytest.raises(ValueError, match=rf"{run.start_path.name} is missing or truncated"):
        run.start()


def test_misfits_and_wrong_order_are_refused(store):
    writer = start(store)
    with pytest.raises(ValueError, match="step 10: 1 of 2 sites are missing"):
        writer.write(10, {"layers.0.q_proj": make_adapter(0)["layers.0.q_proj"]})
    with pytest.raises(ValueError, match="cannot finish at step 10, the last snapshot is at step 0"):
        writer.finish(10)
    writer.write(10, make_adapter(10))
    with pytest.raises(ValueError, match="last snapshot is at step 10; steps must grow"):
        writer.write(10, make_adapter(11))
    with pytest.raises(ValueError, match="cannot finish at step 40, the last snapshot is at step 10"):
        writer.finish(40)
    with pytest.raises(ValueError, match="snapshot dtype is 'int8'"):
        start(store, dtype="int8")
    with pytest.raises(ValueError, match="at least one planned step"):
        start(store, planned_steps=0)


def test_a_future_format_is_refused_by_version(store):
    write_run(store)
    manifest = store.path / "runs" / "tone-polite-s0" / "run.json"
    table = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**table, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=r"run\.json has format version 2, this ltdi_peft reads 1"):
        store.trajectories()
    (store.path / "store.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=r"store\.json has format version 2"):
        TrajectoryStore(store.path)


def test_only_stores_are_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no trajectory store"):
        TrajectoryStore(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"has no store\.json"):
        TrajectoryStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json cannot be read as JSON"):
        TrajectoryStore(tmp_path)


# ---- bytes and processes


@pytest.mark.parametrize("name", ["日本語", "!!!"])
def test_a_name_without_latin_letters_gets_a_folder_too(store, name):
    writer = start(store, task=Task(name, ("Translate.",)))
    assert writer.run_id.startswith("task-")
    assert store.find_runs(name, 0)[0].task.name == name


WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_store import TrajectoryStore, write_run, FROZEN
write_run(TrajectoryStore(sys.argv[2]))
"""


def test_same_bytes_under_three_hash_seeds(tmp_path):
    def tree(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        arguments = [sys.executable, "-c", WRITE, os.path.dirname(__file__), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env=environment)
        files = (p for p in (tmp_path / seed).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / seed)): p.read_bytes() for p in files}

    first, second, third = tree("0"), tree("1"), tree("2")
    assert len(first) == 7  # store.json, a start, run.json, four snapshots
    assert first == second == third


def _write_many(path, barrier):
    store = TrajectoryStore(path)
    barrier.wait()
    for _ in range(10):
        write_run(store, steps=(40,))


def test_two_processes_never_share_a_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write_many, args=(tmp_path / "s", barrier)) for _ in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(600)  # each imports transformers, on a machine that may be busy
        assert process.exitcode == 0
    runs = TrajectoryStore(tmp_path / "s").trajectories()
    assert len({run.run_id for run in runs}) == len(runs) == 20
    for run in runs:
        assert_same_adapter(run.adapter(run.snapshots[0]), make_adapter(40))
    assert not list((tmp_path / "s").rglob("*.partial"))
