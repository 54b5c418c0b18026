"""Sweeps on validation tasks: their numbers by hand, what they refuse, what is kept."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, collected, prepared_of, tiny_recipe, untrained_generator

from ltdi_peft import sweep
from ltdi_peft.baselines import final_adapter, fit_ridge_rival
from ltdi_peft.batched import stack_adapters
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import EvaluateConfig
from ltdi_peft.few_shot import FewShot
from ltdi_peft.score import make_sheet, score
from ltdi_peft.sweep import gain_row, sampled, steps_sweep, validation_oracles
from ltdi_peft.task_curve import SUBSETS, prediction, subset, task_curve

TASK = SPLITS["validation"][0]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    bench = collected(folder / "run")
    generator = untrained_generator(bench)
    with torch.no_grad():  # so that the number of steps matters
        rng = torch.Generator().manual_seed(0)
        for weight in generator.denoiser.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=rng))
    return FewShot(bench, generator, bench.fresh, folder / "lines", examples=6)


@pytest.fixture(scope="module")
def data(few):
    return prepared_of(few.bench).data


@pytest.fixture(scope="module")
def encoder(few):
    return PromptEncoder("base", base=few.bench.base)


def accuracy(few, adapter, context="prompt"):
    task = few.bench.suite[TASK]
    prompts = task.held_out_prompts if context == "prompt" else None
    sheet = make_sheet(few.bench.adapted, task.evaluation[:6], prompts)
    return score(few.bench.adapted, sheet, stack_adapters([adapter])).accuracy.item()


@pytest.fixture(scope="module")
def steps(few):
    return steps_sweep(few, {"ours": few.generator}, (1, 3, 6, 7), progress=False)


def test_a_generator_takes_k_to_t_steps(few, steps):
    assert (few.generator.chain.k, few.generator.chain.T) == (3, 6)
    found = [(row["sampler"], row["steps"]) for row in steps["rows"]]
    assert sorted(found) == sorted((s, n) for s in ("mean_only", "ddim", "stochastic") for n in (3, 6))
    assert {(row["k"], row["T"], row["method"]) for row in steps["rows"]} == {(3, 6, "ours")}
    assert (steps["split"], steps["tasks"], steps["examples"], steps["seeds"]) == ("validation", 1, 6, 2)


def test_a_row_is_the_accuracy_of_those_adapters(few, steps):
    task = few.bench.suite[TASK]
    (row,) = [r for r in steps["rows"] if (r["sampler"], r["steps"]) == ("ddim", 3)]
    own = replace(few.generator.config, sampler="ddim")
    before = few.generator.config
    few.generator.config = own
    made = [
        few.generator.generate([task.held_out_prompts[s]], seed=s, steps=3, base=few.bench.base)[0].adapter
        for s in (0, 1)
    ]
    few.generator.config = before
    for context, suffix in (("prompt", ""), ("no_prompt", "_no_prompt")):
        mean = sum(accuracy(few, one, context) for one in made) / 2
        assert row[f"accuracy{suffix}"] == pytest.approx(mean, abs=1e-6)


def test_the_sampler_is_put_back_even_after_an_error(few):
    before = few.generator.config
    sampled(few, few.generator, few.bench.suite[TASK], "stochastic", 6, 0)
    assert few.generator.config == before
    with pytest.raises(ValueError, match="sampling steps must lie in"):
        sampled(few, few.generator, few.bench.suite[TASK], "ddim", 99, 0)
    assert few.generator.config == before


def test_steps_outside_every_chain_are_refused(few):
    with pytest.raises(ValueError, match=r"sampling_steps \[1, 2\] lie outside k … T of all of"):
        steps_sweep(few, {"ours": few.generator}, (1, 2), progress=False)


def test_gain_by_hand(few):
    lines = {
        "x": {"base": (0.0, 0.0), "oracle": (1.0, 1.0), "m/0": (0.4, 0.1), "m/1": (0.6, 0.3)},
        "y": {"base": (0.2, 0.0), "oracle": (0.8, 0.5), "m/0": (0.5, 0.5), "m/1": (0.5, 0.5)},
    }
    found = {
        task: {key: dict(zip(("prompt", "no_prompt"), pair, strict=True)) for key, pair in line.items()}
        for task, line in lines.items()
    }
    row = gain_row(few, found, ["m/0", "m/1"])
    assert row["G"] == pytest.approx((0.5 + 0.3) / (1.0 + 0.6))
    assert row["G_no_prompt"] == pytest.approx((0.2 + 0.5) / 1.5)
    assert row["accuracy"] == 0.5
    assert row["ci"] == [0.5, 0.5]
    assert row["ci_no_prompt"] == pytest.approx([0.2, 1.0])


def test_what_was_scored_is_kept(few, steps, monkeypatch):
    def never(*args):
        raise RuntimeError("scored again")

    monkeypatch.setattr(sweep, "accuracies", never)
    assert steps_sweep(few, {"ours": few.generator}, (1, 3, 6, 7), progress=False) == steps
    other = untrained_generator(few.bench, centre="mean")
    with pytest.raises(RuntimeError, match="scored again"):
        steps_sweep(few, {"ours": other}, (3, 6), progress=False)


def test_without_validation_runs_it_says_what_to_do(few, tmp_path):
    elsewhere = replace(few, bench=replace(few.bench, recipe=tiny_recipe(tmp_path)))
    with pytest.raises(ValueError, match=r"need validation tasks .* run `ltdi collect`, or leave both empty"):
        validation_oracles(elsewhere)


# ---- training tasks


@pytest.fixture(scope="module")
def tasks(few, data, encoder):
    run = validation_oracles(few)[TASK]
    return task_curve(few, data, encoder, run.start(), (2, 3, 5), progress=False)


def test_rows_of_training_tasks(few, tasks):
    found = [(row["method"], row["training_tasks"]) for row in tasks["rows"]]
    assert found == [("linear", 2), ("linear", 3), ("linear", 5), ("ours", 5)]
    assert [len(row["G_subsets"]) for row in tasks["rows"][:3]] == [SUBSETS, SUBSETS, 1]
    assert tasks["start_and_codec_saw"] == 5
    run = validation_oracles(few)[TASK]
    base, oracle = accuracy(few, few.bench.fresh), accuracy(few, final_adapter(run))
    wanted = (accuracy(few, run.start()) - base) / (oracle - base) if oracle > base else None
    assert tasks["start"]["G"] == (pytest.approx(wanted, abs=1e-5) if wanted is not None else None)
    assert tasks["start"]["accuracy"] == pytest.approx(accuracy(few, run.start()), abs=1e-6)


def test_all_tasks_are_the_whole_ridge(few, data, encoder):
    conditions = encoder(list(few.bench.suite[TASK].held_out_prompts))
    found = prediction(few, data, range(5), conditions)
    wanted = fit_ridge_rival(data, few.generator.codec, few.generator).tokens(conditions)
    torch.testing.assert_close(found, wanted)


def test_a_subset_is_fitted_on_its_tasks_alone(few, data, encoder):
    conditions = encoder(list(few.bench.suite[TASK].held_out_prompts))
    found = prediction(few, data, [1, 3], conditions)
    spoiled = replace(data, tokens=torch.where((data.task == 0)[:, None, None, None], 99.0, data.tokens))
    torch.testing.assert_close(prediction(few, spoiled, [1, 3], conditions), found)
    assert not torch.allclose(prediction(few, spoiled, [0, 3], conditions), found)
    config = few.generator.config
    few.generator.config = replace(config, guidance_scale=0.0, mean_share=0.0)
    try:
        assert not prediction(few, data, [1, 3], conditions).any()  # guided as the generator is
    finally:
        few.generator.config = config


def test_subsets_are_drawn_from_the_seed():
    assert subset(0, 50, (20, 1)) == subset(0, 50, (20, 1))
    assert len({tuple(subset(seed, 50, (20, draw))) for seed in (0, 1) for draw in range(3)}) == 6
    assert subset(3, 5, (5, 0)) == [0, 1, 2, 3, 4]
    assert len(set(subset(0, 50, (20, 0)))) == 20


@pytest.mark.parametrize("counts", [(1, 5), (6,)])
def test_numbers_of_training_tasks_are_checked(few, data, encoder, counts):
    with pytest.raises(ValueError, match=r"has 5 training tasks, so give numbers from 2 to 5"):
        task_curve(few, data, encoder, few.bench.fresh, counts, progress=False)


def test_the_recipe_checks_its_sweeps():
    assert EvaluateConfig().sampling_steps == EvaluateConfig().training_tasks == ()
    with pytest.raises(ValueError, match="least of sampling_steps is 0; it must be at least 1"):
        EvaluateConfig(sampling_steps=(0, 5))
    with pytest.raises(ValueError, match="least of training_tasks is 1; it must be at least 2"):
        EvaluateConfig(training_tasks=(1,))
