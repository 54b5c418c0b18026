"""Attributes of tasks: the classifier of prompts, and generators whose conditions it makes."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_bench import collected, conditioned_bench
from torch.testing import assert_close

from ltdi_peft.attribute_fit import MOST_INPUTS, drawn_inputs, recipe_attributes, told_inputs
from ltdi_peft.attributes import (
    FILE,
    LEAST_RATIO,
    SHARPNESS,
    STRENGTH,
    AttributeClassifier,
    fit_classifier,
    known_values,
    reading_inputs,
)
from ltdi_peft.baselines import adapter_digest
from ltdi_peft.cards import adapter_card, read_as
from ltdi_peft.centre import fit_ridge, fit_task_ridge
from ltdi_peft.cli import main
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import ConditionConfig
from ltdi_peft.generate import as_inputs, best_candidate, generate_adapter
from ltdi_peft.generator import load_generator
from ltdi_peft.protocol import generator_digest
from ltdi_peft.provenance import provenance_of, read_provenance
from ltdi_peft.shrink import shrink
from ltdi_peft.suite import builtin_tasks
from ltdi_peft.task import Example, Task, TaskSuite
from ltdi_peft.train import recipe_encoder, train_generator

PROMPTS = ("please a second twice", "please b second plain")
QUESTIONS, FORMS = [f"q{i}" for i in range(12)], [f"f{i}" for i in range(6)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("attributes"))


@pytest.fixture
def bench(runs, tmp_path):
    return attribute_bench(runs, tmp_path / "run")


def attribute_bench(runs, folder, encoder="base"):
    return conditioned_bench(runs, folder, ConditionConfig(encoder, attributes=True))


def drawn_world(noise=0.5, wordings=12):
    """Conditions (task, wording, 40) of all pairs of a question and a form, attributes, and parts."""
    rng = torch.Generator().manual_seed(0)
    asked, formed = torch.randn(12, 40, generator=rng), torch.randn(6, 40, generator=rng)
    pairs = [(q, f) for q in range(12) for f in range(6)]
    said = torch.stack([(asked[q] + formed[f]) / 40**0.5 for q, f in pairs])
    conditions = said[:, None] + noise / 40**0.5 * torch.randn(72, wordings, 40, generator=rng)
    attributes = [(("form", FORMS[f]), ("question", QUESTIONS[q])) for q, f in pairs]
    return (
        conditions,
        attributes,
        torch.randn(12, 30, generator=rng),
        torch.randn(6, 30, generator=rng),
        pairs,
    )


# --- the classifier


def test_probabilities_are_a_softmax_of_a_ridge_regression_on_the_values():
    conditions, attributes, *_ = drawn_world()
    found = fit_classifier(conditions, attributes)
    assert found.values == {"form": tuple(FORMS), "question": tuple(sorted(QUESTIONS))}
    values = [("form", v) for v in found.values["form"]] + [("question", v) for v in found.values["question"]]
    targets = torch.tensor([[float(value in own) for value in values] for own in attributes])
    ridge = fit_ridge(conditions.flatten(0, 1), targets.repeat_interleave(12, 0), STRENGTH)
    scores = SHARPNESS * ridge(conditions[3])
    wanted = torch.cat([scores[:, :6].softmax(1), scores[:, 6:].softmax(1)], 1).float()
    assert_close(found(conditions[3]), wanted, rtol=1e-4, atol=1e-5)
    assert_close(found(conditions)[3], found(conditions[3]))  # of any number of leading dimensions
    assert found.width == 18


def test_adapters_of_new_combinations_in_new_wordings_are_predicted_better_from_probabilities():
    """Parts that add up, every sixth combination held out: the reason for all of this."""
    conditions, attributes, of_question, of_form, pairs = drawn_world(noise=2.0)
    targets = torch.stack([of_question[q] + of_form[f] for q, f in pairs])
    held = torch.tensor([(q + f) % 6 == 0 for q, f in pairs])
    seen, new = conditions[~held][:, :6], conditions[held][:, 6:]
    classifier = fit_classifier(seen, [own for own, out in zip(attributes, held, strict=True) if not out])

    def error(make):
        predicted = fit_task_ridge(make(seen), targets[~held], 1e-3)(make(new).flatten(0, 1))
        wanted = targets[held].repeat_interleave(6, 0)
        return ((predicted - wanted).square().sum() / (wanted - targets.mean(0)).square().sum()).item()

    assert error(classifier) < 0.6 * error(lambda conditions: conditions)


def test_a_task_without_an_attribute_speaks_for_none_of_its_values():
    conditions, attributes, *_ = drawn_world()
    alone = [*attributes[:-1], (("question", "q11"),)]
    found, whole = fit_classifier(conditions, alone), fit_classifier(conditions, attributes)
    place = found.values["form"].index("f5")
    assert found(conditions[-1])[:, place].mean() < whole(conditions[-1])[:, place].mean()
    assert known_values(alone) == known_values(attributes)


def test_readings_are_the_most_probable_combinations():
    found = AttributeClassifier({"form": ("a", "b"), "question": ("p", "q", "r")}, torch.zeros(5, 5))
    told = torch.tensor([0.75, 0.25, 0.5, 0.4, 0.1])  # a p .375, a q .3, b p .125, b q .1, a r .075, b r
    assert found.reading(told) == {"form": "a", "question": "p"}
    read = [tuple(found.reading(one).values()) for one in found.readings(told, 4)]
    assert read == [("a", "p"), ("a", "q"), ("b", "p"), ("b", "q")]
    every = found.readings(told, 9)
    assert every.shape == (6, 5)
    assert set(every.unique().tolist()) == {0.0, 1.0}
    assert every.sum(1).tolist() == [2.0] * 6
    assert found.readings(told, 0).shape == (0, 5)


def test_without_any_attributes_there_is_nothing_to_tell():
    with pytest.raises(ValueError, match="none of the 2 training tasks has attributes"):
        fit_classifier(torch.randn(2, 3, 4), [(), ()])


# --- inputs


def drawn_inputs_world():
    """Twelve questions in two halves that no prompt tells apart; the inputs of a task tell the half."""
    rng = torch.Generator().manual_seed(1)
    asked, domain = torch.randn(6, 20, generator=rng), torch.randn(2, 10, generator=rng)
    pairs = [(d, q) for d in range(2) for q in range(6)]
    attributes = [(("question", f"{d}/{q}"),) for d, q in pairs]
    noise = 0.1 * torch.randn(12, 80, 20, generator=rng)
    conditions = torch.stack([asked[q] for _, q in pairs])[:, None] + noise
    about = torch.stack([domain[d] for d, _ in pairs])[:, None] + 0.1 * torch.randn(12, 80, 10, generator=rng)
    return conditions, about, attributes


def test_inputs_tell_what_a_prompt_leaves_open():
    conditions, about, attributes = drawn_inputs_world()
    plain = fit_classifier(conditions[:, :78], attributes)
    found = reading_inputs(plain, about[:, :78], attributes)
    new, told = conditions[:, 78:].flatten(0, 1), about[:, 78:].flatten(0, 1)
    places = [plain.values["question"].index(own[0][1]) for own in attributes for _ in range(2)]
    alone, both = (found_[range(24), places] for found_ in (plain(new), found(new, told)))
    assert 0.3 < alone.mean() < 0.7  # one of two, whichever
    assert both.mean() > 0.95
    assert_close(found(conditions[0]), plain(conditions[0]))  # without inputs it reads as before
    assert_close(found(new, told).sum(1), torch.ones(24))
    with pytest.raises(ValueError, match="fitted on prompts alone"):
        plain(conditions[0, :1], about[0, :1])


def test_what_inputs_say_is_a_ratio_to_the_rates():
    _, about, attributes = drawn_inputs_world()
    values = known_values(attributes)
    found = reading_inputs(AttributeClassifier(values, torch.zeros(21, 12)), about, attributes)
    said = found.likelier(about[0, :1])[0].exp()
    of_own = [value.startswith("0/") for value in values["question"]]
    assert_close(said[of_own].mean(), torch.tensor(2.0), rtol=0.1, atol=0)  # one half of all questions
    assert_close(said[[not own for own in of_own]], torch.full((6,), LEAST_RATIO), rtol=1.0, atol=0.1)


# --- tasks


def test_attributes_of_a_task_come_back_from_its_record():
    task = Task("t", ["Say it."], attributes={"language": "German", "form": "letter"})
    assert task.attributes == (("form", "letter"), ("language", "German"))
    assert task.to_dict()["attributes"] == {"form": "letter", "language": "German"}
    assert Task.from_dict(task.to_dict(), "line 1") == task
    assert hash(task) == hash(Task("t", ["Say it."], attributes=task.attributes))
    assert "attributes" not in Task("t", ["Say it."]).to_dict()  # older files stay as they are


@pytest.mark.parametrize("given", [{"language": 3}, {"": "German"}, {"language": " "}, "German"])
def test_attributes_that_are_no_texts_are_refused(given):
    with pytest.raises(ValueError, match="task 't': attributes are texts"):
        Task.from_dict({"name": "t", "prompts": ["Say it."], "attributes": given}, "line 1")


def test_every_built_in_task_has_a_question_and_most_have_a_format():
    for record in builtin_tasks():
        parts = record["attributes"]
        assert (
            "/".join([parts["question"], *([parts["format"]] if "format" in parts else [])]) == record["name"]
        )
    assert sum("format" in record["attributes"] for record in builtin_tasks()) > 600


# --- generators


@pytest.mark.parametrize("encoder", ["base", pytest.param("minilm_words", marks=pytest.mark.slow)])
def test_a_generator_carries_its_classifier(runs, tmp_path, encoder):
    bench = attribute_bench(runs, tmp_path / "run", encoder)
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    assert generator.config.attributes
    assert generator.config.condition_width == 4  # 2 questions, 2 forms
    told = recipe_encoder(bench)(PROMPTS)
    assert_close(told.view(2, 2, 2).sum(2), torch.ones(2, 2))
    folder = bench.recipe.generator_folder
    again = load_generator(folder)
    assert_close(again.encode_prompts(PROMPTS, bench.base), told)
    assert again.attributes.values == {"form": ("plain", "twice"), "question": ("first", "second")}
    assert "classifier of attributes" in (folder / "README.md").read_text()
    small = shrink(again)
    small.save_pretrained(tmp_path / "small")
    assert_close(load_generator(tmp_path / "small").encode_prompts(PROMPTS, bench.base), told)
    other = load_generator(folder)
    other.attributes = AttributeClassifier(other.attributes.values, -other.attributes.weight)
    assert generator_digest(other) != generator_digest(again)
    (folder / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{FILE} is missing"):
        load_generator(folder)


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_candidates_are_readings_of_the_prompt(bench):
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    with torch.no_grad():
        generator.centre.normal_(generator=torch.Generator().manual_seed(0))  # so that conditions matter
    (first,) = generator.generate(PROMPTS[:1], base=bench.base)
    made = generator.candidates(PROMPTS[0], 4, base=bench.base)
    for site, pair in first.adapter.items():
        assert_close(made[0].adapter[site], pair, rtol=1e-4, atol=1e-6)
    assert made[0].provenance.reading == generator.attributes.reading(
        generator.encode_prompts(PROMPTS[:1], bench.base)[0]
    )
    assert len({adapter_digest(one.adapter) for one in made}) == 4
    assert made[1].provenance.reading == made[0].provenance.reading
    read = [tuple(one.provenance.reading.items()) for one in made[1:]]
    assert len(set(read)) == 3
    conditions = generator.attributes.readings(generator.encode_prompts(PROMPTS[:1], bench.base)[0], 3)
    tokens = generator.tokens(conditions)[2]
    factors, _ = generator.clamp(generator.codec.decode(tokens))
    for site, pair in factors.items():
        assert_close(made[3].adapter[site], pair, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_examples_choose_the_reading(bench):
    """Which of the readings wins is up to the examples, and the adapter says which it was."""
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    wide = {site: (low, high * 1e3) for site, (low, high) in generator.config.norm_range.items()}
    generator.config = replace(generator.config, norm_range=wide)
    with torch.no_grad():
        generator.centre.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    pairs = [("w1 w2", "w3"), ("w4 w5", "w6")]
    made = generator.candidates(PROMPTS[0], 5, base=bench.base)
    wanted = best_candidate(made, bench.base, [Example(*pair) for pair in pairs])
    assert wanted is not made[0]
    options = {"base_model": bench.base.model, "tokenizer": bench.base.tokenizer}
    model = generate_adapter(PROMPTS[0], generator=generator, examples=pairs, num_candidates=5, **options)
    assert provenance_of(model).weights == wanted.provenance.weights
    assert provenance_of(model).reading == wanted.provenance.reading
    model.unload()


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_the_command_says_what_the_prompt_was_taken_for(bench, tmp_path, capsys):
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    (made,) = generator.generate(PROMPTS[:1], base=bench.base)
    for one in (bench.base.model, bench.base.tokenizer):
        one.save_pretrained(tmp_path / "base")
    named = ["--generator", str(bench.recipe.generator_folder), "--base-model", str(tmp_path / "base")]
    (tmp_path / "inputs.txt").write_text("w1 w2 w3\n\nw2 w4 w5\n")
    shown = ["--inputs", str(tmp_path / "inputs.txt"), "--out", str(tmp_path / "shown")]
    assert main(["generate", PROMPTS[0], *named, *shown]) == 0
    assert read_provenance(tmp_path / "shown").inputs == 2
    capsys.readouterr()
    assert main(["generate", PROMPTS[0], *named, "--out", str(tmp_path / "out")]) == 0
    assert f"read as {read_as(made.provenance)}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning")
def test_a_generator_reads_inputs_and_carries_what_it_reads(bench, tmp_path):
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    inputs = [example.input for example in bench.suite["a/first/plain"].train[:3]]
    told = generator.encode_prompts(PROMPTS[:1], bench.base, inputs=[inputs])
    assert not torch.equal(told, generator.encode_prompts(PROMPTS[:1], bench.base))
    again = load_generator(bench.recipe.generator_folder)
    assert_close(again.encode_prompts(PROMPTS[:1], bench.base, inputs=[inputs]), told)
    (made,) = generator.generate(PROMPTS[:1], base=bench.base, inputs=[inputs])
    assert made.provenance.inputs == 3
    assert made.provenance.reading == generator.attributes.reading(told[0])
    offered = generator.candidates(PROMPTS[0], 3, base=bench.base, inputs=inputs)
    assert [one.provenance.inputs for one in offered] == [3, 3, 3]
    for site, pair in made.adapter.items():
        assert_close(offered[0].adapter[site], pair, rtol=1e-4, atol=1e-6)
    options = {"base_model": bench.base.model, "tokenizer": bench.base.tokenizer}
    model = generate_adapter(PROMPTS[0], generator=generator, inputs=inputs, **options)
    assert provenance_of(model).weights == made.provenance.weights
    assert "this sentence and 3 inputs without answers" in adapter_card(made.spec, made.provenance)
    model.unload()
    other = replace(generator.attributes, rates=generator.attributes.rates * 2)
    before = generator_digest(generator)
    generator.attributes = other
    assert generator_digest(generator) != before


def test_inputs_that_nothing_reads_are_refused(bench, runs):
    encoder = PromptEncoder("base", base=bench.base)
    with pytest.raises(ValueError, match="these conditions read none"):
        encoder(PROMPTS[:1], inputs=[["w1 w2"]])
    train_generator(bench.recipe, bench=bench, progress=False)
    with pytest.raises(ValueError, match=r"inputs are one list a prompt.*1 prompts came with lists of \[0\]"):
        recipe_encoder(bench)(PROMPTS[:1], inputs=[[]])
    for wrong in ("w1", ["w1", " "], [3]):
        with pytest.raises(ValueError, match="inputs are several texts"):
            as_inputs(wrong)


def test_tasks_without_examples_teach_no_inputs(bench):
    encoder = PromptEncoder("base", base=bench.base)
    tasks = list(bench.suite.split("train"))
    bare = Task(tasks[0].name, tasks[0].prompts, attributes=tasks[0].attributes)
    plain = AttributeClassifier(known_values([t.attributes for t in tasks]), torch.zeros(17, 4))
    assert told_inputs(plain, encoder, [bare, *tasks[1:]]) is plain
    assert told_inputs(plain, encoder, tasks).inputs.shape == (bench.base.model.config.hidden_size + 1, 4)
    assert all(1 <= len(draw) <= MOST_INPUTS for draw in drawn_inputs(tasks[0]))
    assert drawn_inputs(bare) == []


def test_the_classifier_is_fitted_once_and_for_these_tasks(bench, runs):
    with pytest.raises(FileNotFoundError, match="this recipe reads attributes"):
        recipe_encoder(bench)
    train_generator(bench.recipe, bench=bench, progress=False)
    file = bench.recipe.folder / FILE
    before = file.read_bytes()
    assert recipe_attributes(runs.recipe) is None
    train_generator(bench.recipe, bench=bench, progress=False)
    assert file.read_bytes() == before
    renamed = {n: replace_attributes(task) for n, task in bench.suite.tasks.items()}
    other = replace(bench, suite=TaskSuite("tiny", renamed, bench.suite.splits))
    with pytest.raises(ValueError, match=r"trained with another \['tasks'\]"):
        train_generator(bench.recipe, bench=other, progress=False)
    assert load_file(file)["weight"].shape[1] == 4


def replace_attributes(task):
    return Task.from_dict({**task.to_dict(), "attributes": {"other": task.domain}}, "here")


def test_conditions_before_the_attributes_are_kept_for_other_recipes(bench):
    train_generator(bench.recipe, bench=bench, progress=False)
    (kept,) = (bench.recipe.folder / "cache").glob("conditions-*.safetensors")
    plain = PromptEncoder("base", base=bench.base)
    assert load_file(kept)["conditions"].shape[-1] == plain.width


def test_attributes_beside_examples_are_refused():
    with pytest.raises(ValueError, match="reads prompts alone"):
        ConditionConfig("minilm", examples=4, attributes=True)
