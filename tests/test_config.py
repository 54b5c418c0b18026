"""Recipes: strict reading, defaults of their owner, and every recipe of the project."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ltdi_peft import base, config, diffusion
from ltdi_peft.chain import LAWS
from ltdi_peft.config import CollectConfig, DiffusionConfig, FitConfig, Recipe, TrainConfig, load_recipe
from ltdi_peft.strict import apply_override, build, share, to_dict

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))  # recipes/accelerate/ holds Accelerate's own files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.output != Recipe().output, f"{path} names no output folder"


def test_there_are_recipes():
    assert RECIPES, "no recipe found: test_recipe_loads would guard nothing"
    outputs = [load_recipe(path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


@pytest.fixture
def write(tmp_path):
    """write(text) → the path of a recipe with that text."""

    def to(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return to


def test_an_empty_recipe_is_the_defaults(write):
    assert load_recipe(write("")) == Recipe()


def test_values_and_sections_are_read(write):
    text = "name: a\nadapter: {rank: 2, target_modules: [q_proj]}\ntrain: {log_with: null, ema: 1}\n"
    recipe = load_recipe(write(text))
    assert (recipe.name, recipe.adapter.rank, recipe.adapter.target_modules) == ("a", 2, ("q_proj",))
    assert recipe.train.log_with is None
    assert isinstance(recipe.train.ema, float)


BAD = {  # text → what the message must say, after the file's name
    "tarin: {}": r"unknown keys \['tarin'\]; known keys are \['adapter', 'base'",
    "train: {lr: 1}": r"train has unknown keys \['lr'\]",
    "collect: {single: {epochs: 3}}": r"collect: single has unknown keys \['epochs'\]",
    "train: {steps: many}": r"train: steps: expected int, got 'many' \(str\)",
    "train: {steps: 1.5}": r"train: steps: expected int, got 1.5 \(float\)",
    "train: {steps: true}": r"train: steps: expected int, got True \(bool\)",
    "base: {load_in_4bit: 1}": r"load_in_4bit: expected bool, got 1 \(int\)",
    "train: {log_with: 3}": r"log_with: expected str or null, got 3 \(int\)",
    "train: {learning_rate: fast}": r"learning_rate: expected float, got 'fast' \(str\)",
    "train: {learning_rate: .nan}": r"learning_rate: expected float, got nan",
    "train: {learning_rate: .inf}": r"learning_rate: expected float, got inf",
    "adapter: {target_modules: q_proj}": r"target_modules: expected a list, got 'q_proj'",
    "adapter: {target_modules: [1]}": r"target_modules: expected str, got 1",
    "train: 3": r"train: expected a table of fields, got 3",
    "train:": r"train: expected a table of fields, got None",
    "[1, 2]": r"expected a table of sections, got list",
    "a: [": r"is not valid YAML",
    "train: {steps: 1}\ntrain: {ema: 0.5}": r"is not valid YAML: \['train'\] given twice",
    "diffusion: {loss: consistency}": r"diffusion: loss is 'consistency'; known names are \['local",
    "diffusion: {law: linear}": r"diffusion: law is 'linear'; known names are \['cosine', 'vp'\]",
    "diffusion: {weight: big}": r"diffusion: weight is 'big'",
    "diffusion: {sampler: euler}": r"diffusion: sampler is 'euler'",
    "diffusion: {centre: none}": r"diffusion: centre is 'none'",
    "diffusion: {k: 5, steps: 4}": r"diffusion: steps is 4; it must be at least 5",
    "diffusion: {mixing: 1.5}": r"diffusion: mixing is 1.5; it is a share",
    "diffusion: {ridge: 0}": r"diffusion: ridge is 0.0; it must be greater than 0",
    "collect: {start: warm}": r"collect: start is 'warm'; .* or a folder with an adapter",
    "collect: {gauge: free}": r"collect: gauge is 'free'",
    "collect: {snapshot_dtype: int8}": r"collect: snapshot_dtype is 'int8'",
    "collect: {seeds: 0}": r"collect: seeds is 0; it must be at least 1",
    "collect: {multi_task: {schedule: step}}": r"collect: multi_task: schedule is 'step'",
    "collect: {single: {steps: 0}}": r"collect: single: steps is 0",
    "collect: {single: {learning_rate: 0}}": r"collect: single: learning_rate is 0.0; it must be greater",
    "condition: {encoder: bert}": r"condition: encoder is 'bert'",
    "codec: {dtype: int4}": r"codec: dtype is 'int4'",
    "codec: {width: 0}": r"codec: width",
    "adapter: {rank: 0}": r"adapter: rank is 0",
    "adapter: {layers: 0}": r"adapter: layers",
    "adapter: {target_modules: []}": r"adapter: number of target_modules is 0",
    "base: {dtype: float8}": r"base: dtype is 'float8'",
    "meta: {method: maml}": r"meta: method is 'maml'",
    "train: {mixed_precision: fp8}": r"train: mixed_precision is 'fp8'",
    "train: {batch_size: 1, units: 2}": r"train: batch_size is 1; it must be at least 2",
    "train: {log_every: 0}": r"train: log_every is 0",
    "evaluate: {t2l: {hidden: 0}}": r"evaluate: t2l: hidden is 0; it must be at least 1",
    "evaluate: {t2l: {sft: {tasks: 0}}}": r"evaluate: t2l: sft: tasks is 0",
    "evaluate: {t2l: {max_grad_norm: 0}}": r"evaluate: t2l: max_grad_norm is 0.0; it must be greater",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_recipes_are_refused_with_file_and_key(text, write):
    with pytest.raises(ValueError, match=r"recipe\.yaml.*" + BAD[text]):
        load_recipe(write(text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist.*recipes/"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["3e-4", "'3e-4'", "0.0003", "3.0e-4"])
def test_numbers_that_yaml_takes_for_text(text, write):
    assert load_recipe(write(f"train: {{learning_rate: {text}}}")).train.learning_rate == 3e-4


def test_a_partial_section_keeps_its_owners_defaults(write):
    """FitConfig's own default is 24 steps; collect.multi_task's is 400, and that is what counts."""
    recipe = load_recipe(write("collect: {multi_task: {batch_size: 4}}"))
    owner = CollectConfig().multi_task
    assert recipe.collect.multi_task.batch_size == 4
    assert recipe.collect.multi_task.steps == owner.steps != FitConfig().steps
    assert recipe.collect.multi_task.prompt_in_context == owner.prompt_in_context
    assert recipe.collect.single == CollectConfig().single
    assert recipe.train == TrainConfig()


def test_a_partial_section_is_checked_with_its_owners_defaults():
    @dataclass(frozen=True)
    class Part:
        least: int = 5
        most: int = 9

        def __post_init__(self):
            if self.least > self.most:
                raise ValueError("least is above most")

    @dataclass(frozen=True)
    class Whole:
        part: Part = Part(least=20, most=40)

    assert build(Whole, {"part": {"least": 30}}, "here").part == Part(30, 40)
    with pytest.raises(ValueError, match="here: part: least is above most"):
        build(Whole, {"part": {"most": 10}}, "here")


@pytest.mark.parametrize("form", ["--train.steps=7", "train.steps=7"])
def test_overrides_win_in_order(form, write):
    recipe = load_recipe(write("train: {steps: 5, ema: 0.5}"), ["train.steps=6", form])
    assert (recipe.train.steps, recipe.train.ema) == (7, 0.5)


def test_overrides_reach_every_depth_and_are_yaml(write):
    overrides = [
        "name=b",
        "--collect.single.learning_rate=1e-3",
        "--adapter.target_modules=[q_proj, k_proj]",
        "--train.log_with=null",
        "--suite.split_file=",
    ]
    recipe = load_recipe(write(""), overrides)
    assert recipe.name == "b"
    assert recipe.collect.single.learning_rate == 1e-3
    assert recipe.collect.multi_task == CollectConfig().multi_task
    assert recipe.adapter.target_modules == ("q_proj", "k_proj")
    assert recipe.train.log_with is None
    assert recipe.suite.split_file is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.steps", r"'--train\.steps': expected --section\.field=value"),
        ("=3", "expected --section"),
        ("--name.first=3", "'name' is a value, not a section"),
        ("--train.steps=[1", "the value is not valid YAML"),
        ("--train.stesp=1", r"train has unknown keys \['stesp'\]"),
        ("--.x=1", r"unknown keys \[''\]"),
    ],
)
def test_bad_overrides_are_refused(override, message, write):
    with pytest.raises(ValueError, match=message):
        load_recipe(write("name: a"), [override])


def test_override_changes_the_table_in_place():
    table = {}
    apply_override(table, "--a.b.c=[1, two]")
    assert table == {"a": {"b": {"c": [1, "two"]}}}


def test_round_trip():
    recipe = Recipe(
        name="x",
        collect=CollectConfig(seeds=3, multi_task=FitConfig(steps=9)),
        diffusion=DiffusionConfig(ridge=0.1, k=1),
    )
    table = to_dict(recipe)
    assert table["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert build(Recipe, table, "table") == recipe
    assert build(Recipe, to_dict(Recipe()), "table") == Recipe()


def test_names_are_those_of_the_rooms():
    assert set(config.LOSSES) == set(diffusion.LOSSES)
    assert set(config.WEIGHTS) == set(diffusion.WEIGHTS)
    assert set(config.SAMPLERS) == set(diffusion.SAMPLERS)
    assert set(config.LAWS) == set(LAWS)
    assert set(config.DTYPES) == {"auto", *base.DTYPES}


def test_folders_lie_in_the_output():
    recipe = Recipe(output="runs/x")
    folders = {recipe.store_folder, recipe.held_out_folder, recipe.generator_folder}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {Path("runs/x")} == {recipe.folder}


def test_share_refuses_nan():
    with pytest.raises(ValueError, match="warmup is nan"):
        share("warmup", float("nan"))
