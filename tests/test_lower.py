"""Kept lower activations: the very numbers, read instead of computed, and never those of other rows."""

import pytest
import torch
from tiny_bench import tiny_bench, tiny_recipe

from ltdi_peft.batched import AdaptedBase
from ltdi_peft.fit import make_pool
from ltdi_peft.lower import digest, kept_inputs


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tiny_bench(tiny_recipe(tmp_path_factory.mktemp("lower")))


@pytest.fixture
def task(bench):
    return bench.suite.split("train")[0]


def test_what_was_kept_is_read_bit_for_bit(bench, task, tmp_path, monkeypatch):
    expected = make_pool(bench.adapted, task, 5)
    first = make_pool(bench.adapted, task, 5, keep=tmp_path / "kept")
    monkeypatch.setattr(AdaptedBase, "inputs", lambda *_: pytest.fail("computed again"))
    again = make_pool(bench.adapted, task, 5, keep=tmp_path / "kept")
    assert (first.rows, first.prompted, first.plain) == (expected.rows, expected.prompted, expected.plain)
    assert again.rows == expected.rows
    for computed, *kept in zip(expected.inputs, first.inputs, again.inputs, strict=True):
        for one in kept:
            torch.testing.assert_close(one, computed, rtol=0, atol=0)


def test_other_rows_and_another_cut_are_computed(bench, task, tmp_path, monkeypatch):
    rows = make_pool(bench.adapted, task, 3).rows
    kept_inputs(bench.adapted, rows, tmp_path)
    kept_inputs(bench.adapted, rows[:2], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    before = digest(bench.adapted, rows)
    monkeypatch.setattr(bench.adapted, "cut", bench.adapted.cut + 1)
    assert digest(bench.adapted, rows) != before


def test_a_killed_writer_leaves_nothing_that_is_read(bench, task, tmp_path, monkeypatch):
    rows = make_pool(bench.adapted, task, 3).rows

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ltdi_peft.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            kept_inputs(bench.adapted, rows, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    kept = kept_inputs(bench.adapted, rows, tmp_path)
    for one, computed in zip(kept, bench.adapted.inputs(rows), strict=True):
        torch.testing.assert_close(one, computed, rtol=0, atol=0)
