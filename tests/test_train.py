"""Training as a whole: what it writes, where it goes on, what it refuses, and what it leaves alone."""

import importlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_bench import SPLITS, tiny_bench

from ltdi_peft.collect import open_bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.encoding import validation_targets
from ltdi_peft.generator import load_generator
from ltdi_peft.guidance import GUIDANCE, MEAN_SHARES, Guidance, Tried
from ltdi_peft.prepare import GateError, prepare
from ltdi_peft.session import Session
from ltdi_peft.spec import SpecMismatchError
from ltdi_peft.stages import FIRST_STAGE, SHARES, best_share, share_accuracies
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.train import (
    finished,
    told,
    train_generator,
    validate,
    validation_runs,
    validation_set,
)

room = importlib.import_module("ltdi_peft.train")


@pytest.fixture(scope="module")
def bench(world):
    return open_bench(world.recipe)


@pytest.fixture
def copied(world, tmp_path):
    """copied(**sections) → the world's recipe over a copy of its runs, nothing trained yet."""

    def build(**sections):
        folder = tmp_path / "run"
        for name in ("trajectories", "held_out", "start"):
            shutil.copytree(world.recipe.folder / name, folder / name, dirs_exist_ok=True)
        return world.changed(folder, **sections)

    return build


def trained(recipe, bench):
    return train_generator(recipe, bench=replace(bench, recipe=recipe), progress=False)


def generator_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "generator").iterdir())}


def never(*args, **kwargs):
    raise AssertionError("trained again")


def state_of(session):
    return [p.detach().clone() for p in session.network.parameters()] + [m.clone() for m in session.average]


# ---- the whole


def test_what_training_writes(world):
    report = json.loads((world.recipe.folder / "training.json").read_text())
    assert report["world_size"] == 1
    assert [step for step, _ in report["losses"]] == list(range(1, 9))
    assert report["final_loss"] == report["losses"][-1][1]
    assert all(math.isfinite(loss) for _, loss in report["losses"])
    assert set(report["guidance"]) == {str(share) for share in MEAN_SHARES}
    assert all(set(found) == {str(scale) for scale in GUIDANCE} for found in report["guidance"].values())
    assert report["validation/relative_error"] > 0
    assert set(generator_bytes(world.recipe.folder)) == {
        "README.md", "codec.safetensors", "config.json", "model.safetensors",
    }  # fmt: skip
    assert set(json.loads((world.recipe.folder / "timings.json").read_text())) == {"collect", "train"}


def test_what_is_trained_is_only_read(world, bench, monkeypatch):
    monkeypatch.setattr(room, "Session", never)
    before = generator_bytes(world.recipe.folder)
    generator = trained(world.recipe, bench)
    assert generator.config.training_tasks == tuple(sorted(SPLITS["train"]))
    assert generator_bytes(world.recipe.folder) == before


def test_interrupted_and_resumed_equals_uninterrupted(world, bench, copied, monkeypatch):
    recipe = copied(train={"log_every": 3})  # what may differ: how often it is logged
    step = Session.step

    def interrupted(self):
        if self.done == 6:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, bench)
    assert not (recipe.folder / "generator").exists()
    begun = []
    monkeypatch.setattr(Session, "step", lambda self: (begun.append(self.done), step(self))[1])
    trained(recipe, bench)
    assert begun[0] == 4  # the resume point
    got, want = (generator_bytes(folder) for folder in (recipe.folder, world.recipe.folder))
    assert got["model.safetensors"] == want["model.safetensors"]
    assert got["codec.safetensors"] == want["codec.safetensors"]


def test_both_stages_and_tensorboard(bench, copied):
    about = {"steps": 2, "tasks": 2, "examples": 2}
    recipe = copied(train={"steps": 2, "log_with": "tensorboard", "validate_every": 1, "task_loss": about})
    trained(recipe, bench)
    report = json.loads((recipe.folder / "training.json").read_text())
    assert [step for step, _ in report["losses"]] == [1, 2, 3, 4]
    assert len(list((recipe.folder / "logs").rglob("events.*"))) == 1
    assert load_generator(recipe.generator_folder).config.k == 3


