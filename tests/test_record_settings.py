"""Recording in the kinds of training people do: gradient checkpointing, a 4-bit base, a bare Accelerate loop.

Plain Trainer, SFTTrainer and two processes are in test_record.py.
"""

import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ltdi_peft.adapter import read_adapter
from ltdi_peft.base import load_base
from ltdi_peft.four_bit import four_bit_layers
from ltdi_peft.record import Schedule, TrajectoryRecorder, record
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task

TASK = Task("tone", ("Rewrite politely.",))
STEPS = 4

pytestmark = [
    # trl 1.16 and transformers' own defaults set the old name of an option that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def store(tmp_path):
    return TrajectoryStore(tmp_path / "store")


def rows(count=32):
    ids = torch.randint(3, 64, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, callbacks=(), **more):
    about = {"output_dir": str(folder / "out"), "max_steps": STEPS, "per_device_train_batch_size": 2}
    about |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(**about, use_cpu=True, disable_tqdm=True, seed=3, **more)
    Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks)).train()
    return read_adapter(model)


def recorder(store, every=2):
    return TrajectoryRecorder(store, task=TASK, schedule=Schedule.every(every))


def assert_same_adapter(got, want):
    assert list(got) == list(want)
    for site, pair in want.items():
        assert all(torch.equal(x, y) for x, y in zip(got[site], pair, strict=True))


def assert_recorded(store, last, without):
    """One finished run that moves, ends at `last`, and left the training as it is `without` a recorder."""
    (run,) = store.trajectories()
    assert [s.step for s in run.snapshots] == [2, 4]
    assert all(s.loss is not None and s.loss == s.loss for s in run.snapshots)
    assert_same_adapter(run.adapter(run.snapshots[-1]), last)
    assert_same_adapter(last, without)
    earlier = run.adapter(run.snapshots[0])
    assert any(not torch.equal(earlier[site][1], last[site][1]) for site in last)
    return run


def test_gradient_checkpointing(store, tiny_peft, tmp_path):
    about = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = tiny_peft()
    last = train(model, tmp_path, [recorder(store)], **about)
    assert model.get_base_model().is_gradient_checkpointing
    assert_recorded(store, last, without=train(tiny_peft(), tmp_path, **about))


def four_bit_peft(world):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = load_base(str(world.base), dtype="float32", load_in_4bit=True)
        return get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_a_four_bit_base(store, world, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = four_bit_peft(world)
    assert len(four_bit_layers(model)) == 14
    last = train(model, tmp_path, [recorder(store)])
    run = assert_recorded(store, last, without=train(four_bit_peft(world), tmp_path))
    assert [(s.fan_in, s.fan_out) for s in run.spec.sites] == [(32, 32)] * 2


def accelerate_loop(model, recording):
    """Two batches an optimiser step; `recording` is a context manager's argument list, or None."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(16), batch_size=2))
    losses = []

    def steps():
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                losses.append(loss.item())
                yield loss

    if recording is None:
        list(steps())
        return losses
    with record(prepared, recording, TASK, total_steps=STEPS, schedule=Schedule.every(2)) as run:
        for loss in steps():
            run.step(loss, 1e-2)
    return losses


def test_a_bare_accelerate_loop_with_accumulation(store, tiny_peft):
    model, other = tiny_peft(), tiny_peft()
    losses = accelerate_loop(model, store)
    assert accelerate_loop(other, None) == losses
    run = assert_recorded(store, read_adapter(model), without=read_adapter(other))
    assert [s.loss for s in run.snapshots] == [losses[1], losses[3]]


def test_the_benchmark_measures_time_inside_the_recorder(world, capsys):
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "recorder_overhead.py"))
    small = ["--pairs=1", "--steps=4", "--every=2", "--length=6", "--model", str(world.base)]
    benchmark["main"](["--settings", "trainer", "accelerate", *small])
    cells = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [line[0] for line in cells[2:]] == ["trainer", "accelerate"]
    for _, step, _, calls, writing, snapshots in cells[2:]:
        assert float(step) > 0
        assert 0 < float(calls) < 100
        assert 0 < float(writing) < 100
        assert snapshots.startswith("2 × ")
