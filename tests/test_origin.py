"""The origin: differences are learned from one start and added to another that was trained on."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import collected, link_runs

from ltdi_peft.adapter import save_adapter_folder
from ltdi_peft.baselines import adapter_digest
from ltdi_peft.collect import shared_start
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.evaluate import evaluate
from ltdi_peft.files import read_json
from ltdi_peft.generator import load_generator
from ltdi_peft.multi_task import multi_task_plan
from ltdi_peft.origin import at_origin, recipe_origin, train_origin
from ltdi_peft.prepare import prepare
from ltdi_peft.resume import made_from
from ltdi_peft.spec import SpecMismatchError, moved, site_norms
from ltdi_peft.train import train_generator


def with_origin(bench, steps):
    recipe = replace(bench.recipe, train=replace(bench.recipe.train, origin_steps=steps))
    return replace(bench, recipe=recipe)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return with_origin(collected(tmp_path_factory.mktemp("origin")), 4)


@pytest.fixture(scope="module")
def origin(bench):
    return train_origin(bench, shared_start(bench, progress=False), progress=False)[0]


@pytest.fixture(scope="module")
def prepared(bench):
    return prepare(bench.recipe, PromptEncoder("base", base=bench.base), bench.suite)


def test_tokens_are_the_same_differences_counted_from_the_origin(bench, prepared, origin):
    start, tokens = shared_start(bench, progress=False), prepared.data.tokens[0, -1]
    there = at_origin(prepared, origin)
    assert there.data is prepared.data
    decoded, expected = there.codec.decode(tokens), moved(prepared.codec.decode(tokens), start, origin)
    nothing = there.codec.decode(torch.zeros_like(tokens))
    for site, factors in expected.items():
        torch.testing.assert_close(decoded[site], factors)
        torch.testing.assert_close(nothing[site], origin[site])
        assert not torch.equal(origin[site][1], start[site][1]), "the origin was trained"


def test_every_training_adapter_is_inside_the_range_of_norms(prepared, origin):
    there = at_origin(prepared, origin)
    for tokens in prepared.data.tokens:
        for site, norm in site_norms(there.codec.spec, there.codec.decode(tokens[-1])).items():
            low, high = there.norm_range[site]
            assert low <= norm <= high
    assert there.norm_range != prepared.norm_range


def test_moving_back_and_forth_gives_the_adapter_again(bench, prepared, origin):
    start, adapter = shared_start(bench, progress=False), prepared.codec.decode(prepared.data.tokens[0, -1])
    back = moved(moved(adapter, start, origin), origin, start)
    for site, factors in adapter.items():
        torch.testing.assert_close(back[site], factors)


def test_it_is_made_once_and_another_number_of_steps_is_refused(bench, origin):
    start = shared_start(bench, progress=False)
    again, about = train_origin(bench, start, progress=False)
    assert all(torch.equal(a, b) for site in origin for a, b in zip(origin[site], again[site], strict=True))
    assert about["steps"] == 4
    with pytest.raises(ValueError, match=r"origin was trained with another \['examples', 'fit'\]"):
        train_origin(with_origin(bench, 5), start, progress=False)


def test_only_where_all_runs_share_a(bench):
    canonical = replace(bench.recipe, collect=replace(bench.recipe.collect, gauge="canonical"))
    with pytest.raises(ValueError, match=r"origin_steps is 4, but collect\.gauge is 'canonical'"):
        train_origin(replace(bench, recipe=canonical), None, progress=False)


def test_the_rival_sees_as_many_examples_more(bench):
    start = shared_start(bench, progress=False)
    rules = [multi_task_plan(with_origin(bench, steps), start)["rule"] for steps in (0, 4)]
    assert rules[1] - rules[0] == 4


def test_generator_and_table_begin_at_the_origin(bench, origin, tmp_path):
    about = replace(bench.recipe.evaluate, methods=("mean", "ridge", "nearest", "ours", "oracle_codec"))
    bench = replace(bench, recipe=replace(bench.recipe, evaluate=about))
    generator = train_generator(bench.recipe, bench=bench, progress=False)
    written = load_generator(bench.recipe.generator_folder)
    for codec in (generator.codec, written.codec):
        for site, factors in codec.decode(torch.zeros_like(generator.mean)).items():
            torch.testing.assert_close(factors, origin[site])
    result = evaluate(bench.recipe, bench=bench, generator=generator, results=tmp_path, progress=False)
    assert list(result["methods"])[:3] == ["base", "start", "origin"]
    assert result["trials"]["origin"]["steps"] == 4
    other = with_origin(bench, 5)  # refused before an origin of 5 steps is asked for, which takes long
    with pytest.raises(ValueError, match=r"was made with other \['recipe.train.origin_steps'\]"):
        train_generator(other.recipe, bench=other, progress=False)
    for row in result["per_task"].values():  # distances are those of the same difference from the start
        assert row["error"]["origin"] == pytest.approx(row["error"]["start"], rel=1e-4)
        assert row["error"]["ours"] < 1 < row["error"]["base"] + 1e-6


# ---- one that is there


def given(bench, folder, output=None):
    train = replace(bench.recipe.train, origin_steps=0, origin=str(folder))
    recipe = replace(bench.recipe, train=train, output=str(output or bench.recipe.output))
    return replace(bench, recipe=recipe)


def test_a_given_origin_makes_what_the_trained_one_makes(bench, origin, tmp_path):
    expected = train_generator(bench.recipe, bench=bench, progress=False)
    folder = tmp_path / "other" / "place"
    save_adapter_folder(folder, bench.spec, origin)
    other = given(bench, folder, link_runs(bench.recipe, tmp_path / "run"))
    made = train_generator(other.recipe, bench=other, progress=False)
    conditions = made.conditions[:2]
    for one, two in zip(made.tokens(conditions), expected.tokens(conditions), strict=True):
        assert adapter_digest(made.codec.decode(one)) == adapter_digest(expected.codec.decode(two))
    assert made.config.recipe["train"]["origin"] == "place"
    save_adapter_folder(folder, bench.spec, shared_start(bench, progress=False), overwrite=True)
    with pytest.raises(ValueError, match=r"was made with other \['origin'\]"):
        train_generator(other.recipe, bench=other, progress=False)


def test_a_given_origin_is_trained_on_with_a_rate_of_its_own(bench, origin, tmp_path):
    save_adapter_folder(tmp_path / "place", bench.spec, origin)
    other = given(bench, tmp_path / "place", link_runs(bench.recipe, tmp_path / "run"))
    further = {"origin_steps": 3, "origin_learning_rate": 1e-3}
    recipe = replace(other.recipe, train=replace(other.recipe.train, **further))
    made, about = recipe_origin(replace(other, recipe=recipe), origin, progress=False)
    assert about["steps"] == 3
    plan = read_json(recipe.folder / "origin" / "curve.json")["plan"]
    assert (plan["start"], plan["fit"]["learning_rate"]) == (adapter_digest(origin), 1e-3)
    # Its best on validation tasks, where nothing is learned of so few steps, may be where it began.
    assert set(made) == set(origin)
    generator = train_generator(recipe, bench=replace(other, recipe=recipe), progress=False)
    nothing = generator.codec.decode(torch.zeros_like(generator.mean))
    for site, factors in made.items():
        torch.testing.assert_close(nothing[site], factors)


def test_a_resume_point_knows_the_origin_in_use_not_the_one_on_disk(bench, prepared, origin, tmp_path):
    folder, start = tmp_path / "place", shared_start(bench, progress=False)
    save_adapter_folder(folder, bench.spec, origin)
    recipe, there = given(bench, folder).recipe, at_origin(prepared, origin)
    made = made_from(recipe, there)
    save_adapter_folder(folder, bench.spec, start, overwrite=True)
    assert made_from(recipe, there) == made
    assert made_from(recipe, at_origin(prepared, start)) != made


def test_the_table_begins_at_a_given_origin(bench, origin, tmp_path):
    folder = tmp_path / "place"
    save_adapter_folder(folder, bench.spec, origin)
    about = replace(bench.recipe.evaluate, methods=("mean", "ours"))
    other = given(bench, folder, link_runs(bench.recipe, tmp_path / "run"))
    other = replace(other, recipe=replace(other.recipe, evaluate=about))
    train_generator(other.recipe, bench=other, progress=False)
    result = evaluate(other.recipe, bench=other, results=tmp_path, progress=False)
    assert list(result["methods"])[:3] == ["base", "start", "origin"]
    assert result["trials"]["origin"] == {"given": True}


def test_a_given_origin_that_does_not_fit_is_refused(bench, origin, tmp_path):
    start = shared_start(bench, progress=False)
    save_adapter_folder(tmp_path / "origin", bench.spec, origin)
    one = given(bench, tmp_path / "origin")
    canonical = replace(one.recipe, collect=replace(one.recipe.collect, gauge="canonical"))
    with pytest.raises(ValueError, match=r"train\.origin is .*, but collect\.gauge is 'canonical'"):
        recipe_origin(replace(one, recipe=canonical), None, progress=False)
    name = bench.spec.sites[0].name
    fewer = replace(bench.spec, sites=tuple(site for site in bench.spec.sites if site.name != name))
    rest = {site: pair for site, pair in origin.items() if site != name}
    save_adapter_folder(tmp_path / "fewer", fewer, rest)
    with pytest.raises(SpecMismatchError, match=name):
        recipe_origin(given(bench, tmp_path / "fewer"), start, progress=False)
