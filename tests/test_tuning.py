"""The tuned sentence encoder: what a step lowers, resume points, and the generator that carries it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny_bench import collected, conditioned_bench
from torch.testing import assert_close

from ltdi_peft.centre import cross_fitted, fit_ridge
from ltdi_peft.condition import PromptEncoder, added
from ltdi_peft.config import ConditionConfig, TuningConfig
from ltdi_peft.fit import FitState
from ltdi_peft.generator import ENCODER_FILE, Generator, load_generator
from ltdi_peft.prepare import encoded_of
from ltdi_peft.shrink import shrink
from ltdi_peft.task import Example, Task, TaskSuite
from ltdi_peft.train import recipe_encoder, train_generator
from ltdi_peft.trajectory import flat, paired
from ltdi_peft.tuning import (
    FILE,
    HEADER,
    POINT_FILE,
    STRENGTH,
    deviations,
    fresh_factors,
    left_out_error,
    recipe_tuning,
    tune,
    tuning_steps,
)

TUNING = TuningConfig(steps=8, layers=1, rank=2, tasks=4, learning_rate=1e-2)
PROMPTS = ("Say the first word.", "Which word comes second?")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("tuning"))


@pytest.fixture
def bench(runs, tmp_path):
    return tuning_bench(runs, tmp_path / "run")


def tuning_bench(runs, folder, **fields):
    """The collected runs, to be trained on with a tuned encoder in another output."""
    condition = ConditionConfig("minilm_words", tuning=replace(TUNING, **fields))
    return conditioned_bench(runs, folder, condition)


def errors_of(bench):
    with safe_open(bench.recipe.folder / FILE, framework="pt") as reader:
        return json.loads(reader.metadata()[HEADER])["left_out_errors"]


def test_a_step_lowers_the_error_of_tasks_that_were_left_out():
    rng = torch.Generator().manual_seed(0)
    conditions, targets = torch.randn(9, 5, generator=rng), torch.randn(9, 3, generator=rng)
    left_out = cross_fitted(conditions, targets, torch.arange(9), STRENGTH) - targets
    wanted = left_out.square().sum() / targets.square().sum()
    assert_close(left_out_error(conditions, targets), wanted.float(), rtol=1e-4, atol=0)


def test_targets_are_as_far_apart_as_the_tasks_own_adapters(bench):
    encoded = encoded_of(bench.recipe, bench.suite)
    tasks = [bench.suite[name] for name in sorted(set(encoded.runs.tasks))]
    final = torch.stack([encoded.runs.of([task.name]).tokens[:, -1].mean(0).flatten() for task in tasks])
    found = deviations(encoded, tasks)
    assert_close(torch.pdist(found), torch.pdist(final), rtol=1e-4, atol=1e-5)
    assert_close(found.norm(dim=1), (final - final.mean(0)).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_training_starts_at_the_encoder_as_it_is():
    encoder = PromptEncoder("minilm_words")
    factors = fresh_factors(encoder, TUNING, seed=0)
    assert len(factors) == 6  # one layer: query, key, value, output, and the two of its MLP
    assert all(site.startswith("encoder.layer.5.") and not b.any() for site, (_, b) in factors.items())
    assert_close(encoder.said(PROMPTS, added(encoder.model, factors)), encoder(PROMPTS), rtol=0, atol=1e-6)


QUESTIONS = (
    ("Name the capital of the country.", "Which city is the seat of government?", "Its chief town, please."),
    ("Say the opposite of the word.", "Give an antonym.", "What means the contrary?"),
    ("How many letters has it?", "Count the characters.", "Tell the length of the word."),
    ("Translate it into French.", "Put it in the language of Paris.", "What do the French call it?"),
)
FORMATS = (
    ("Write in capitals.", "Use upper case.", "SHOUT the answer."),
    ("Put it in brackets.", "Parentheses go around it.", "Enclose it (so)."),
    ("Say it twice.", "Repeat the answer.", "Give it two times."),
)


def test_wordings_that_training_never_saw_are_read_better():
    """Adapters are the sum of a question's part and a format's; the third wording of each is held out."""
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(len(of), 6, generator=rng) for of in (QUESTIONS, FORMATS)]
    pairs = [(q, f) for q in range(len(QUESTIONS)) for f in range(len(FORMATS))]
    targets = torch.stack([parts[0][q] + parts[1][f] for q, f in pairs])
    targets = targets - targets.mean(0)
    said = [[f"{one} {two}" for one in QUESTIONS[q][:2] for two in FORMATS[f][:2]] for q, f in pairs]
    tasks = [Task(f"{q}/{f}", tuple(own)) for (q, f), own in zip(pairs, said, strict=True)]
    encoder, config = PromptEncoder("minilm_words"), TuningConfig(steps=25, tasks=12, learning_rate=2e-3)
    factors = fresh_factors(encoder, config, seed=0)

    def error():
        asked = [f"{QUESTIONS[q][2]} {FORMATS[f][2]}" for q, f in pairs]
        weights = added(encoder.model, factors)
        with torch.no_grad():
            known = encoder.said([own[0] for own in said], weights)
            predicted = fit_ridge(known, targets, STRENGTH)(encoder.said(asked, weights))
        return (predicted - targets).square().sum() / targets.square().sum()

    before = error()
    trained = list(tuning_steps(encoder, factors, tasks, targets, config, 0, FitState()))
    assert len(trained) == 25
    assert error() < 0.9 * before


def test_an_interrupted_tuning_ends_where_a_whole_one_does(bench, runs, tmp_path, monkeypatch):
    tune(bench, progress=False)
    whole = recipe_tuning(bench.recipe)
    other = tuning_bench(runs, tmp_path / "other")
    monkeypatch.setattr("ltdi_peft.tuning.EVERY", 3)
    monkeypatch.setattr("ltdi_peft.tuning.left_out_error", stopping(after=5))
    with pytest.raises(KeyboardInterrupt):
        tune(other, progress=False)
    assert (other.recipe.folder / POINT_FILE).is_file()
    with pytest.raises(FileNotFoundError, match=r"this recipe tunes its encoder. Run `ltdi train`"):
        recipe_tuning(other.recipe)
    changed = tuning_bench(runs, tmp_path / "other", learning_rate=2e-2)
    with pytest.raises(ValueError, match=r"written with another \['tuning.learning_rate'\]"):
        tune(changed, progress=False)
    monkeypatch.setattr("ltdi_peft.tuning.left_out_error", left_out_error)
    tune(other, progress=False)
    for site, pair in recipe_tuning(other.recipe).items():
        assert all(torch.equal(one, two) for one, two in zip(pair, whole[site], strict=True))
    assert errors_of(other) == errors_of(bench)
    assert not (other.recipe.folder / POINT_FILE).exists()
    with pytest.raises(ValueError, match=r"trained with another \['tuning'\]"):
        tune(changed, progress=False)


def stopping(after):
    """`left_out_error`, which somebody interrupts after so many calls."""
    calls = iter(range(after))

    def error(conditions, targets):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return left_out_error(conditions, targets)

    return error


def test_the_generator_carries_its_encoder(bench, tmp_path):
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    tuning = recipe_tuning(bench.recipe)
    own = recipe_encoder(bench)(PROMPTS)
    assert (own - PromptEncoder("minilm_words")(PROMPTS)).norm() > 1e-2
    again = load_generator(bench.recipe.generator_folder)
    assert "last layers were tuned" in (bench.recipe.generator_folder / "README.md").read_text()
    assert torch.equal(again.encode_prompts(PROMPTS), own)
    assert torch.equal(generator.encode_prompts(PROMPTS), own)
    small = shrink(again)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(Generator.from_pretrained(tmp_path / "small").encode_prompts(PROMPTS), own)
    assert all(map(torch.equal, flat(again.tuning).values(), flat(tuning).values()))
    (tmp_path / "small" / ENCODER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"is no generator: encoder.safetensors is missing"):
        load_generator(tmp_path / "small")


def test_examples_are_read_as_before(bench):
    tune(bench, progress=False)
    examples = [[Example("w1 w2", "w1")], [Example("w3 w4", "w4")]]
    tuned, plain = (
        PromptEncoder("minilm_words", examples=2, tuning=tuning)
        for tuning in (recipe_tuning(bench.recipe), None)
    )
    assert torch.equal(tuned.evidence(examples), plain.evidence(examples))
    assert (tuned(PROMPTS, examples) - plain(PROMPTS, examples)).norm() > 1e-2


def test_what_cannot_be_tuned_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"condition.encoder is 'base', which is the frozen base model"):
        ConditionConfig("base", tuning=TUNING)
    bench = tuning_bench(runs, tmp_path / "run")
    names = bench.suite.splits["train"][:2]
    two = TaskSuite("two", {name: bench.suite[name] for name in names}, {"train": names})
    with pytest.raises(ValueError, match=r"needs at least 3 training tasks, there are 2"):
        tune(replace(bench, suite=two), progress=False)


def test_half_a_pair_is_no_adapter():
    with pytest.raises(KeyError, match=r"site.lora_B"):
        paired({"site.lora_A": torch.zeros(1, 2)})
