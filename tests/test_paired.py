"""A generator beside the rivals that need no training; one that is the regression differs by nothing."""

from dataclasses import replace

import pytest
from scripts import script
from tiny_bench import SPLITS, collected, conditioned_bench, untrained_generator

from ltdi_peft.batched import stack_adapters
from ltdi_peft.collect import shared_start
from ltdi_peft.config import ConditionConfig
from ltdi_peft.score import make_sheet, score
from ltdi_peft.train import train_generator


@pytest.fixture(scope="module")
def paired():
    return script("benchmarks/paired.py")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("paired"))


@pytest.fixture(scope="module")
def generator(bench):
    return untrained_generator(bench)


@pytest.fixture(scope="module")
def found(paired, bench, generator):
    return paired.measured(bench, generator, ["prompt"], progress=False)


def test_a_generator_that_is_the_regression_has_its_line(paired, bench, generator, found):
    twin = untrained_generator(bench)
    guided = found["trials"]["ridge"]["prompt"]
    about = {"guidance_scale": guided["scale"], "mean_share": guided["mean_share"]}
    twin.config = replace(generator.config, **about)
    same = paired.measured(bench, twin, ["prompt"], progress=False)
    for line in same["per_task"].values():
        assert line["prompt"]["ours"] == line["prompt"]["ridge"]
    gap = same["splits"]["unseen_tasks"]["paired"]["prompt"]["ridge"]
    assert (gap["value"], gap["low"], gap["high"]) == (0, 0, 0)
    assert same["splits"]["unseen_tasks"]["tasks"] == 3
    assert "| ridge |" in paired.page(same, "command")


def test_the_origin_is_scored_as_it_is(bench, found):
    start = stack_adapters([shared_start(bench, progress=False)])
    for name in SPLITS["unseen_tasks"]:
        task = bench.suite[name]
        sheet = make_sheet(bench.adapted, task.evaluation[:6], task.held_out_prompts)
        want = score(bench.adapted, sheet, start).accuracy.item()
        assert found["per_task"][name]["prompt"]["origin"] == pytest.approx(want, abs=1e-6)


def test_what_is_scored_is_kept(paired, bench, generator, found, monkeypatch):
    monkeypatch.setattr(paired, "scored", lambda *args: pytest.fail("scored again"))
    again = paired.measured(bench, generator, ["prompt"], progress=False)
    assert again["per_task"] == found["per_task"]


def test_rivals_may_be_those_of_an_older_result(paired, bench, generator, found, monkeypatch):
    monkeypatch.setattr(paired, "guided_ridges", lambda *args: pytest.fail("fitted again"))
    same = paired.measured(bench, generator, ["prompt"], before=found, progress=False)
    assert same["per_task"] == found["per_task"]
    assert same["trials"] == found["trials"]
    for other in ({"examples": 5}, {"seeds": [0]}, {"per_task": {}}):
        with pytest.raises(SystemExit, match="other tasks, contexts, seeds or examples"):
            paired.measured(bench, generator, ["prompt"], before={**found, **other}, progress=False)


def test_the_regression_on_attributes_joins_an_older_result(paired, bench, tmp_path, monkeypatch):
    told = conditioned_bench(bench, tmp_path / "run", ConditionConfig("base", attributes=True))
    generator = train_generator(told.recipe, bench=told, progress=False)
    first = paired.measured(told, generator, ["prompt"], progress=False)
    monkeypatch.setattr(paired, "generated", lambda *args: pytest.fail("ours was scored again"))
    found = paired.measured(told, generator, ["prompt"], beside=first, progress=False)
    for name, line in first["per_task"].items():  # here the recipe's own regression is the same one
        assert found["per_task"][name]["prompt"] == {**line["prompt"], paired.TOLD: line["prompt"]["ridge"]}
    assert found["trials"] == {**first["trials"], paired.TOLD: first["trials"]["ridge"]}
    assert f"| {paired.TOLD} |" in paired.page(found, "command")


def test_differences_are_paired_over_tasks(paired, bench):
    names = SPLITS["unseen_tasks"]
    values = {"ours": (0.9, 0.5, 0.1), "ridge": (0.7, 0.3, -0.1), "mean": (0.0, 0.0, 0.0)}
    lines = {name: {"prompt": {m: of[i] for m, of in values.items()}} for i, name in enumerate(names)}
    tasks = [bench.suite[name] for name in names]
    got = paired.compared("ours", "unseen_tasks", tasks, lines, bench.recipe)
    assert got["accuracy"]["prompt"]["ours"] == pytest.approx(0.5)
    gap = got["paired"]["prompt"]["ridge"]  # 0.2 in each task: no spread, whatever the tasks are
    assert [gap["value"], gap["low"], gap["high"]] == pytest.approx([0.2] * 3)
    wide = got["paired"]["prompt"]["mean"]
    assert wide["value"] == pytest.approx(0.5)
    assert wide["low"] < 0.5 < wide["high"]
