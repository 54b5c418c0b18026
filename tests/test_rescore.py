"""A generator on the tasks of an older evaluation: the old numbers again for the same generator."""

import copy
from dataclasses import replace

import pytest
from scripts import script
from tiny_bench import collected

from ltdi_peft.evaluate import evaluate
from ltdi_peft.evaluate_config import FewShotConfig
from ltdi_peft.generator import load_generator
from ltdi_peft.train import train_generator

METHODS = ("multi_task_lora", "mean", "ours", "ours_wrong_prompt", "oracle")


@pytest.fixture(scope="module")
def rescore():
    return script("benchmarks/rescore.py")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = collected(tmp_path_factory.mktemp("rescore"))
    few_shot = FewShotConfig(tasks=1, validation=1, counts=(2,), steps=1, curve_steps=1)
    about = replace(bench.recipe.evaluate, methods=METHODS, multi_task_steps=4, few_shot=few_shot)
    return replace(bench, recipe=replace(bench.recipe, evaluate=about))


@pytest.fixture(scope="module")
def generator(bench):
    train_generator(bench.recipe, bench=bench, progress=False)
    return load_generator(bench.recipe.generator_folder)


@pytest.fixture(scope="module")
def before(bench, generator, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return evaluate(bench.recipe, bench=bench, generator=generator, results=results, progress=False)


def test_the_same_generator_has_its_old_line_again(rescore, bench, generator, before):
    wide = {task: {c: {rescore.WIDE: 0.5} for c in rescore.CONTEXTS} for task in before["per_task"]}
    found = rescore.rescored(bench, generator, before, wide, progress=False)
    assert found["origin"] == {**found["origin"], "now": found["origin"]["then"], "task_difference": 0}
    for name, row in before["per_task"].items():
        for context in rescore.CONTEXTS:
            now = found["per_task"][name]["accuracy"][context]
            assert now == {**row["accuracy"][context], rescore.WIDE: [0.5]}
        assert "ours" not in found["per_task"][name]["nearest"]  # that distance needs stored runs
    assert found["controls"]["prompt"] == before["controls"]["prompt"]
    for other in ("multi_task_lora", "mean"):
        assert found["paired"][f"ours - {other}"] == before["paired"][f"ours - {other}"]
    assert found["cost"]["generate"]["batch_1"] > 0


def test_a_few_examples_without_a_store(bench, generator, before):
    room = script("benchmarks/few_shot.py")
    found = room.measured(bench, generator, before, progress=False)
    again, old = ({**of["few_shot"]["2"], **of["curve"]} for of in (found, before))
    # What begins at the multi-task LoRA begins at the origin here, another adapter in this recipe.
    other = [name for name in old if again[name] != old[name]]
    assert set(other) <= {"lora_from_start", "start"}
    text = room.page(found, "command")
    assert "| `generated` |" in text
    assert "| 16 examples, no gradient step: accuracy | not measured |" in text
    assert "5× fewer than from scratch: " in text


def test_another_generator_changes_its_own_lines_alone(rescore, bench, generator, before):
    other = replace(generator.config, guidance_scale=0.0, mean_share=0.0)
    plain = load_generator(bench.recipe.generator_folder)
    plain.config = other
    found = rescore.rescored(bench, plain, before, {}, progress=False)
    for context in rescore.CONTEXTS:
        old, new = (
            [row["accuracy"][context] for row in result["per_task"].values()] for result in (before, found)
        )
        assert [row["mean"] for row in old] == [row["mean"] for row in new]
    assert found["controls"]["prompt"] != before["controls"]["prompt"]
    assert found["trials"]["ours"] == {"scale": 0.0, "mean_share": 0.0}


def test_rivals_without_training_are_scored_again(rescore, bench, generator, before):
    full = load_generator(bench.recipe.generator_folder)
    full.centre.zero_()  # tells nothing of any prompt
    found = rescore.rescored(bench, generator, before, {}, full=full, progress=False)
    assert set(found["trials"]["ridge"]) == set(rescore.CONTEXTS)
    for name, row in before["per_task"].items():
        for context in rescore.CONTEXTS:
            now = found["per_task"][name]["accuracy"][context]
            assert len(now["ridge"]) > 1
            assert len(set(now["ridge"])) == 1
            assert now["ours"] == row["accuracy"][context]["ours"]
            old = row["accuracy"][context]
            assert now["mean"] == old["mean"]  # the codec keeps all of these runs
            assert now["multi_task_lora"] == old["multi_task_lora"]  # the recipe trains no origin
    assert found["rivals_again"] == ["ridge", "mean"]


def test_the_regression_on_a_tuned_encoder_stands_beside_the_rival(rescore, generator):
    tuned = copy.copy(generator)
    tuned.config = replace(generator.config, tuned=True)
    assert [rescore.ridge_name(one) for one in (generator, tuned)] == ["ridge", "ridge_tuned"]


def test_other_tasks_are_refused(rescore, bench, generator, before):
    with pytest.raises(SystemExit, match="another base model"):
        rescore.rescored(bench, generator, {**before, "base_model": "other/model"}, {}, progress=False)
    fewer = replace(bench, recipe=replace(bench.recipe, evaluate=replace(bench.recipe.evaluate, examples=5)))
    with pytest.raises(SystemExit, match=r"--evaluate\.examples=6"):
        rescore.rescored(fewer, generator, before, {}, progress=False)
    known = replace(generator.config, training_tasks=tuple(before["per_task"]))
    seen = load_generator(bench.recipe.generator_folder)
    seen.config = known
    with pytest.raises(SystemExit, match=f"trained on {len(known.training_tasks)} of these"):
        rescore.rescored(bench, seen, before, {}, progress=False)
