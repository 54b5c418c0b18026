"""The rival generators: a name says all that differs, gradient steps are equal, made once."""

import importlib
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_bench import collected

from ltdi_peft.config import LOSSES, TaskLossConfig
from ltdi_peft.session import Session
from ltdi_peft.variants import VARIANTS, gradient_steps, train_variant, variant_recipe, variant_trials

training = importlib.import_module("ltdi_peft.train")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = collected(tmp_path_factory.mktemp("variants"))
    return replace(bench, recipe=replace(bench.recipe, train=replace(bench.recipe.train, steps=6)))


@pytest.fixture(scope="module")
def trained(bench):
    """Name → generator, and the number of gradients that each computed."""
    counts, original = {}, Session.weight_space_loss

    def train(name):
        def counted(self, rng):
            counts[name] = counts.get(name, 0) + 1
            return original(self, rng)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "weight_space_loss", counted)
            return train_variant(bench.recipe, bench, name, progress=False)

    return {name: train(name) for name in ("naive", "naive+reptile", "vanilla")}, counts


def test_there_is_a_variant_of_every_loss_with_and_without_reptile():
    assert {*VARIANTS} == {*LOSSES, *(f"{loss}+reptile" for loss in LOSSES), "ours+task_loss", "task_loss"}


def test_a_name_says_all_that_differs(bench):
    recipe = bench.recipe
    found = variant_recipe(recipe, "naive+reptile")
    assert (found.diffusion.loss, found.diffusion.centre, found.meta.method) == ("naive", "mean", "reptile")
    back = replace(found, diffusion=recipe.diffusion, meta=recipe.meta)
    assert replace(back, train=replace(back.train, steps=6)) == recipe
    with pytest.raises(ValueError, match=r"no variant 'naive\+adam'; known variants are \['vanilla'"):
        variant_recipe(recipe, "naive+adam")


@pytest.mark.parametrize(("steps", "inner", "meta"), [(6, 3, 2), (1500, 3, 500), (7, 3, 3), (2, 5, 1)])
def test_gradient_steps_are_those_of_the_recipe(bench, steps, inner, meta):
    recipe = replace(
        bench.recipe,
        train=replace(bench.recipe.train, steps=steps),
        meta=replace(bench.recipe.meta, inner_steps=inner),
    )
    plain, reptile = (variant_recipe(recipe, name) for name in ("vanilla", "vanilla+reptile"))
    assert (plain.train.steps, reptile.train.steps) == (steps, meta)
    assert steps <= gradient_steps(reptile) < steps + inner
    # Where ours is trained by REPTILE itself, the plain variants get as many more steps.
    ours = replace(recipe, meta=replace(recipe.meta, method="reptile"))
    assert variant_recipe(ours, "vanilla").train.steps == gradient_steps(ours) == steps * inner
    assert variant_recipe(ours, "vanilla+reptile").train.steps == steps


def test_task_loss_is_a_second_stage_or_the_only_one(bench):
    about = TaskLossConfig(tasks=2, examples=2)
    recipe = replace(
        bench.recipe,
        train=replace(bench.recipe.train, task_loss=about),
        evaluate=replace(bench.recipe.evaluate, task_loss_steps=4),
    )
    second, alone = (variant_recipe(recipe, name) for name in ("ours+task_loss", "task_loss"))
    assert second.diffusion == recipe.diffusion
    assert (second.train.steps, second.train.task_loss) == (recipe.train.steps, replace(about, steps=4))
    assert (alone.diffusion.centre, alone.train.steps) == ("mean", 0)
    assert alone.train.task_loss == replace(about, steps=4, weight_space=0.0)

    made = train_variant(recipe, bench, "task_loss", progress=False)
    torch.testing.assert_close(made.predicted_centre(made.conditions), made.mean.expand(5, -1, -1))
    told = variant_trials(recipe, "task_loss")
    assert (told["steps"], told["task_loss_steps"]) == (0, 4)
    assert told["seconds"]["weights"] == 0 < told["seconds"]["task_loss"]


def test_as_many_gradients_are_computed_as_are_told(bench, trained):
    _, counts = trained
    units = bench.recipe.train.units
    told = {name: variant_trials(bench.recipe, name)["gradient_steps"] for name in counts}
    assert told == {"naive": 6, "naive+reptile": 6, "vanilla": 6}
    assert counts == {name: units * steps for name, steps in told.items()}


def test_reptile_trains_another_network_around_the_same_centre(trained):
    plain, reptile, vanilla = (trained[0][name] for name in ("naive", "naive+reptile", "vanilla"))
    for one in (plain, reptile, vanilla):
        torch.testing.assert_close(one.predicted_centre(one.conditions), one.mean.expand(5, -1, -1))
    assert torch.equal(plain.mean, reptile.mean)
    assert [one.config.loss for one in (plain, reptile, vanilla)] == ["naive", "naive", "vanilla"]
    weights = [torch.cat([p.flatten() for p in one.denoiser.parameters()]) for one in (plain, reptile)]
    assert not torch.allclose(*weights)


def test_a_variant_is_made_once(bench, trained, monkeypatch):
    def never(*args, **kwargs):
        raise RuntimeError("trained again")

    monkeypatch.setattr(training, "Session", never)
    for name, made in trained[0].items():
        again = train_variant(bench.recipe, bench, name, progress=False)
        for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    longer = replace(bench.recipe, train=replace(bench.recipe.train, steps=9))
    with pytest.raises(ValueError, match=r"was made with other \['recipe\.train\.steps'\]"):
        train_variant(longer, bench, "naive+reptile", progress=False)
    shutil.rmtree(bench.recipe.folder / "variants" / "naive+reptile" / "checkpoints")
    with pytest.raises(RuntimeError, match="trained again"):  # control: another length is not taken for this
        train_variant(longer, bench, "naive+reptile", progress=False)
