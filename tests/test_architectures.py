"""Every architecture on its whole way: record, train, generate, reload; refusals where answers are scored.

What docs/architectures.md promises is `CASES`; every cell of it is tested here, "yes" and "no".
"""

import copy
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_adapters import peft_answer_logits
from tiny_architectures import CASES, COLUMNS, TASKS, Case, bert, make_studio, outputs, record_task
from tiny_bench import tiny_task
from torch.testing import assert_close
from transformers import GPT2Config, LlamaConfig, T5Config

from ltdi_peft.adapter import (
    BrokenAdapterError,
    UnsupportedAdapterError,
    attach,
    load_adapter_folder,
    lora_layers,
    read_adapter,
    spec_of,
)
from ltdi_peft.base import auto_class
from ltdi_peft.batched import AdaptedBase, make_row, stack_adapters
from ltdi_peft.collect import collect, open_bench
from ltdi_peft.condition import longest_text
from ltdi_peft.config import AdapterConfig, Recipe, build, to_dict
from ltdi_peft.evaluate import evaluate
from ltdi_peft.generate import generate_adapter
from ltdi_peft.generator import load_generator
from ltdi_peft.multi_task import widened
from ltdi_peft.refine import refine
from ltdi_peft.spec import SpecMismatchError, delta_w
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.train import train_generator

PROMPT = "please a second twice"
IDS = torch.tensor([[10, 13, 17, 20, 21, 5, 6], [9, 8, 30, 31, 12, 40, 7]])
PAIRS = [(e.input, e.answer) for e in tiny_task("b/second/plain").train[:2]]
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
NOT_CAUSAL = "is no causal language model"
pytestmark = [
    # Two steps of training on three tasks: norms outside the training range are clamped, and said to be.
    pytest.mark.filterwarnings("ignore:.*was scaled into the range:UserWarning"),
    # peft 0.21 saves the base weight of an adapted embedding too, and says so.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft"),
]


def cases(column="record", promised=True):
    """A parametrisation of every case whose cell in this column says so."""
    found = [case for case in CASES if case.cells[column] is promised]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.row)


@pytest.fixture(scope="module")
def studio_of(tmp_path_factory):
    """studio_of(case) → recorded runs of three training tasks and an unseen one, and a trained generator."""

    @cache
    def build_studio(row):
        case = next(case for case in CASES if case.row == row)
        made = make_studio(case, tmp_path_factory.mktemp("studio"))
        for split, store in (
            ("train", made.recipe.store_folder),
            ("unseen_tasks", made.recipe.held_out_folder),
        ):
            for name in TASKS[split]:
                record_task(made, name, store)
        train_generator(made.recipe, progress=False)
        return made

    return lambda case: build_studio(case.row)


@pytest.fixture(scope="module")
def generated_of(studio_of):
    """generated_of(case) → the `PeftModel` that `generate_adapter` gives. Read only."""

    @cache
    def build_model(row):
        studio = studio_of(next(case for case in CASES if case.row == row))
        return generate_adapter(
            PROMPT, generator=studio.recipe.generator_folder, base_model=studio.base().model
        )

    return lambda case: build_model(case.row)


def same_b(left, right):
    """Per site, whether B is the same."""
    return [torch.equal(left[site][1], right[site][1]) for site in left]


# ---- the page


def table_of(text):
    """Row → cells of the page's table."""
    head, _, *body = [line for line in text.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in head.split("|")[2:-1]]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body]
    return {row: dict(zip(columns, values, strict=True)) for row, *values in cells}


def test_the_page_says_what_is_tested():
    wanted = {case.row: {c: "yes" if case.cells[c] else "no" for c in COLUMNS} for case in CASES}
    assert table_of(PAGE.read_text()) == wanted


