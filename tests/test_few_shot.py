"""The few-shot ladder and the curve: what they read, what they keep, and where they begin."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import collected, untrained_generator

from ltdi_peft import curve as curve_room
from ltdi_peft import few_shot
from ltdi_peft.baselines import adapter_digest, final_adapter
from ltdi_peft.batched import stack_adapters, unstack_adapter
from ltdi_peft.collect import run_seed
from ltdi_peft.config import FitConfig
from ltdi_peft.curve import curve, curve_points, curve_row, ends_of, steps_to
from ltdi_peft.few_shot import (
    METHODS,
    ORIGINS,
    FewShot,
    Fit,
    accuracies,
    candidate,
    in_each,
    ladder,
    ladder_adapters,
)
from ltdi_peft.fit import fit_steps, make_pool
from ltdi_peft.kept import kept_lines, whole_lines
from ltdi_peft.score import make_sheet, score
from ltdi_peft.store import TrajectoryStore

ONE_RATE = dict.fromkeys(ORIGINS, (3e-2,))
NAMES = ("a/second/twice", "b/second/plain")  # unseen tasks


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("few_shot"))


@pytest.fixture(scope="module")
def generator(bench):
    return untrained_generator(bench)


@pytest.fixture
def few(bench, generator, tmp_path):
    """Two counts, one rate, two steps."""
    start = TrajectoryStore(bench.recipe.store_folder).trajectories()[0].start()
    sizes = {"counts": (2, 4), "steps": 2, "batch_size": 2, "examples": 4, "validation_examples": 4}
    return FewShot(bench, generator, start, tmp_path / "kept", rates=ONE_RATE, in_context=True, **sizes)


@pytest.fixture
def tasks(bench):
    return [bench.suite[name] for name in NAMES]


@pytest.fixture(scope="module")
def oracles(bench):
    runs = TrajectoryStore(bench.recipe.held_out_folder).trajectories()
    return {run.task.name: final_adapter(run) for run in runs}


def fits(few, rate=3e-2):
    return {f"{n}/{m}": Fit(m, n, rate) for n in few.counts for m in ORIGINS}


def digests(few, task):
    (made,) = ladder_adapters(few, [task], fits(few))
    return {key: adapter_digest(own["prompt"]) for key, own in made.items()}


def with_example(task, index):
    """The task with another answer to training example `index`."""
    other = replace(task.train[index], answer="w9 w9", choices=())
    train = [*task.train[:index], other, *task.train[index + 1 :]]
    return type(task)(**{**vars(task), "train": train})


def no_more(monkeypatch, room, name):
    monkeypatch.setattr(room, name, lambda *args, **options: pytest.fail(f"{name} was called again"))


# ---- what is read


def test_only_the_first_n_examples_are_read(few, tasks):
    few, task = replace(few, counts=(2,)), tasks[0]
    before = digests(few, task)
    assert set(before) == {f"2/{m}" for m in METHODS}
    assert digests(few, with_example(task, 2)) == before
    after = digests(few, with_example(task, 1))
    assert [key for key in before if before[key] != after[key]] == [f"2/{m}" for m in ORIGINS]


def test_more_examples_are_read_by_a_larger_count(few, tasks):
    task = tasks[0]
    before, after = digests(few, task), digests(few, with_example(task, 3))
    changed = [key for key in before if before[key] != after[key]]
    assert changed == [f"4/{m}" for m in ORIGINS]


def test_roads_begin_where_they_say(few, tasks):
    """A rate that moves nothing leaves the origin."""
    (made,) = ladder_adapters(few, tasks[:1], fits(few, rate=1e-30))
    found = accuracies(few, tasks[0], made, few.examples)
    origin = {
        "lora": in_each(few.bench.fresh),
        "lora_from_start": in_each(few.start),
        "refined": made["4/best_of"],
    }
    for method, own in origin.items():
        adapter = own["prompt"]
        for site, (a, b) in made[f"4/{method}"]["prompt"].items():
            assert torch.equal(a, adapter[site][0])
            assert (b - adapter[site][1]).abs().max() < 1e-25  # an entry that was 0 moves by the rate
    assert found["2/refined"]["prompt"] == found["2/best_of"]["prompt"]
    assert adapter_digest(made["4/lora"]["prompt"]) != adapter_digest(made["4/lora_from_start"]["prompt"])


def test_what_is_refined_is_what_the_examples_chose(few, tasks, monkeypatch):
    monkeypatch.setattr(few_shot, "CANDIDATES", ((0, None), (1, -20.0), (2, 20.0)))
    pick = lambda few, offered, pool, context: offered[len(pool.plain) // 2]  # noqa: E731
    monkeypatch.setattr(few_shot, "best_of", pick)
    (made,) = ladder_adapters(few, tasks[:1], fits(few, rate=1e-30))
    offered = [candidate(few, tasks[0], "prompt", *one) for one in few_shot.CANDIDATES]
    for count, place in ((2, 1), (4, 2)):
        (site,) = list(offered[place])[:1]
        moved = made[f"{count}/refined"]["prompt"][site][1] - offered[place][site][1]
        assert moved.abs().max() < 1e-25
    assert not torch.equal(offered[1][site][1], offered[2][site][1])


def test_the_best_candidate_has_the_least_loss(few, tasks, monkeypatch):
    """Of candidates that differ, by the examples' loss; with one candidate it is the generated adapter."""
    scales = ((0, None), (1, -20.0), (2, 20.0))
    monkeypatch.setattr(few_shot, "CANDIDATES", scales)
    (made,) = ladder_adapters(few, tasks[:1], {})
    adapted, first = few.bench.adapted, tasks[0].train[:2]
    for context, prompts in (("prompt", tasks[0].prompts), ("no_prompt", None)):
        adapters = [candidate(few, tasks[0], context, *one) for one in scales]
        losses = score(adapted, make_sheet(adapted, first, prompts), stack_adapters(adapters)).loss.mean(1)
        assert losses.max() - losses.min() > 1e-3
        found = adapter_digest(made["2/best_of"][context])
        assert found == adapter_digest(adapters[int(losses.argmin())])
    monkeypatch.setattr(few_shot, "CANDIDATES", scales[:1])
    (made,) = ladder_adapters(few, tasks[:1], {})
    assert adapter_digest(made["2/best_of"]["prompt"]) == adapter_digest(made["2/generated"]["prompt"])