def test_reptile_trains(bench, copied):
    recipe = copied(meta={"method": "reptile"})
    trained(recipe, bench)
    assert not (recipe.folder / "logs").exists()  # log_with: null
    assert json.loads((recipe.folder / "training.json").read_text())["final_loss"] > 0


def test_other_settings_in_one_output_are_refused(bench, copied):
    recipe = copied(train={"steps": 2})
    trained(recipe, bench)
    changed = copied(train={"steps": 3}, diffusion={"loss": "vanilla"})
    with pytest.raises(ValueError, match=r"other \['recipe.diffusion.loss', 'recipe.train.steps'\]"):
        trained(changed, bench)


def test_finished_asks_for_generator_and_settings(world, tmp_path):
    made = json.loads((world.recipe.folder / "training.json").read_text())["made_from"]
    assert finished(world.recipe.folder, made)
    assert not finished(world.recipe.folder, {**made, "collected runs": "0"})
    assert not finished(tmp_path, made)


# ---- validation leaves everything as it was


@pytest.fixture(scope="module")
def session(world, bench):
    encoder = PromptEncoder("base", base=bench.base)
    prepared = prepare(world.recipe, encoder, bench.suite)
    session = Session(world.recipe, prepared, Accelerator(cpu=True), bench)
    session.step()
    return session


@pytest.fixture(scope="module")
def validation(world, bench, session):
    encoder = PromptEncoder("base", base=bench.base)
    runs = validation_runs(world.recipe, bench)
    targets = validation_targets(world.recipe, session.prepared, runs, SPLITS["validation"])
    return validation_set(targets, encoder, bench)


def test_validate_leaves_the_session_alone(session, validation):
    before, state = state_of(session), torch.get_rng_state()
    first = validate(session, validation)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(session), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert session.network.training
    assert validate(session, validation) == first


def test_a_network_that_names_the_truth_has_no_error(session, validation, monkeypatch):
    centre = session.prepared.centre
    z = (validation.tokens - centre.predict(validation.conditions)) / centre.spread

    def perfect(network, condition):
        def predict(x, t):
            return z[torch.arange(len(x)), session.chain.segment(t) - 1]

        return predict

    monkeypatch.setattr(room, "conditioned", perfect)
    found = validate(session, validation)
    assert found["validation/path_loss"] == pytest.approx(0, abs=1e-10)
    assert found["validation/relative_error"] == pytest.approx(0, abs=1e-10)


def test_an_error_of_the_main_process_is_told_to_all():
    def work():
        raise GateError("numbers")

    with pytest.raises(GateError, match="numbers"):
        told(Accelerator(cpu=True), work)
    assert told(Accelerator(cpu=True), lambda: 3) == 3


def test_what_no_refusal_foresaw_is_told_too(monkeypatch):
    """The others raise as well, instead of waiting for an answer that never comes."""
    sent = []
    monkeypatch.setattr(room, "broadcast_object_list", lambda found: sent.append(found) or found)

    def work():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        told(Accelerator(cpu=True), work)
    monkeypatch.setattr(room, "broadcast_object_list", lambda found: sent[0])
    other = Accelerator(cpu=True)
    monkeypatch.setattr(type(other), "is_main_process", property(lambda self: False))
    with pytest.raises(RuntimeError, match=r"the main process failed: OSError.*no space left"):
        told(other, lambda: pytest.fail("work of the main process alone"))


# ---- refusals


def test_a_narrow_codec_stops_training_with_the_numbers(bench, copied, monkeypatch):
    monkeypatch.setattr(room, "Session", never)
    with pytest.raises(GateError, match=r"keeps -?\d\.\d+ of .*before, .*after, .*codec\.gate asks for 1\.0"):
        trained(copied(codec={"width": 1, "gate": 1.0}), bench)


