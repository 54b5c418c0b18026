"""LoRAs for all tasks: fair numbers of examples, the right answers or shuffled ones, made once."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, collected, tiny_task

from ltdi_peft import fit, multi_task
from ltdi_peft.baselines import adapter_digest, mean_accuracy
from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import shared_start
from ltdi_peft.fit_point import POINT_FILE, FitPoint
from ltdi_peft.multi_task import (
    multi_task_plan,
    shared_pool,
    shuffled,
    train_format_only,
    train_multi_task_lora,
    train_wide_multi_task_lora,
    wide_plan,
    widened,
)
from ltdi_peft.score import make_sheet
from ltdi_peft.spec import SpecMismatchError, check_adapter, require_same_spec
from ltdi_peft.task import Task


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("multi_task"))


def changed(bench, **fields):
    """The bench with other fields of `evaluate`."""
    return replace(bench, recipe=replace(bench.recipe, evaluate=replace(bench.recipe.evaluate, **fields)))


def never(*args, **kwargs):
    raise RuntimeError("trained again")


def answers_in(bench, pool):
    """Answers of the pool's rows, as text."""
    return [bench.base.tokenizer.decode(row.ids[row.answer : -1]) for row in pool.rows]


# ---- the multi-task LoRA


def test_plan_counts_the_examples_of_start_and_single_runs(bench):
    plan = multi_task_plan(bench, shared_start(bench, progress=False))
    # 5 tasks · 2 seeds · 6 steps · 4 examples = 240, in batches of 4; the start saw 4 · 4 before
    assert (plan["rule"], plan["fit"]["steps"], plan["examples"]) == (60, 60, 256)
    assert plan["fit"]["prompt_in_context"] == 1.0
    assert not plan["shortened"]
    plan = multi_task_plan(changed(bench, multi_task_steps=8), bench.fresh)
    assert (plan["rule"], plan["fit"]["steps"], plan["shortened"]) == (60, 8, True)


def test_multi_task_lora_keeps_its_best_and_is_made_once(bench, monkeypatch):
    monkeypatch.setattr(multi_task, "EVERY", 12)
    adapter, report = train_multi_task_lora(bench, progress=False)
    curve = report["curve"]
    assert [point["step"] for point in curve] == [0, 12, 24, 36, 48, 60]
    sheets = [
        make_sheet(bench.adapted, task.evaluation[:24], task.held_out_prompts)
        for task in bench.suite.split("validation")
    ]
    accuracy = mean_accuracy(bench, sheets, stack_adapters([adapter]))
    assert accuracy == max(point["accuracy"] for point in curve)
    monkeypatch.setattr(multi_task, "fit_multi_task", never)
    again, _ = train_multi_task_lora(bench, progress=False)
    assert adapter_digest(again) == adapter_digest(adapter)
    with pytest.raises(ValueError, match=r"another \['examples', 'fit', 'shortened'\].*Remove the folder"):
        train_multi_task_lora(changed(bench, multi_task_steps=8), progress=False)


