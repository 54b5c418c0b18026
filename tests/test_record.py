import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from ltdi_peft.adapter import UnsupportedAdapterError, live_factors, read_adapter
from ltdi_peft.record import Schedule, TrajectoryRecorder, record
from ltdi_peft.recording import MAX_WAITING, kept_steps, require_plan
from ltdi_peft.store import RunWriter, TrajectoryStore
from ltdi_peft.task import Task

TASK = Task("tone", ("Rewrite politely.",), "style")

# Trainer's own checkpoints make PEFT look for the base model's files; tests are offline.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in tiny/llama:UserWarning:peft")


def assert_same_adapter(got, expected):
    assert list(got) == list(expected)
    for site, (a, b) in expected.items():
        assert torch.equal(got[site][0], a)
        assert torch.equal(got[site][1], b)


def differs(one, other):
    return any(not torch.equal(x, y) for site in one for x, y in zip(one[site], other[site], strict=True))


def rows(count=64):
    ids = torch.randint(3, 64, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class FailAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power went out")


@pytest.fixture
def make_trainer(tiny_peft, tmp_path):
    def build(*callbacks, model=None, eval_dataset=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        return Trainer(
            model=model or tiny_peft(),
            args=TrainingArguments(**{**defaults, **arguments}),
            train_dataset=rows(),
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )

    return build


@pytest.fixture
def store(tmp_path):
    return TrajectoryStore(tmp_path / "store")


def recorder_for(store, n=2, **settings):
    return TrajectoryRecorder(store, task=TASK, **{"schedule": Schedule.every(n), **settings})


# ---- schedules


def test_schedules_keep_what_they_say():
    assert kept_steps(Schedule.every(3), 10) == {3, 6, 9, 10}
    assert kept_steps(Schedule.equal_parts(4), 10) == {2, 5, 8, 10}
    assert kept_steps(Schedule.equal_parts(4), 3) == {1, 2, 3}
    assert kept_steps(Schedule.log_spaced(5), 16) == {1, 2, 4, 8, 16}
    assert kept_steps(Schedule.log_spaced(3, first=4), 100) == {4, 20, 100}
    assert kept_steps(Schedule.log_spaced(3, first=4), 2) == {2}
    assert Schedule.every(3).keeps(10, 10)
    assert not Schedule.every(3).keeps(4, 10)


@pytest.mark.parametrize("k", [1, 3, 7, 16])
def test_equal_parts_give_k_different_steps_nearest_to_their_progress(k):
    for planned in range(k, 200, 7):
        steps = sorted(kept_steps(Schedule.equal_parts(k), planned))
        assert len(steps) == k
        assert all(abs(step - (j + 1) * planned / k) <= 0.5 for j, step in enumerate(steps))


def test_schedules_refuse_nonsense():
    with pytest.raises(ValueError, match="has positive whole numbers"):
        Schedule.every(0)
    with pytest.raises(ValueError, match="has positive whole numbers"):
        Schedule.log_spaced(3, first=0)
    with pytest.raises(ValueError, match=r"of \['every', 'log_spaced', 'equal_parts'\].*'evry'"):
        Schedule("evry", 3)


# ---- Trainer


def test_snapshot_k_is_an_independent_run_stopped_at_k(store, make_trainer, tiny_peft):
    trainer = make_trainer(recorder_for(store))
    trainer.train()
    (run,) = store.trajectories()
    assert [(s.step, s.progress) for s in run.snapshots] == [(2, 2 / 6), (4, 4 / 6), (6, 1.0)]
    assert (run.seed, run.task, run.finished) == (3, TASK, True)
    assert_same_adapter(run.start(), read_adapter(tiny_peft()))
    for snapshot in run.snapshots:
        other = make_trainer(max_steps=snapshot.step)
        other.train()
        assert_same_adapter(run.adapter(snapshot), read_adapter(other.model))


def test_no_two_snapshots_are_the_same_weights(store, make_trainer):
    make_trainer(recorder_for(store, 1)).train()
    (run,) = store.trajectories()
    adapters = [run.start(), *(run.adapter(s) for s in run.snapshots)]
    assert len(adapters) == 7
    assert all(differs(adapters[i], adapters[j]) for i in range(7) for j in range(i))


def test_recording_changes_nothing_in_the_training(store, make_trainer):
    with_recorder, without = make_trainer(recorder_for(store, 1)), make_trainer()
    with_recorder.train()
    without.train()
    assert_same_adapter(read_adapter(with_recorder.model), read_adapter(without.model))


def test_loss_and_learning_rate_are_those_of_the_step(store, make_trainer):
    trainer = make_trainer(recorder_for(store, 1), lr_scheduler_type="linear")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    (run,) = store.trajectories()
    assert [s.loss for s in run.snapshots] == [entry["loss"] for entry in logs]
    assert [s.learning_rate for s in run.snapshots] == [entry["learning_rate"] for entry in logs]
    assert run.snapshots[0].learning_rate == 1e-2


def test_between_logs_the_loss_is_that_of_the_newest_window(store, make_trainer):
    trainer = make_trainer(recorder_for(store, 1), logging_steps=3)
    trainer.train()
    third, sixth = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    (run,) = store.trajectories()
    assert [s.loss for s in run.snapshots] == [None, None, third, third, third, sixth]


def test_gradient_accumulation_counts_optimiser_steps(store, make_trainer):
    make_trainer(recorder_for(store, 1), gradient_accumulation_steps=3, max_steps=3).train()
    (run,) = store.trajectories()
    assert [s.step for s in run.snapshots] == [1, 2, 3]
    other = make_trainer(gradient_accumulation_steps=3, max_steps=2)
    other.train()
    assert_same_adapter(run.adapter(run.snapshots[1]), read_adapter(other.model))


def test_a_second_train_is_a_second_run(store, make_trainer):
    trainer = make_trainer(recorder_for(store), max_steps=4)
    trainer.train()
    trainer.train()
    first, second = store.trajectories()
    assert [s.step for s in first.snapshots] == [s.step for s in second.snapshots] == [2, 4]
    assert_same_adapter(second.start(), first.adapter(first.snapshots[-1]))


def test_a_resumed_training_goes_on_with_its_own_run(store, make_trainer, tmp_path):
    make_trainer(recorder_for(store, 1)).train()  # never interrupted, for comparison
    settings = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "resumed")}
    make_trainer(recorder_for(store, 1), StopAt(5), **settings).train()
    make_trainer(recorder_for(store, 1), **settings).train(resume_from_checkpoint=True)  # from step 4
    whole, resumed = store.trajectories()
    assert [s.step for s in resumed.snapshots] == [s.step for s in whole.snapshots] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole.snapshots, resumed.snapshots, strict=True):
        assert_same_adapter(resumed.adapter(other), whole.adapter(one))
    assert sorted(p.name for p in (resumed.path / "superseded-1").iterdir()) == [
        "run.json",
        "step-00000005.safetensors",
    ]


