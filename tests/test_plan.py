"""The plan against what is really written, counted by hand, and without a base model."""

import dataclasses

import pytest
import torch
from tiny_bench import link_runs
from transformers import AutoConfig

from ltdi_peft import plan as planning
from ltdi_peft import shapes as shaping
from ltdi_peft import speed as measuring
from ltdi_peft.collect import collect
from ltdi_peft.config import Recipe, SuiteConfig, TuningConfig
from ltdi_peft.forecast import ENCODER_FLOP, Forecast
from ltdi_peft.generator import load_generator
from ltdi_peft.plan import clock, file_bytes, memory, network_config, plan, plan_lines, size
from ltdi_peft.prepare import cache_file, training_trajectories
from ltdi_peft.protocol import METHODS
from ltdi_peft.shapes import SMOLLM2_SHAPE, shapes
from ltdi_peft.speed import Line, Speed, line, measured
from ltdi_peft.stages import FIRST_STAGE
from ltdi_peft.train import train_generator
from ltdi_peft.tuning import recipe_tuning

ONE = Speed(
    True, Line(0.0, 1.0), Line(0.0, 1.0), Line(0.0, 1.0), 0.0, 1.0, 1e30, 1e30
)  # a second a token and layer


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def near(got, real, share):
    return abs(got - real) <= share * real


def test_bytes_are_those_of_a_collected_and_trained_recipe(world):
    found, _, _ = file_bytes(shapes(world.recipe))
    recipe = world.recipe
    assert near(found["trajectories"], bytes_of(recipe.store_folder), 0.01)
    assert near(found["held_out"], bytes_of(recipe.held_out_folder), 0.01)
    runs = training_trajectories(recipe, load_generator(recipe.generator_folder).config.training_tasks)
    tokens, codec = (cache_file(recipe, runs, what) for what in ("tokens", "codec"))
    # Of these the tensors alone are counted: the headers, 2 kB and less, show in a tiny generator only.
    assert 0 <= tokens.stat().st_size - found["tokens"] < 200
    assert 0 <= codec.stat().st_size - found["codec"] < 3000
    assert 0 <= bytes_of(recipe.generator_folder) - found["generator"] < 13000
    weights = sum(p.numel() for p in load_generator(recipe.generator_folder).denoiser.parameters())
    points = list((recipe.folder / "checkpoints").glob("step-*"))
    assert found["checkpoints"] == len(points) * 4 * 4 * weights  # weights, their average, AdamW's two
    assert found["total"] == sum(number for name, number in found.items() if name != "total")


def test_a_second_network_is_counted(world, tmp_path):
    about = {"steps": 1, "tasks": 2, "examples": 2, "alone_steps": 2}
    recipe = world.changed(link_runs(world.recipe, tmp_path), train={"steps": 1, "task_loss": about})
    assert plan(recipe)["steps"]["generator"] == 5
    found, _, _ = file_bytes(shapes(recipe))
    generator = train_generator(recipe, progress=False)
    assert 0 <= bytes_of(recipe.generator_folder) - found["generator"] < 20000
    weights = sum(p.numel() for p in generator.denoiser.parameters())
    points, firsts = (len(list(tmp_path.rglob(name))) for name in ("step-*", FIRST_STAGE))
    assert (points, firsts) == (2, 2)
    assert found["checkpoints"] == (4 * points + firsts) * 4 * weights


