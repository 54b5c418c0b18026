"""Generators that read examples beside the prompt: conditions, training on either kind, what is refused."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import collected
from torch.testing import assert_close

from ltdi_peft.baselines import NearestTask, adapter_digest
from ltdi_peft.condition import PROMPT_WEIGHT, WORDS, PromptEncoder
from ltdi_peft.few_shot import METHODS, READ, FewShot, Fit, ladder_adapters
from ltdi_peft.generate import generate_adapter
from ltdi_peft.generator import load_generator
from ltdi_peft.prepare import drawn_examples, prepare, task_conditions
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Example, Task
from ltdi_peft.train import recipe_encoder, train_generator

PROMPT = ["w1 w2"]
FIRST = (Example("w0 w1 w2", "w1 w1"), Example("w3 w1 w4", "w1 w1"), Example("w2 w4 w0", "w4 w4"))
OTHER = (Example("w7 w8 w9", "w7"), Example("w9 w8 w7", "w9"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = collected(tmp_path_factory.mktemp("examples"))
    return replace(bench, recipe=replace(bench.recipe, condition=replace(bench.recipe.condition, examples=3)))


@pytest.fixture(scope="module")
def encoder(bench):
    return recipe_encoder(bench)


@pytest.fixture(scope="module")
def generator(bench):
    return train_generator(bench.recipe, bench=bench, progress=False)


# ---- conditions


def test_a_prompt_alone_has_nothing_of_examples(bench, encoder):
    alone = encoder(PROMPT)
    said = PromptEncoder("base", base=bench.base)(PROMPT)
    assert alone.shape[1] == said.shape[1] + encoder.evidence_width
    assert_close(alone[:, : said.shape[1]], said, rtol=0, atol=1e-6)
    assert not alone[:, said.shape[1] :].any()


def test_examples_stand_beside_a_prompt_that_weighs_less(encoder):
    width = encoder.prompt_width
    (alone,), (both,) = encoder(PROMPT), encoder(PROMPT, [FIRST])
    assert_close(both.norm(), torch.tensor(1.0))
    ratio = both[:width].norm() / both[width:].norm()
    assert_close(ratio, torch.tensor(PROMPT_WEIGHT), rtol=0, atol=1e-5)
    assert_close(both[:width] / both[:width].norm(), alone[:width], rtol=0, atol=1e-5)


def test_the_order_of_examples_says_nothing_and_their_answers_do(encoder):
    first, turned = encoder(PROMPT, [FIRST]), encoder(PROMPT, [FIRST[::-1]])
    assert_close(first, turned, rtol=0, atol=1e-6)
    assert (first - encoder(PROMPT, [OTHER])).norm() > 0.1
    answers = tuple(replace(one, answer="w9") for one in FIRST)
    assert (first - encoder(PROMPT, [answers])).norm() > 0.1
    # A batch reads each prompt's own.
    batch = encoder([*PROMPT, *PROMPT], [OTHER, FIRST])
    assert_close(batch[1:], first, rtol=0, atol=1e-5)
    assert encoder.evidence_width == encoder.prompt_width + WORDS


def test_draws_are_a_task_s_own_first_examples(bench):
    task = bench.suite.split("train")[0]
    draws = [drawn_examples(task, index, 3) for index in range(40)]
    assert {len(draw) for draw in draws} == {1, 2, 3}
    assert {e for draw in draws for e in draw} <= set(task.train)
    assert draws[5] == drawn_examples(task, 5, 3)
    with pytest.raises(
        ValueError, match=r"condition\.examples is 3, but task 'bare' has no training examples"
    ):
        drawn_examples(Task("bare", ("say",)), 0, 3)


def test_every_prompt_is_read_twice(bench, encoder):
    task = bench.suite.split("train")[0]
    found = task_conditions(encoder, task, 4)
    width = encoder.prompt_width
    assert found.shape == (8, encoder.width)
    assert not found[:4, width:].any()
    assert (found[4:, width:].norm(dim=1) > 0.5).all()
    data = prepare(bench.recipe, encoder, bench.suite).data
    prompts = data.conditions.shape[1] // 2
    assert_close(data.prompt_conditions, data.conditions[:, :prompts, :width], rtol=0, atol=0)


# ---- a generator of them


def test_the_generator_reads_either_and_says_so(bench, generator):
    written = load_generator(bench.recipe.generator_folder)
    assert written.config.condition_examples == 3
    options = {"base": bench.base}
    (alone,) = written.generate(PROMPT, **options)
    (first,) = written.generate(PROMPT, examples=[FIRST], **options)
    (other,) = written.generate(PROMPT, examples=[OTHER], **options)
    assert len({adapter_digest(one.adapter) for one in (alone, first, other)}) == 3
    assert [one.provenance.examples for one in (alone, first, other)] == [0, 3, 2]
    # The nearest task is that of the prompt, whatever stands beside it.
    assert alone.nearest_task == first.nearest_task
    assert first.nearest_similarity == pytest.approx(alone.nearest_similarity, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_one_candidate_takes_examples_where_they_are_read(bench, generator):
    pairs = [(one.input, one.answer) for one in FIRST]
    options = {"base_model": bench.base.model, "tokenizer": bench.base.tokenizer}
    model = generate_adapter("w1 w2", generator=generator, examples=pairs, **options)
    (expected,) = generator.generate(PROMPT, examples=[FIRST], base=bench.base)
    parameters = dict(model.named_parameters())
    for site, (_, b) in expected.adapter.items():
        (found,) = [w for name, w in parameters.items() if f"{site}.lora_B" in name]
        assert_close(found.detach().cpu().float(), b, rtol=0, atol=0)
    model.unload()


def test_who_reads_prompts_alone_refuses_examples(bench, tmp_path):
    encoder = PromptEncoder("base", base=bench.base)
    with pytest.raises(ValueError, match=r"of prompts alone.*condition\.examples above 0"):
        encoder(PROMPT, [FIRST])


@pytest.mark.parametrize("examples", [[[]], [FIRST, FIRST]])
def test_each_prompt_has_its_own_examples(encoder, examples):
    with pytest.raises(ValueError, match=r"one list a prompt, none of them empty: 1 prompts came with lists"):
        encoder(PROMPT, examples)


def test_the_nearest_task_is_found_by_prompts(bench, encoder):
    data = prepare(bench.recipe, encoder, bench.suite).data
    runs = TrajectoryStore(bench.recipe.store_folder).trajectories()
    nearest = NearestTask(data, runs)
    for index, name in enumerate(data.names):
        mean = torch.nn.functional.normalize(data.prompt_conditions[index].mean(0), dim=-1)
        padded = torch.cat([mean, torch.zeros(data.evidence)])[None]
        (found,) = nearest.adapters(padded)
        own = next(run for run in nearest.runs if run.task.name == name)
        assert_close(found, own.adapter(own.snapshots[-1]), rtol=0, atol=0)


def test_the_ladder_has_one_more_rung(bench, generator, tmp_path):
    start = TrajectoryStore(bench.recipe.store_folder).trajectories()[0].start()
    sizes = {"counts": (2,), "steps": 1, "batch_size": 2, "examples": 4, "validation_examples": 4}
    few = FewShot(bench, generator, start, tmp_path, **sizes)
    task = bench.suite.split("unseen_tasks")[0]
    fits = {f"2/{m}": Fit(m, 2, 3e-2) for m in ("refined", "lora", "lora_from_start")}
    (made,) = ladder_adapters(few, [task], fits)
    assert set(made) == {f"2/{name}" for name in (*METHODS, READ)}
    (expected,) = generator.generate(task.held_out_prompts[:1], examples=[task.train[:2]], base=bench.base)
    assert adapter_digest(made[f"2/{READ}"]["prompt"]) == adapter_digest(expected.adapter)
