"""Operations: PyTorch's counter against the sums on paper."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import collected, untrained_generator

from ltdi_peft.collect import HELD_OUT
from ltdi_peft.flops import count_flops, counted, fitted_rows, training


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("flops"))


def test_a_product_takes_two_operations_a_multiply_add():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counted(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 5 * 7)  # b needs no gradient


def test_stages_are_rows_and_steps_times_their_costs(bench):
    found, collect = count_flops(untrained_generator(bench), bench), bench.recipe.collect
    runs = len(bench.suite.split("train")) * collect.seeds
    runs += sum(len(bench.suite.split(split)) for split in HELD_OUT)
    steps = collect.multi_task.steps * collect.multi_task.batch_size
    steps += runs * collect.single.steps * collect.single.batch_size
    lower = found["collect"] - steps * found["adapted_layers_a_row_and_step"]
    rows = lower / found["lower_layers_a_row"]
    assert rows == pytest.approx(round(rows))
    assert (
        len(bench.suite.tasks) <= rows <= 1.5 * collect.rows * len(bench.suite.tasks) + len(bench.suite.tasks)
    )
    assert found["adapted_layers_a_row_and_step"] > 0 < found["generate"]
    one = found["lower_layers_a_row"] + found["adapted_layers_a_row_and_step"]
    assert found["fine_tune_step"] == pytest.approx(collect.single.batch_size * one)


def test_sharpness_aware_minimisation_takes_two_passes(bench):
    collect = bench.recipe.collect
    sharp = replace(collect, single=replace(collect.single, sam_rho=0.05))
    twice = fitted_rows(replace(bench, recipe=replace(bench.recipe, collect=sharp)))
    runs = len(bench.suite.split("train")) * collect.seeds
    runs += sum(len(bench.suite.split(split)) for split in HELD_OUT)
    assert twice - fitted_rows(bench) == runs * collect.single.steps * collect.single.batch_size > 0


def test_reptile_counts_its_inner_steps(bench):
    generator, recipe = untrained_generator(bench), bench.recipe
    reptile = replace(recipe, meta=replace(recipe.meta, method="reptile", inner_steps=3))
    assert training(generator.denoiser, reptile) == 3 * training(generator.denoiser, recipe) > 0
    assert all(weight.grad is None for weight in generator.denoiser.parameters())