def test_a_tuned_encoder_is_counted(world, tmp_path):
    about = {"steps": 3, "layers": 2, "rank": 4, "tasks": 4}
    condition = {"encoder": "minilm_words", "tuning": about}
    recipe = world.changed(link_runs(world.recipe, tmp_path), condition=condition, train={"steps": 1})
    assert plan(recipe)["steps"]["encoder"] == 3
    found, _, _ = file_bytes(shapes(recipe))
    train_generator(recipe, progress=False)
    assert 0 <= bytes_of(recipe.generator_folder) - found["generator"] < 20000
    plain = dataclasses.replace(recipe.condition, tuning=TuningConfig())
    untuned = dataclasses.replace(recipe, condition=plain)
    numbers = (found["generator"] - file_bytes(shapes(untuned))[0]["generator"]) // 4
    assert numbers == sum(weight.numel() for pair in recipe_tuning(recipe).values() for weight in pair)
    speed = dataclasses.replace(ONE, float32=1.0)
    seconds = [Forecast(shapes(one), speed, 1, 0, 0, 8).train(0) for one in (recipe, untuned)]
    tokens = 3 * 4 * shapes(recipe).prompt_tokens
    assert seconds[0] - seconds[1] == pytest.approx(tokens * ENCODER_FLOP * (1 + 4 / 6))


def test_a_classifier_of_attributes_is_counted(world, tmp_path):
    recipe = world.changed(link_runs(world.recipe, tmp_path), condition={"attributes": True})
    found, network, _ = file_bytes(shapes(recipe))
    assert network.condition_width == 4  # two questions, two forms
    train_generator(recipe, progress=False)
    assert 0 <= bytes_of(recipe.generator_folder) - found["generator"] < 20000


def test_bytes_follow_the_recipe(world, tmp_path):
    changes = {"gauge": "shared_start", "start": "fresh", "snapshot_dtype": "float16", "equal_parts": 5}
    recipe = world.changed(tmp_path, collect=changes)
    collect(recipe, progress=False)
    found, _, _ = file_bytes(shapes(recipe))
    assert near(found["trajectories"], bytes_of(recipe.store_folder), 0.01)
    assert found["start"] == 0
    assert not (recipe.folder / "start").exists()


def test_full_width_stores_no_bases(world, tmp_path):
    _, network, bases = file_bytes(shapes(world.changed(tmp_path, codec={"width": None})))
    assert bases == 0
    assert network.width == 2 * 32  # rank times fan_out of q_proj, the widest site in gauge shared_a


def test_sites_are_those_of_the_real_model(world):
    from ltdi_peft.store import TrajectoryStore

    about = shapes(world.recipe)
    run = TrajectoryStore(world.recipe.store_folder, create=False).trajectories()[0]
    assert about.spec.sites == run.spec.sites
    assert (about.cut, about.layers) == (1, 2)
    assert about.rows.prompted > about.rows.plain > about.rows.answer > 0
    # The page and its JSON say the same.
    assert network_config(about).sites == len(run.spec.sites)


def test_collect_is_counted_by_hand(world):
    about = shapes(world.recipe)
    forecast = Forecast(about, ONE, 1, 0, 0, 8)
    rows, runs = about.rows, 10 + 6
    # 11 tasks: 8 rows with the prompt and 4 without, through the frozen layer and the first adapted one.
    lower = 2 * 11 * (8 * rows.prompted + 4 * rows.plain)
    start = 4 * 4 * rows.mean(0.5)
    singles = runs * 6 * 4 * rows.mean(0.5)
    assert forecast.collect(0.0) == pytest.approx(lower + start + singles)
    uncut = Forecast(about, dataclasses.replace(ONE, cut=False), 1, 0, 0, 8)
    assert uncut.collect(0.0) == pytest.approx(2 * (start + singles))


def test_more_work_takes_longer_and_more_memory(world, tmp_path):
    def of(**sections):
        about = shapes(world.changed(tmp_path, **sections))
        forecast = Forecast(about, ONE, 2, 1000, 1000, 8)
        seconds = forecast.collect(0.0), forecast.train(30), forecast.evaluate()
        return seconds, memory(about, forecast, torch.device("cpu"))

    base, base_memory = of()
    more = {
        0: {"collect": {"single": {"steps": 12}}},
        1: {"train": {"steps": 80}},
        2: {"evaluate": {"seeds": 4, "examples": 12}},
    }
    for stage, sections in more.items():
        seconds, _ = of(**sections)
        assert seconds[stage] > base[stage]
    assert of(collect={"rows": 12})[1]["collect"] > base_memory["collect"]