def test_a_resume_without_its_run_is_refused(store, make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **settings).train()
    with pytest.raises(ValueError, match=r"resumes at step 2, but .* holds no run of task 'tone', seed 3"):
        make_trainer(recorder_for(store), **settings).train(resume_from_checkpoint=True)


def test_early_stop_between_scheduled_steps_keeps_the_step_it_stopped_at(store, make_trainer):
    trainer = make_trainer(recorder_for(store, 2), StopAt(3))
    trainer.train()
    (run,) = store.trajectories()
    assert [(s.step, s.progress) for s in run.snapshots] == [(2, 2 / 3), (3, 1.0)]
    assert_same_adapter(run.adapter(run.snapshots[-1]), read_adapter(trainer.model))
    assert run.snapshots[-1].loss is not None
    assert run.snapshots[-1].learning_rate == 1e-2


def test_the_last_step_is_not_the_best_step_that_trainer_loads_at_the_end(store, make_trainer):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    trainer = make_trainer(recorder_for(store, 2), StopAt(3), eval_dataset=rows(4), **best)
    trainer.train()
    assert trainer.state.best_global_step < 3  # of random answers the loss grows
    last = make_trainer(max_steps=3)
    last.train()
    (run,) = store.trajectories()
    assert run.snapshots[-1].step == 3
    assert_same_adapter(run.adapter(run.snapshots[-1]), read_adapter(last.model))
    assert differs(run.adapter(run.snapshots[-1]), read_adapter(trainer.model))


def test_no_step_at_all_is_an_interrupted_run(store, make_trainer, tiny_peft):
    recorder, trainer = recorder_for(store), make_trainer()
    everything = trainer.args, trainer.state, trainer.control
    trainer.state.max_steps = 6
    recorder.on_train_begin(*everything, model=trainer.model)
    recorder.on_train_end(*everything)
    (run,) = store.trajectories(finished_only=False)
    assert run.status == "interrupted"