def test_grouping_changes_only_the_rounding(few, tasks):
    together = ladder_adapters(few, tasks, fits(few))
    for task, one in zip(tasks, together, strict=True):
        (alone,) = ladder_adapters(few, [task], fits(few))
        for key, own in one.items():
            for site, pair in own["prompt"].items():
                for x, y in zip(pair, alone[key]["prompt"][site], strict=True):
                    # AdamW turns a gradient of pure rounding into a step of the rate, 3e-2
                    assert ((x - y).abs() > 1e-5).float().mean() < 0.02


# ---- the table, and what is kept


def test_the_table_and_its_resumption(few, tasks, monkeypatch):
    found = ladder(few, tasks, [], progress=False)
    assert list(found) == ["2", "4"]
    assert list(found["4"]) == [*METHODS, "start_in_context"]
    row = found["4"]["refined"]
    assert row["learning_rate"] == 3e-2
    assert set(row["per_task"]) == set(NAMES)
    means = [sum(one[k] for one in row["per_task"].values()) / 2 for k in ("accuracy", "accuracy_no_prompt")]
    assert [row["accuracy"], row["accuracy_no_prompt"]] == pytest.approx(means, abs=1e-6)
    sheet = make_sheet(few.bench.adapted, tasks[0].evaluation[:4], tasks[0].held_out_prompts)
    generated = stack_adapters([candidate(few, tasks[0], "prompt", 0, None)])
    want = score(few.bench.adapted, sheet, generated).accuracy.item()
    assert found["2"]["generated"]["per_task"][NAMES[0]]["accuracy"] == want
    # A killed run: one line whole, one cut.
    (file,) = (one for one in few.folder.glob("*.jsonl") if b"refined" in one.read_bytes())
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:9])
    asked, whole = [], ladder_adapters
    with monkeypatch.context() as patch:
        spy = lambda few, group, fits: asked.extend(t.name for t in group) or whole(few, group, fits)  # noqa: E731
        patch.setattr(few_shot, "ladder_adapters", spy)
        assert set(ladder(few, tasks, [], progress=False)["2"]["lora"]["per_task"]) == set(NAMES)
    assert asked == [NAMES[1]]
    no_more(monkeypatch, few_shot, "ladder_adapters")
    assert ladder(few, tasks, [], progress=False)["4"]["lora"]["per_task"] == found["4"]["lora"]["per_task"]
    with pytest.raises(pytest.fail.Exception, match="called again"):
        ladder(replace(few, steps=3), tasks, [], progress=False)
    assert list(ladder(replace(few, in_context=False), tasks, [], progress=False)["4"]) == list(METHODS)


def test_examples_in_context_stand_there_solved(few, tasks):
    found = few_shot.in_context(few, tasks, progress=False)
    start, task = stack_adapters([few.start]), tasks[1]
    for count in few.counts:
        for context, prompts in (("prompt", task.held_out_prompts), ("no_prompt", None)):
            shots = task.train[:count]
            sheet = make_sheet(few.bench.adapted, task.evaluation[:4], prompts, shots=shots)
            want = score(few.bench.adapted, sheet, start).accuracy.item()
            assert found[task.name][f"{count}/start_in_context"][context] == pytest.approx(want, abs=1e-6)