def test_every_method_and_the_few_shot_ladder_are_counted(world, tmp_path):
    about = shapes(world.recipe)

    def seconds(**evaluate):
        recipe = world.changed(tmp_path, evaluate=evaluate)
        return Forecast(dataclasses.replace(about, recipe=recipe), ONE, 1, 1000, 1000, 8).evaluate()

    less = seconds(methods=["ours"])
    free = {"base", "start", "ours", "oracle"}  # scored anyway
    assert {name for name in METHODS if seconds(methods=["ours", name]) <= less} == free
    assert seconds(methods=["ours"], few_shot={"tasks": 2}) > less


def test_elapsed_time_shrinks_with_threads(world):
    about = shapes(world.recipe)
    one, two, many = (Forecast(about, ONE, n, 0, 0, 8).elapsed(100.0) for n in (1, 2, 1000))
    assert one > two > many > 0.15 * one


def test_speed_is_measured_and_threads_are_given_back(world, monkeypatch):
    monkeypatch.setattr(measuring, "EACH", 0.02)
    about, threads = shapes(world.recipe), torch.get_num_threads()
    speed = measured(about, network_config(about), torch.device("cpu"))
    assert speed.cut
    assert torch.get_num_threads() == threads
    assert speed.train.seconds(1, 3) > 0
    assert min(speed.network, speed.step, speed.float32, speed.float64) > 0


def test_a_line_goes_through_its_points_and_is_never_negative():
    assert line((1, 5.0), (3, 9.0)) == Line(3.0, 2.0)
    assert line((1, 5.0), (3, 4.0)) == Line(5.0, 0.0)
    assert line((1, 1.0), (3, 9.0)) == Line(0.0, 4.0)
    assert Line(3.0, 2.0).seconds(2, 10) == 46


# ---- without the base model


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A machine that has not seen any model."""

    class Empty:
        @staticmethod
        def from_pretrained(name, **options):
            raise OSError(f"{name} is not in the cache")

    monkeypatch.setattr(shaping, "AutoConfig", Empty)
    monkeypatch.setenv("LTDI_CACHE", str(tmp_path))


def test_the_default_model_is_assumed_by_its_shape(nothing_here):
    recipe = Recipe(suite=SuiteConfig(domains=("animals",), train=4, validation=1, unseen_tasks=1))
    about = shapes(recipe)
    assert about.parameters == 134515008  # its published number
    assert (about.layers, about.cut, about.tokenizer) == (30, 20, None)
    (sentence,) = about.assumed
    assert "SmolLM2-135M-Instruct' is not on this machine yet: its published shape is assumed" in sentence


def test_an_unknown_model_needs_its_configuration(nothing_here, world, tmp_path):
    recipe = world.changed(tmp_path, base={"model": "someone/model"})
    with pytest.raises(OSError, match="configuration of base model 'someone/model' is not on this machine"):
        shapes(recipe)


def test_the_assumed_shape_is_that_of_the_model_where_it_is_here():
    from ltdi_peft.base import SMOLLM2, converted_folder

    if not converted_folder(SMOLLM2).is_dir():
        pytest.skip("SmolLM2 is not on this machine")
    config = AutoConfig.from_pretrained(converted_folder(SMOLLM2)).to_dict()
    assert {key: config[key] for key in SMOLLM2_SHAPE} == SMOLLM2_SHAPE


# ---- the page


def test_what_is_not_counted_is_said(world, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "measured", lambda *arguments: ONE)
    found = plan(world.changed(tmp_path, evaluate={"few_shot": {"tasks": 1, "curve_steps": 2}}))
    assert found["assumed"] == ["the curve over gradient steps is not counted"]
    lines = plan_lines(found)
    assert lines[-1] == "assumed   the curve over gradient steps is not counted"
    assert any(one.startswith("  collect") and "of memory" in one for one in lines)


def test_units():
    assert [size(n) for n in (12, 1500, 2.5e6, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.0 GB"]
    assert [clock(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]