def test_of_equal_scores_the_longest_trained_stands(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(multi_task, "mean_accuracy", lambda *args: 0.0)
    config = replace(bench.recipe.collect.multi_task, steps=2)
    about = {"name": "x", "progress": False}
    point = FitPoint(tmp_path / POINT_FILE, {})
    best, _ = multi_task.fit_multi_task(
        bench, bench.fresh, bench.suite.split("train"), config, point, **about
    )
    assert all(b.abs().max() > 0 for _, b in best.values())


class Stopped(Exception):
    """What a kill looks like from within."""


def stop_after(monkeypatch, module, name, calls):
    """The function of this name works `calls` times, then the program is stopped."""
    do, count = getattr(module, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] > calls:
            raise Stopped
        return do(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    bench = changed(collected(tmp_path / "run"), multi_task_steps=9)
    monkeypatch.setattr(multi_task, "EVERY", 2)
    whole, report = train_multi_task_lora(bench, progress=False)
    folder = bench.recipe.folder / "multi_task_lora"
    assert not (folder / POINT_FILE).exists()
    shutil.rmtree(folder)
    with monkeypatch.context() as patched:
        stop_after(patched, multi_task, "mean_accuracy", 4)  # at 0, 2, 4, 6: at 8 it is stopped
        with pytest.raises(Stopped):
            train_multi_task_lora(bench, progress=False)
    with pytest.raises(ValueError, match=r"unfinished.safetensors was written with another .*Remove it"):
        train_multi_task_lora(changed(bench, multi_task_steps=7), progress=False)
    with monkeypatch.context() as patched:
        stop_after(patched, multi_task, "mean_accuracy", 2)  # at 8 and 9 alone
        again, resumed = train_multi_task_lora(bench, progress=False)
    assert resumed == report
    assert adapter_digest(again) == adapter_digest(whole)
    assert not (folder / POINT_FILE).exists()


def test_an_interrupted_start_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    bench = collected(tmp_path / "run")
    whole, folder = shared_start(bench, progress=False), bench.recipe.folder / "start"
    shutil.rmtree(folder)
    # The package's name `collect` is the function.
    monkeypatch.setattr(sys.modules["ltdi_peft.collect"], "EVERY", 1)
    with monkeypatch.context() as patched:
        stop_after(patched, FitPoint, "save", 3)
        with pytest.raises(Stopped):
            shared_start(bench, progress=False)
    assert (folder / POINT_FILE).is_file()
    with monkeypatch.context() as patched:
        stop_after(patched, fit, "backward", 1)  # the fourth of four steps
        again = shared_start(bench, progress=False)
    assert adapter_digest(again) == adapter_digest(whole)
    assert not (folder / POINT_FILE).exists()


# ---- at four times the rank


def test_wide_adapter_has_4_times_the_rank_and_equal_scaling(bench):
    wide = widened(bench)
    for site, narrow in zip(wide.spec.sites, bench.spec.sites, strict=True):
        assert (site.name, site.rank, site.alpha) == (narrow.name, 4 * narrow.rank, 4 * narrow.alpha)
        assert site.scaling == narrow.scaling
    check_adapter(wide.spec, wide.fresh, "wide")
    with pytest.raises(SpecMismatchError, match="has rank 8, expected 2"):
        require_same_spec(bench.spec, wide.spec, "wide")
    assert wide.adapted.cut == bench.adapted.cut > 0  # one sheet's lower activations serve both


def test_wide_sees_as_many_examples_as_start_and_rival_together(bench):
    plan, narrow = wide_plan(widened(bench)), multi_task_plan(bench, bench.fresh)
    assert plan["fit"]["steps"] * plan["fit"]["batch_size"] == plan["examples"] == narrow["examples"] == 256
    assert (plan["rule"], plan["shortened"], plan["rank"], plan["alpha"]) == (64, False, 8, 16.0)
    short = wide_plan(widened(changed(bench, multi_task_steps=8)))
    assert (short["fit"]["steps"], short["rule"], short["shortened"]) == (12, 64, True)
    recipe = replace(bench.recipe, collect=replace(bench.recipe.collect, start="fresh"))
    assert wide_plan(widened(replace(bench, recipe=recipe)))["fit"]["steps"] == 60


def test_wide_trains_a_and_b_and_is_made_once(bench, monkeypatch):
    wide = widened(changed(bench, multi_task_steps=8))
    adapter, report = train_wide_multi_task_lora(wide, progress=False)
    check_adapter(wide.spec, adapter, "trained")
    for site, (a, b) in adapter.items():
        assert not torch.equal(a, wide.fresh[site][0])
        assert b.abs().max() > 0
    assert (report["rank"], report["steps"], report["examples"]) == (8, 12, 48)
    monkeypatch.setattr(multi_task, "fit_multi_task", never)
    again, _ = train_wide_multi_task_lora(wide, progress=False)
    assert adapter_digest(again) == adapter_digest(adapter)
    with pytest.raises(ValueError, match=r"multi_task_lora_4x was trained with another \['examples', 'fit'"):
        train_wide_multi_task_lora(widened(bench), progress=False)


# ---- the form alone


def test_shuffled_answers_are_a_permutation_by_seed_and_name():
    task = tiny_task("a/second/plain")
    one = shuffled(task, 8, seed=0)
    true, moved = ([e.answer for e in examples] for examples in (task.train[:8], one.train))
    assert sorted(moved) == sorted(true)
    assert moved != true
    assert [e.input for e in one.train] == [e.input for e in task.train[:8]]
    assert (one.prompts, one.evaluation) == (task.prompts, ())
    assert one == shuffled(task, 8, seed=0)
    assert one != shuffled(task, 8, seed=1)
    other = shuffled(Task("another", task.prompts, train=task.train), 8, seed=0)
    assert [e.answer for e in other.train] != moved


def test_format_only_is_trained_on_shuffled_rows(bench, monkeypatch):
    pools = []

    def watched(*args, **kwargs):
        pools.append(shared_pool(*args, **kwargs))
        return pools[-1]

    monkeypatch.setattr(multi_task, "shared_pool", watched)
    _, report = train_format_only(bench, progress=False)
    assert (report["steps"], report["examples"]) == (4, 16)
    config = bench.recipe.collect.multi_task
    true = shared_pool(bench, bench.suite.split("train"), config, progress=False)
    (pool,) = pools
    got, wanted = answers_in(bench, pool), answers_in(bench, true)
    assert got != wanted
    questions = [[row.ids[: row.answer] for row in one.rows] for one in (pool, true)]
    assert questions[0] == questions[1]
    assert bool(pool.plain) == (config.prompt_in_context < 1)
    names = list(SPLITS["train"])
    tasks = [shuffled(bench.suite[name], bench.recipe.collect.rows, bench.recipe.seed) for name in names]
    assert got == answers_in(bench, shared_pool(bench, tasks, config, progress=False))


def test_format_only_is_made_once_and_by_one_plan(bench, monkeypatch):
    adapter, _ = train_format_only(bench, progress=False)
    check_adapter(bench.spec, adapter, "format_only")
    assert (bench.recipe.folder / "format_only" / "curve.json").is_file()
    monkeypatch.setattr(multi_task, "fit_multi_task", never)
    again, _ = train_format_only(bench, progress=False)
    assert adapter_digest(again) == adapter_digest(adapter)
    with pytest.raises(ValueError, match=r"format_only was trained with another \['seed'\]"):
        train_format_only(replace(bench, recipe=replace(bench.recipe, seed=1)), progress=False)