def test_gains_by_hand():
    def row(*accuracy):
        return {"per_task": {n: {"accuracy": a} for n, a in zip("pq", accuracy, strict=True)}}

    rungs = {"4": {"best_of": row(0.5, 0.7), "lora": row(0.4, 0.6)}}
    ends = {n: {"base": {"prompt": 0.1}, "oracle": {"prompt": 0.9}} for n in "pq"}
    found = few_shot.with_gains(rungs, ends, draws=100, seed=0)["4"]
    assert found["best_of"]["G"] == pytest.approx(1.0 / 1.6, abs=1e-6)
    assert found["best_of"]["over_lora"] == pytest.approx(0.1, abs=1e-6)
    assert found["best_of"]["over_lora_ci"] == pytest.approx([0.1, 0.1], abs=1e-6)  # 0.1 in either task
    assert found["best_of"]["ci"] == pytest.approx([0.5, 0.75], abs=1e-6)
    assert found["lora"]["over_lora"] == 0


def test_a_changed_task_is_measured_anew(tmp_path, tasks):
    made = []

    def make(group):
        made.extend(task.name for task in group)
        return [{"x": {"prompt": 0.5}} for _ in group]

    def kept(keys):
        file, table = tmp_path / "a" / "b.jsonl", dict(zip(NAMES, keys, strict=True))
        return kept_lines(file, tasks, table, make, together=1, desc="", progress=False)

    assert set(kept("pq")) == set(NAMES)
    assert kept("pr")[NAMES[1]] == {"x": {"prompt": 0.5}}
    assert made == [*NAMES, NAMES[1]]
    assert len(whole_lines(tmp_path / "a" / "b.jsonl")) == 3
    assert whole_lines(tmp_path / "none.jsonl") == []


def test_rates_are_chosen_on_validation_tasks(few, bench, monkeypatch):
    few = replace(few, counts=(2,), rates={**ONE_RATE, "refined": (1e-30, 3e-2)})
    validation = bench.suite.split("validation")
    better = {"2/refined/1e-30": 0.25, "2/refined/0.03": 0.75}

    def fake(few, task, made, examples, contexts):
        assert (examples, contexts) == (4, ("prompt",))
        return {key: {"prompt": better.get(key, 0.5)} for key in made}

    monkeypatch.setattr(few_shot, "accuracies", fake)
    found = few_shot.chosen_rates(few, validation, progress=False)
    tried = {"1e-30": 0.25, "0.03": 0.75}
    assert found["2/refined"] == {"learning_rate": 3e-2, "validation_accuracy": tried}
    assert found["2/lora"] == {"learning_rate": 3e-2, "validation_accuracy": {"0.03": 0.5}}
    better.update(dict.fromkeys(better, 0.5))
    few = replace(few, folder=few.folder / "other")
    assert few_shot.chosen_rates(few, validation, progress=False)["2/refined"]["learning_rate"] == 1e-30


def test_refusals(few, tasks):
    with pytest.raises(ValueError, match="has 12 training and 12 evaluation examples"):
        ladder(replace(few, counts=(2, 64)), tasks, [], progress=False)
    two = replace(few, rates={**ONE_RATE, "lora": (1e-3, 1e-2)})
    with pytest.raises(ValueError, match="no validation tasks to choose learning rates by"):
        ladder(two, tasks, [], progress=False)
    with pytest.raises(ValueError, match="rates are needed for"):
        replace(few, rates={"lora": (1e-3,)})
    with pytest.raises(ValueError, match="counts are numbers of examples"):
        replace(few, counts=(0,))
    with pytest.raises(ValueError, match=r"needs its oracle.*oracle: False"):
        curve(few, tasks, [], {}, progress=False)


# ---- the curve