def test_every_row_has_two_layers_or_more_and_every_column_both_answers_or_only_yes():
    assert len(CASES) == len({case.row for case in CASES}) >= 10
    assert min(case.sites for case in CASES) >= 4
    for column in ("record", "train", "generate"):
        assert all(case.cells[column] for case in CASES)
    for column in ("collect", "evaluate", "refine"):
        assert {case.cells[column] for case in CASES} == {True, False}


# ---- record, train, generate, reload


@cases("record")
def test_every_adapted_layer_is_recorded(studio_of, case):
    studio = studio_of(case)
    layers = lora_layers(studio.adapted())
    assert len(layers) == case.sites
    for run in TrajectoryStore(studio.recipe.store_folder).trajectories():
        assert [site.name for site in run.spec.sites] == list(layers)
        assert [site.rank for site in run.spec.sites] == [layer.r["default"] for layer in layers.values()]
        assert [snapshot.step for snapshot in run.snapshots] == [1, 2]
        first, last = (run.adapter(snapshot) for snapshot in run.snapshots)
        assert not any(same_b(run.start(), first))
        assert not any(same_b(first, last))


def test_patterns_and_rslora_are_what_the_store_says(studio_of):
    by_row = {case.row: case for case in CASES}
    (pattern, *_) = TrajectoryStore(
        studio_of(by_row["`rank_pattern`, `alpha_pattern`"]).recipe.store_folder
    ).trajectories()
    assert [(s.rank, s.alpha) for s in pattern.spec.sites] == [(2, 7.0), (3, 4.0), (1, 7.0), (3, 4.0)]
    (rslora, *_) = TrajectoryStore(studio_of(by_row["`use_rslora`"]).recipe.store_folder).trajectories()
    assert {site.scaling for site in rslora.spec.sites} == {4 / 2**0.5}


@cases("train")
def test_a_generator_is_trained_on_the_recorded_adapter(studio_of, case):
    studio = studio_of(case)
    (run, *_) = TrajectoryStore(studio.recipe.store_folder).trajectories()
    generator = load_generator(studio.recipe.generator_folder)
    assert generator.spec == run.spec
    assert set(generator.config.training_tasks) == set(TASKS["train"])
    assert type(studio.base().model) is type(case.build())  # loaded as what it was saved from


@cases("generate")
def test_no_site_is_empty_and_its_delta_is_what_peft_merges(studio_of, generated_of, case):
    generated, plain = generated_of(case), studio_of(case).base().model
    merged = copy.deepcopy(generated).merge_and_unload()
    adapter, spec = read_adapter(generated), spec_of(generated)
    assert len(adapter) == case.sites
    for site in spec.sites:
        ours = delta_w(*adapter[site.name], site.scaling)
        weights = [model.get_submodule(site.name).weight.detach().double() for model in (merged, plain)]
        theirs = weights[0] - weights[1]
        assert ours.norm() > 1e-2
        # Conv1D keeps its weight transposed. The merged weight is float32: its last digit is 1e-7 at most.
        assert_close(ours.double(), theirs.mT if "c_" in site.name else theirs, rtol=0, atol=2e-7)


@cases("generate")
def test_saved_and_loaded_by_peft_alone(studio_of, generated_of, case, tmp_path):
    generated, plain = generated_of(case), studio_of(case).base().model
    generated.save_pretrained(tmp_path)
    before = outputs(plain, IDS)
    loaded = outputs(PeftModel.from_pretrained(plain, tmp_path).eval(), IDS)
    assert torch.equal(loaded, outputs(generated, IDS))
    assert not torch.equal(loaded, before)


# ---- what needs the loss of answers


def question_rows(words):
    """Two rows an adapter, with answers of two and three tokens."""
    plain, twice = (tiny_task(name).train[:2] for name in ("a/first/plain", "a/first/twice"))
    return [make_row(words, PROMPT, example) for example in (plain[0], twice[0], twice[1], plain[1])]