def wait_for_snapshots(store, steps):
    """The writing thread may be a moment behind an exception that nobody told it of."""
    for _ in range(200):
        (run,) = store.trajectories(finished_only=False)[:1]
        if [s.step for s in run.snapshots] == steps:
            return run
        time.sleep(0.05)
    raise AssertionError(f"snapshots are {[s.step for s in run.snapshots]}, expected {steps}")


def test_a_crash_leaves_what_was_finished_and_the_next_train_notes_it(store, make_trainer):
    recorder = recorder_for(store, 1)
    crash = FailAt(4)
    trainer = make_trainer(recorder, crash)
    with pytest.raises(RuntimeError, match="power"):
        trainer.train()
    run = wait_for_snapshots(store, [1, 2, 3])  # step 4 waited for its loss, which never came
    assert run.status == "recording"
    assert store.trajectories() == []
    assert differs(run.adapter(run.snapshots[0]), run.adapter(run.snapshots[2]))
    trainer.remove_callback(crash)
    trainer.train()
    crashed, again = store.trajectories(finished_only=False)
    assert (crashed.status, again.status) == ("interrupted", "finished")
    assert "again" in crashed.about["interrupted_by"]


def test_nan_stops_the_training_with_run_site_and_step(store, make_trainer):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 3:
                next(iter(live_factors(model).values()))[1].data[0, 0] = torch.nan

    trainer = make_trainer(recorder_for(store, 1), Spoil(), max_steps=60)
    with pytest.raises(
        ValueError, match=r"run tone-s3, step 4: site model\.layers\.0\.self_attn\.q_proj, lora_[AB]"
    ):
        trainer.train()
    assert trainer.state.global_step < 60
    (run,) = store.trajectories(finished_only=False)
    assert [s.step for s in run.snapshots][:3] == [1, 2, 3]
    assert all(s.step < 4 for s in run.snapshots)


def test_a_slow_disk_makes_training_wait_and_loses_nothing(store, make_trainer, monkeypatch):
    write, longest = RunWriter.write, []
    recorder = recorder_for(store, 1)

    def slow_write(self, *arguments):
        longest.append(len(recorder._recording._waiting) if recorder._recording else 0)
        time.sleep(0.05)
        return write(self, *arguments)

    monkeypatch.setattr(RunWriter, "write", slow_write)
    make_trainer(recorder, max_steps=12).train()
    assert max(longest) <= MAX_WAITING
    assert len(store.trajectories()[0].snapshots) == 12