def test_nothing_collected_is_refused_before_the_base_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "open_bench", never)
    with pytest.raises(ValueError, match=r"finished runs of 0 training tasks.*ltdi collect"):
        train_generator(world.changed(tmp_path))


def test_runs_of_another_adapter_are_refused(world, copied):
    recipe = copied(adapter={"rank": 3})
    recipe = replace(recipe, base=replace(recipe.base, model="tiny/llama"))
    with pytest.raises(SpecMismatchError, match=r"expected 'tiny/llama'"):
        trained(recipe, tiny_bench(recipe))
    with pytest.raises(SpecMismatchError, match=r"rank 2, expected 3"):
        trained(copied(adapter={"rank": 3}), open_bench(copied(adapter={"rank": 3})))


def test_validation_runs_are_those_of_validation_tasks(world, bench, tmp_path):
    runs = validation_runs(world.recipe, bench)
    assert [run.task.name for run in runs] == list(SPLITS["validation"])
    assert validation_runs(world.changed(tmp_path), bench) == []
    assert not (tmp_path / "held_out").exists()
    assert len(TrajectoryStore(world.recipe.held_out_folder).trajectories()) > len(runs)


# ---- how much of the second stage is kept


def guided(*accuracies):
    """Trials, each with its accuracy on two tasks."""
    trials, values = zip(*accuracies, strict=True)
    return Tried(tuple(Guidance(*one) for one in trials), torch.tensor(values)[:, None].expand(-1, 2))


# As two contexts might have it.
GUIDED = {
    "prompt": guided(((1.0, 1.0), 0.1), ((1.25, 1.0), 0.9), ((1.0, 0.0), 0.2)),
    "no_prompt": guided(((1.0, 1.0), 0.1), ((1.0, 0.0), 0.2), ((2.0, 0.0), 0.9)),
}


def test_the_share_of_task_loss_is_chosen_on_validation_tasks(world, bench, copied, monkeypatch):
    about = {"steps": 3, "tasks": 2, "examples": 2, "learning_rate": 0.05}
    recipe = copied(train={"steps": 2, "task_loss": about})
    seen = {}

    def favoured(generator, first, *_, context):
        seen["first"] = first
        seen["second"] = {key: weight.clone() for key, weight in generator.denoiser.state_dict().items()}
        return {"0.0": 0.1, "0.25": 0.5, "1.0": 0.2 if context == "prompt" else 0.6}

    monkeypatch.setattr(room, "share_accuracies", favoured)
    monkeypatch.setattr(room, "choose_guidance", lambda *_, context: GUIDED[context])
    trained(recipe, bench)
    generator = load_generator(recipe.generator_folder)
    got = generator.denoiser.state_dict()
    assert any(not seen["first"][key].equal(seen["second"][key]) for key in got)
    for key, weight in got.items():
        torch.testing.assert_close(weight, 0.75 * seen["first"][key] + 0.25 * seen["second"][key])
    report = json.loads((recipe.folder / "training.json").read_text())
    assert report["task_loss_share"]["0.25"] == 0.5
    # And once more for adapters that work alone.
    assert report["alone"]["task_loss_share"]["1.0"] == 0.6
    twin = generator.purposed(prompt_in_context=False)
    for key, weight in twin.denoiser.state_dict().items():
        torch.testing.assert_close(weight, seen["second"][key], rtol=0, atol=0)
    assert (generator.config.guidance_scale, twin.config.guidance_scale) == (1.25, 2.0)
    assert (generator.config.mean_share, twin.config.mean_share) == (1.0, 0.0)
    conditions = generator.conditions[:2]
    both = [one.tokens(conditions) for one in (generator, twin)]
    assert not torch.equal(*both)
    assert generator.purposed(prompt_in_context=True) is generator
    assert twin.codec is generator.codec

    # The first stage is what the same recipe trains without the second.
    shutil.rmtree(recipe.folder / "checkpoints")
    alone = copied(train={"steps": 2})
    trained(alone, bench)
    for key, weight in load_generator(alone.generator_folder).denoiser.state_dict().items():
        torch.testing.assert_close(weight, seen["first"][key], rtol=0, atol=0)