def test_a_curve_begins_at_the_untrained_adapter(few, tasks, oracles, monkeypatch):
    reached = {task.name: ends_of(few, task, oracles[task.name]) for task in tasks}
    found = curve(few, tasks, [], reached, steps=3, progress=False)
    assert found["points"] == [0, 1, 2, 3]
    at_start = {"start": [few.start] * 2, "fresh": [few.bench.fresh] * 2}
    at_start["generated"] = [candidate(few, task, "prompt", 0, None) for task in tasks]
    for origin, adapters in at_start.items():
        row = found[origin]
        for task, adapter in zip(tasks, adapters, strict=True):
            want = accuracies(few, task, {"x": in_each(adapter)}, few.examples)["x"]
            own = row["per_task"][task.name]
            assert [own["accuracy"][0], own["accuracy_no_prompt"][0]] == [want["prompt"], want["no_prompt"]]
        assert len(row["accuracy"]) == len(row["accuracy_no_prompt"]) == 4
    made = {task.name: {"x": in_each(oracles[task.name])} for task in tasks}
    ends = [accuracies(few, task, made[task.name], few.examples)["x"]["prompt"] for task in tasks]
    assert found["oracle"]["accuracy"] == pytest.approx(sum(ends) / 2, abs=1e-6)
    assert found["base"]["accuracy"] == found["fresh"]["accuracy"][0]
    no_more(monkeypatch, curve_room, "take_curves")
    assert curve(few, tasks, [], reached, steps=3, progress=False) == found
    higher = {name: line | {"oracle": {"prompt": 1.0, "no_prompt": 1.0}} for name, line in reached.items()}
    other = curve(few, tasks, [], higher, steps=3, progress=False)  # another oracle, no other curve
    assert (other["oracle"]["accuracy"], other["start"]["accuracy"]) == (1.0, found["start"]["accuracy"])


def test_a_point_is_a_run_stopped_there(few, tasks):
    """Constant rate: the accuracy after 2 of 3 steps is that of 2 steps."""
    bench, task = few.bench, tasks[0]
    climbs = {"x": curve_room.Climb("start", 3e-2)}
    (line,) = curve_room.take_curves(few, [task], climbs, [0, 2, 3], 12, ("no_prompt",))
    stacked = stack_adapters([few.start])
    config = FitConfig(2, few.batch_size, 3e-2, schedule="constant", warmup=0.0)
    pool = make_pool(bench.adapted, task, bench.recipe.collect.rows)
    for _ in fit_steps(bench.adapted, stacked, [pool], config, seeds=[run_seed(0, 0)], train_a=True):
        pass
    made = {"x": in_each(unstack_adapter(stacked, 0))}
    assert line["x"]["no_prompt"][1] == accuracies(few, task, made, 12)["x"]["no_prompt"]


def test_rates_of_curves_are_chosen_by_the_mean_over_points(few, bench, monkeypatch):
    few = replace(few, rates={**ONE_RATE, "refined": (1e-3, 1e-2)})
    curves = {"generated/0.001": [0.0, 0.1, 0.9], "generated/0.01": [0.0, 0.8, 0.8]}

    def fake(few, group, climbs, points, examples, contexts):
        return [{key: {"prompt": curves.get(key, [0.0] * 3)} for key in climbs} for _ in group]

    monkeypatch.setattr(curve_room, "take_curves", fake)
    found = curve_room.chosen_rates(few, bench.suite.split("validation"), [0, 1, 2], progress=False)
    assert found["generated"]["learning_rate"] == 1e-2
    assert found["generated"]["validation_accuracy"]["0.001"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["fresh"] == {"learning_rate": 3e-2, "validation_accuracy": {"0.03": 0.0}}


def test_curve_points():
    assert curve_points(1) == [0, 1]
    assert curve_points(24) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert curve_points(10) == [0, 1, 2, 3, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="steps is 0"):
        curve_points(0)


def test_steps_to_by_hand():
    points = [0, 1, 2, 4]
    assert steps_to(points, [0.0, 0.5, 0.95, 1.0], 0.0, 1.0) == 2
    assert steps_to(points, [0.2, 0.3, 0.4, 0.4], 0.2, 1.0) is None
    assert steps_to(points, [1.0] * 4, 0.5, 0.5) is None  # no gain, nothing to reach
    assert steps_to(points, [0.9] * 4, 0.2, 0.6) == 0


def test_steps_over_tasks_by_hand():
    def line(accuracy, base=0.0, oracle=1.0):
        ends = {"base": {"prompt": base, "no_prompt": 0.0}, "oracle": {"prompt": oracle, "no_prompt": 0.0}}
        return {"start": {"prompt": accuracy, "no_prompt": [0.0] * 3}} | ends

    found = {"p": line([0.0, 1.0, 1.0]), "q": line([0.0, 0.0, 1.0]), "r": line([0.3] * 3, 0.3, 0.3)}
    row = curve_row(found, "start", [0, 1, 5])
    assert row["accuracy"] == pytest.approx([0.1, 1.3 / 3, 2.3 / 3], abs=1e-6)
    assert (row["median_steps_to_95"], row["reached"], row["gaining"]) == (3.0, 2, 2)
    assert row["steps_to_95"] == 5
    assert [one["steps_to_95"] for one in row["per_task"].values()] == [1, 5, None]
    never = curve_row({"p": line([0.0] * 3)}, "start", [0, 1, 5])
    assert (never["steps_to_95"], never["median_steps_to_95"], never["reached"]) == (None, None, 0)