def test_a_failing_disk_is_told_at_the_end_at_the_latest(store, make_trainer, monkeypatch):
    def fail(self, *arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(RunWriter, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        make_trainer(recorder_for(store, 6)).train()
    assert store.trajectories() == []


def test_a_last_write_that_fails_leaves_a_run_that_says_so(store, make_trainer, tiny_peft, monkeypatch):
    """Whoever records: the run is interrupted, not "recording" for good, and its error is the write's."""
    write = RunWriter.write

    def fail_at_the_end(self, step, *arguments):
        if step == 6:
            raise OSError("no space left on device")
        return write(self, step, *arguments)

    def loop():
        model = tiny_peft()
        with record(model, store, TASK, total_steps=6, schedule=Schedule.every(2)) as run:
            for loss in steps_of(model, 6):
                run.step(loss)

    monkeypatch.setattr(RunWriter, "write", fail_at_the_end)
    for train in (loop, make_trainer(recorder_for(store)).train):
        with pytest.raises(OSError, match="no space left"):
            train()
    runs = store.trajectories(finished_only=False)
    assert [run.status for run in runs] == ["interrupted"] * 2
    assert all("no space left" in run.about["interrupted_by"] for run in runs)
    assert [[s.step for s in run.snapshots] for run in runs] == [[2, 4]] * 2


def test_what_cannot_be_recorded_is_refused_before_training(store, tiny_peft):
    for plan, message in (
        (("polite", Schedule.every(2), "float32"), r"task is 'polite'; expected ltdi_peft\.Task"),
        ((TASK, 100, "float32"), r"schedule is 100; expected ltdi_peft\.Schedule"),
        ((TASK, Schedule.every(2), "int8"), "snapshot_dtype is 'int8'; known are"),
    ):
        with pytest.raises(ValueError, match=message):
            require_plan(*plan)
    with pytest.raises(ValueError, match="snapshot_dtype is 'int8'"):
        recorder_for(store, snapshot_dtype="int8")
    with (
        pytest.raises(ValueError, match="snapshot_dtype is 'int8'"),
        record(tiny_peft(), store, TASK, total_steps=3, snapshot_dtype="int8"),
    ):
        pytest.fail("training began")
    assert store.trajectories(finished_only=False) == []


def test_unsupported_training_is_refused_at_its_beginning(store, make_trainer, tiny_base, tiny_peft):
    with pytest.raises(
        UnsupportedAdapterError, match="only a PeftModel can be recorded, got LlamaForCausalLM"
    ):
        make_trainer(recorder_for(store), model=tiny_base()).train()
    with pytest.raises(UnsupportedAdapterError, match="modules_to_save"):
        make_trainer(recorder_for(store), model=tiny_peft(modules_to_save=["lm_head"])).train()
    assert store.trajectories(finished_only=False) == []


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_refused(store, tiny_peft, one_process_group):
    shard = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants a GPU
    torch.nn.Module.__init__(shard)
    first = tiny_peft()
    first.add_module("shard", shard)
    second = tiny_peft()
    fully_shard(second, mesh=init_device_mesh("cpu", (1,)))
    for model, message in [(first, "recording under FSDP"), (second, r"DTensor.*Sharded weights")]:
        with pytest.raises(UnsupportedAdapterError, match=message), record(model, store, TASK, total_steps=1):
            pass
    assert store.trajectories(finished_only=False) == []


def test_only_process_zero_writes(tmp_path, make_trainer):
    trainer = make_trainer()
    recorder = recorder_for(tmp_path / "never")
    everything = trainer.args, trainer.state, trainer.control
    trainer.state.is_world_process_zero = False
    recorder.on_train_begin(*everything, model=trainer.model)
    recorder.on_step_end(*everything)
    recorder.on_epoch_end(*everything)
    recorder.on_train_end(*everything)
    assert recorder.run_id is None
    assert not (tmp_path / "never").exists()


# ---- bare loops


def steps_of(model, count, seed=0):
    """A plain loop: yields the loss after every optimiser step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, 64, (2, 6), generator=rng)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def test_a_bare_loop_records_steps_losses_and_rates(store, tiny_peft):
    model = tiny_peft()
    losses = []
    with record(model, store.path, TASK, total_steps=5, seed=9, schedule=Schedule.every(2)) as run:
        for loss in steps_of(model, 5):
            run.step(loss, learning_rate=0.5)
            losses.append(loss.item())
    (saved,) = store.trajectories()
    assert saved.run_id == run.run_id == "tone-s9"
    assert [s.step for s in saved.snapshots] == [2, 4, 5]
    assert [s.loss for s in saved.snapshots] == [losses[1], losses[3], losses[4]]
    assert {s.learning_rate for s in saved.snapshots} == {0.5}
    assert_same_adapter(saved.start(), read_adapter(tiny_peft()))
    assert_same_adapter(saved.adapter(saved.snapshots[-1]), read_adapter(model))
    other = tiny_peft()
    list(steps_of(other, 2))
    assert_same_adapter(saved.adapter(saved.snapshots[0]), read_adapter(other))


def test_a_loop_that_leaves_early_ends_there(store, tiny_peft):
    model = tiny_peft()
    with record(model, store, TASK, total_steps=100, schedule=Schedule.every(2)) as run:
        for _ in steps_of(model, 3):
            run.step()
    (saved,) = store.trajectories()
    assert [(s.step, s.progress) for s in saved.snapshots] == [(2, 2 / 3), (3, 1.0)]


def test_a_loop_that_never_steps_is_told(store, tiny_peft):
    model = tiny_peft()
    recording = record(model, store, TASK, total_steps=3)
    with pytest.warns(UserWarning, match=r"run\.step\(\) was never called"), recording:
        pass
    (saved,) = store.trajectories(finished_only=False)
    assert saved.status == "interrupted"


def test_a_loss_of_several_numbers_is_refused_by_shape(store, tiny_peft):
    with (
        pytest.raises(ValueError, match=r"step 1: loss has shape \(3,\); expected one number"),
        record(tiny_peft(), store, TASK, total_steps=3) as run,
    ):
        run.step(torch.zeros(3))


def test_an_exception_flushes_and_marks_the_run(store, tiny_peft):
    model = tiny_peft()

    def train():
        with record(model, store, TASK, total_steps=9, schedule=Schedule.every(1)) as run:
            for loss in steps_of(model, 3):
                run.step(loss)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    (saved,) = store.trajectories(finished_only=False)
    assert (saved.status, saved.about["interrupted_by"]) == ("interrupted", "KeyboardInterrupt: ")
    assert [s.step for s in saved.snapshots] == [1, 2, 3]


def test_a_bare_loop_goes_on_where_it_was_cut(store, tiny_peft):
    model = tiny_peft()
    settings = {"total_steps": 6, "schedule": Schedule.every(1)}
    with record(model, store, TASK, **settings) as run:
        for _ in steps_of(model, 3):
            run.step()
    with record(model, store, TASK, start_step=3, **settings) as run:
        for _ in steps_of(model, 3, seed=1):
            run.step()
    (saved,) = store.trajectories()
    assert [s.step for s in saved.snapshots] == [1, 2, 3, 4, 5, 6]
    assert_same_adapter(saved.adapter(saved.snapshots[-1]), read_adapter(model))
    with (
        pytest.raises(ValueError, match="holds no run of task 'tone', seed 5"),
        record(model, store, TASK, seed=5, start_step=3, **settings),
    ):
        pass


def test_an_untrained_a_is_stored_once(store, tiny_peft):
    model = tiny_peft()
    for a, _ in live_factors(model).values():
        a.requires_grad_(False)
    with record(model, store, TASK, total_steps=2, schedule=Schedule.every(1)) as run:
        for _ in steps_of(model, 2):
            run.step()
    (saved,) = store.trajectories()
    assert saved.frozen == tuple(f"{site}.lora_A" for site in live_factors(model))
    assert_same_adapter(saved.adapter(saved.snapshots[-1]), read_adapter(model))


# ---- whole programs


def run_program(folder, *arguments, launcher=(), check=True):
    file = folder / "program.py"
    command = [sys.executable, *launcher, str(file), *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=300)


PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_base, tiny_peft
from test_record import *
build_base = tiny_base.__wrapped__()
build_peft = tiny_peft.__wrapped__(build_base)
make_trainer = make_trainer.__wrapped__(build_peft, Path(sys.argv[1]))
"""


def write_program(folder, body):
    head = PROGRAM.format(tests=str(Path(__file__).parent))
    (folder / "program.py").write_text(head + textwrap.dedent(body))


def test_a_killed_process_leaves_readable_snapshots(tmp_path, store):
    body = """
        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 40:
                    os._exit(9)
        make_trainer(recorder_for(sys.argv[1] + "/store", 1), Kill(), max_steps=60).train()
        """
    write_program(tmp_path, body)
    assert run_program(tmp_path, tmp_path, check=False).returncode == 9
    (run,) = store.trajectories(finished_only=False)
    assert run.status == "recording"
    steps = [s.step for s in run.snapshots]
    # Up to MAX_WAITING copies and the one that waits for its loss die with the process.
    assert steps == list(range(1, len(steps) + 1))
    assert 39 - MAX_WAITING <= len(steps) < 40
    assert differs(run.start(), run.adapter(run.snapshots[-1]))


def test_an_uncaught_exception_still_writes_what_was_in_line(tmp_path, store):
    body = "make_trainer(recorder_for(sys.argv[1] + '/store', 1), FailAt(4)).train()"
    write_program(tmp_path, body)
    outcome = run_program(tmp_path, tmp_path, check=False)
    assert "the power went out" in outcome.stderr
    (run,) = store.trajectories(finished_only=False)
    assert [s.step for s in run.snapshots] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_write_one_run(tmp_path, store):
    body = """
        trainer = make_trainer(recorder_for(sys.argv[1] + "/store", 1), ddp_backend="gloo")
        assert trainer.args.world_size == 2
        trainer.train()
        trainer.accelerator.end_training()  # ends the process group, whose threads may abort an exit
        """
    write_program(tmp_path, body)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    outcome = run_program(tmp_path, tmp_path, launcher=launcher, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (run,) = store.trajectories(finished_only=False)
    assert run.finished
    assert [s.step for s in run.snapshots] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
# trl 1.16's SFTConfig sets the old name of an option that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer_records(store, tiny_base, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", eos_token="2")

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        model=tiny_base(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        callbacks=[recorder_for(store, 2)],
    )
    trainer.train()
    (run,) = store.trajectories()
    assert [s.step for s in run.snapshots] == [2, 4]
    assert_same_adapter(run.adapter(run.snapshots[-1]), read_adapter(trainer.model))
    assert run.spec.base_model == "tiny/llama"