def test_adapters_alone_have_a_training_of_their_own(world, bench, copied, monkeypatch):
    about = {"steps": 2, "tasks": 2, "examples": 2, "learning_rate": 0.05, "prompt_in_context": 1.0}
    both = copied(train={"steps": 2, "task_loss": {**about, "alone_steps": 3}})
    last = {"0.0": 0.1, "1.0": 0.2}
    monkeypatch.setattr(room, "share_accuracies", lambda *_, context: last)
    monkeypatch.setattr(room, "choose_guidance", lambda *_, context: GUIDED[context])
    trained(both, bench)
    generator = load_generator(both.generator_folder)
    assert generator.config.recipe["train"]["task_loss"]["alone_steps"] == 3
    report = json.loads((both.folder / "training.json").read_text())
    assert [part[-1][0] for part in (report["losses"], report["alone_training"]["losses"])] == [4, 5]
    got = [generator.denoiser.state_dict(), generator.purposed(prompt_in_context=False).denoiser.state_dict()]

    # Each network is the one that a recipe of its own trains; what that left is gone on from.
    shutil.rmtree(both.folder / "alone" / "checkpoints")
    shutil.rmtree(both.folder / "checkpoints")
    for found, own in zip(got, (about, {**about, "steps": 3, "prompt_in_context": 0.0}), strict=True):
        trained(copied(train={"steps": 2, "task_loss": own}), bench)
        for key, weight in load_generator(both.generator_folder).denoiser.state_dict().items():
            torch.testing.assert_close(weight, found[key], rtol=0, atol=0)
        shutil.rmtree(both.folder / "checkpoints")


def test_a_network_for_adapters_alone_is_kept_without_validation_runs(bench, copied):
    about = {"steps": 1, "tasks": 2, "examples": 2, "alone_steps": 2}
    recipe = copied(train={"steps": 1, "task_loss": about})
    shutil.rmtree(recipe.folder / "held_out")
    trained(recipe, bench)
    generator = load_generator(recipe.generator_folder)
    assert generator.purposed(prompt_in_context=False) is not generator


def test_one_stage_alone_has_no_share(bench, copied):
    about = {"steps": 2, "tasks": 2, "examples": 2, "weight_space": 0.0}
    recipe = copied(train={"steps": 0, "task_loss": about}, diffusion={"centre": "mean"})
    trained(recipe, bench)
    assert not (recipe.folder / "checkpoints" / FIRST_STAGE).exists()
    assert "task_loss_share" not in json.loads((recipe.folder / "training.json").read_text())


def test_shares_are_scored_and_the_generator_stays_as_it_was(world, bench):
    generator = load_generator(world.recipe.generator_folder)
    second = {key: weight.clone() for key, weight in generator.denoiser.state_dict().items()}
    silent = {key: torch.zeros_like(weight) for key, weight in second.items()}
    names = SPLITS["validation"]
    found = share_accuracies(generator, second, bench, names, examples=4)
    assert [*map(float, found)] == list(SHARES)
    assert len(set(found.values())) == 1  # both ends are the same network
    moved = share_accuracies(generator, silent, bench, names, examples=4)
    assert moved["1.0"] == found["1.0"]
    for key, weight in generator.denoiser.state_dict().items():
        assert weight.equal(second[key])


def test_of_equal_shares_the_largest_is_taken():
    assert best_share({"0.0": 0.4, "0.5": 0.6, "1.0": 0.6}) == 1.0
    assert best_share({"0.0": 0.7, "0.5": 0.6, "1.0": 0.6}) == 0.0