@cases("evaluate")
def test_many_adapters_in_one_pass_are_pefts(studio_of, generated_of, case):
    studio = studio_of(case)
    base, spec = studio.base(), spec_of(generated_of(case))
    (run,) = TrajectoryStore(studio.recipe.held_out_folder).trajectories()
    adapters = [read_adapter(generated_of(case)), run.adapter(run.snapshots[-1])]
    adapted, rows = AdaptedBase(base, spec.sites), question_rows(base.tokenizer)
    logits, _, owner = adapted.answer_logits(rows, adapted.inputs(rows), stack_adapters(adapters))
    plain = outputs(base.model, IDS)
    for index, adapter in enumerate(adapters):
        twin = attach(studio.base().model, spec, adapter)
        wanted = peft_answer_logits(twin, rows[2 * index : 2 * index + 2])
        assert_close(logits[owner // 2 == index], wanted, rtol=0, atol=1e-5)
        assert (outputs(twin, IDS) - plain).abs().max() > 1e-3  # 100 times what may differ


def collecting(recipe: Recipe, case: Case, folder: Path) -> Recipe:
    """The recipe with the case's target modules, to be collected into `folder`."""
    return replace(
        recipe,
        output=str(folder),
        adapter=AdapterConfig(rank=2, alpha=4.0, target_modules=case.targets, layers=2),
        collect=replace(recipe.collect, start="multi_task", seeds=1, rows=4, equal_parts=1),
    )


@cases("collect")
def test_collect(studio_of, case, tmp_path):
    runs = collect(collecting(studio_of(case).recipe, case, tmp_path), progress=False).trajectories()
    assert {run.task.name for run in runs} == set(TASKS["train"])
    assert {len(run.spec.sites) for run in runs} == {case.sites}
    assert not any(any(same_b(run.start(), run.adapter(run.snapshots[-1]))) for run in runs)


@cases("collect", promised=False)
def test_collect_refuses(studio_of, case, tmp_path):
    recipe = studio_of(case).recipe
    with pytest.raises(ValueError, match=r"collect\.start is 'recorded'.*there is nothing to collect"):
        collect(recipe, progress=False)
    if not case.causal:
        with pytest.raises(ValueError, match=f"{type(case.build()).__name__} {NOT_CAUSAL}"):
            collect(collecting(recipe, case, tmp_path), progress=False)
        assert not (tmp_path / "trajectories").exists()


@cases("evaluate")
def test_evaluate(studio_of, case, tmp_path):
    found = evaluate(studio_of(case).recipe, results=tmp_path, progress=False)
    assert found["methods"]["ours"]["unseen_tasks"]["tasks"] == 1


@cases("evaluate", promised=False)
def test_evaluate_refuses(studio_of, case, tmp_path):
    with pytest.raises(ValueError, match=NOT_CAUSAL):
        evaluate(studio_of(case).recipe, results=tmp_path, progress=False)


@cases("refine")
def test_refine(studio_of, generated_of, case):
    model = copy.deepcopy(generated_of(case))
    refine(model, PAIRS, tokenizer=studio_of(case).base().tokenizer, steps=2)
    assert not any(same_b(read_adapter(generated_of(case)), read_adapter(model)))


@cases("refine", promised=False)
def test_refine_refuses(studio_of, generated_of, case):
    model = copy.deepcopy(generated_of(case))
    with pytest.raises(ValueError, match=NOT_CAUSAL):
        refine(model, PAIRS, tokenizer=studio_of(case).base().tokenizer)
    assert all(same_b(read_adapter(generated_of(case)), read_adapter(model)))


@cases("refine", promised=False)
def test_examples_cannot_choose(studio_of, case):
    studio = studio_of(case)
    model = studio.base().model
    with pytest.raises(ValueError, match=f"{NOT_CAUSAL}.*the choice by examples"):
        generate_adapter(
            PROMPT,
            generator=studio.recipe.generator_folder,
            base_model=model,
            examples=PAIRS,
            num_candidates=2,
        )
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("what", ["gate", "task loss", "validation task"])
def test_training_that_scores_answers_is_refused_before_it_begins(studio_of, what, tmp_path):
    studio = studio_of(next(case for case in CASES if case.build is bert))
    shutil.copytree(studio.recipe.folder, tmp_path / "run", ignore=shutil.ignore_patterns("generator", "ch*"))
    table = to_dict(studio.recipe) | {"output": str(tmp_path / "run")}
    if what == "gate":
        table["codec"]["gate"] = 0.5
    elif what == "task loss":
        table["train"]["task_loss"]["steps"] = 2
    else:
        file = tmp_path / "splits.json"
        text = Path(table["suite"]["split_file"]).read_text()
        swapped = {"validation": "unseen_tasks", "unseen_tasks": "validation"}
        file.write_text(re.sub("|".join(swapped), lambda found: swapped[found[0]], text))
        table["suite"]["split_file"] = str(file)
    with pytest.raises(ValueError, match=NOT_CAUSAL):
        train_generator(build(Recipe, table, "test"), progress=False)
    assert not (tmp_path / "run" / "generator").exists()


# ---- recorded runs and the recipe


def test_a_recipe_for_another_base_is_refused(studio_of):
    llama, qwen = (studio_of(case) for case in CASES[:2])
    elsewhere = replace(llama.recipe, base=qwen.recipe.base)
    with pytest.raises(
        SpecMismatchError, match=r"was recorded on base model .* the recipe names .*Set base\."
    ):
        open_bench(elsewhere)


def test_a_base_without_those_layers_is_refused(studio_of, tmp_path):
    studio = studio_of(CASES[0])
    base = replace(studio_of(CASES[4]).base(), name=studio.base().name)
    with pytest.raises(SpecMismatchError, match=r"GPT2LMHeadModel does not fit .* expected 4 sites, 0 match"):
        open_bench(studio.recipe, base=base)


def test_recorded_without_runs_is_refused(studio_of, tmp_path):
    studio = studio_of(CASES[0])
    recipe = replace(studio.recipe, output=str(tmp_path))
    TrajectoryStore(recipe.store_folder)
    with pytest.raises(ValueError, match="takes the LoRA of finished runs, and there are none"):
        open_bench(recipe)


def test_the_recorded_lora_is_not_widened(studio_of):
    with pytest.raises(ValueError, match=r"leave it out of evaluate\.methods"):
        widened(open_bench(studio_of(CASES[0]).recipe))


def test_the_base_of_a_recorded_bench_does_nothing(studio_of):
    bench = open_bench(studio_of(CASES[7]).recipe)
    assert all(a.norm() > 0 and b.norm() == 0 for a, b in bench.fresh.values())


def test_a_head_that_peft_trains_is_refused_by_name():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(UnsupportedAdapterError, match=r"modules_to_save=.*'classifier'.*leave task_type out"):
        lora_layers(model)


def test_a_base_weight_in_an_adapter_folder_is_named(generated_of, tmp_path):
    generated_of(next(case for case in CASES if "lm_head" in case.targets)).save_pretrained(tmp_path)
    with pytest.raises(BrokenAdapterError, match=r"lm_head\.base_layer.*save_embedding_layers=False"):
        load_adapter_folder(tmp_path)


# ---- small parts


def test_unknown_checkpoints_are_causal():
    assert auto_class(LlamaConfig()).__name__ == "AutoModelForCausalLM"
    assert auto_class(LlamaConfig(architectures=["NoSuchModel"])).__name__ == "AutoModelForCausalLM"
    wanted = "AutoModelForSequenceClassification"
    assert auto_class(LlamaConfig(architectures=["LlamaForSequenceClassification"])).__name__ == wanted


def test_positions_that_a_model_has():
    assert longest_text(GPT2Config(n_positions=17)) == 17
    assert longest_text(LlamaConfig(max_position_embeddings=19)) == 19
    assert longest_text(T5Config()) is None
