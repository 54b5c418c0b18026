"""Matrices in 8 bits a number."""

import pytest
import torch

from ltdi_peft.int8 import SCALE, packed, rounded, unpacked


@pytest.fixture
def table():
    torch.manual_seed(0)
    rows = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e3, 0.0])[:, None]
    return {
        "rows": rows,
        "cube": torch.randn(2, 3, 40),
        "short": torch.randn(9, 4),
        "number": torch.tensor(2.5),
    }


def test_each_row_is_rounded_to_its_own_step(table):
    back = unpacked(packed(table))
    for name in ("rows", "cube"):
        error = (back[name] - table[name]).abs().amax(-1)
        assert (error <= table[name].abs().amax(-1) / 254 * (1 + 1e-5)).all()
    assert torch.equal(back["rows"][4], torch.zeros(64))


def test_what_has_short_rows_is_kept_in_16_bits(table):
    stored = packed(table)
    assert sorted(stored) == sorted([*table, f"rows{SCALE}", f"cube{SCALE}"])
    assert stored["rows"].dtype == torch.int8
    assert stored["short"].dtype == stored["number"].dtype == torch.float16
    back = unpacked(stored)
    torch.testing.assert_close(back["short"].float(), table["short"], rtol=1e-3, atol=0)
    assert back["number"] == 2.5


def test_rounding_twice_changes_nothing(table):
    again = packed(unpacked(packed(table)))
    for name, weight in packed(table).items():
        assert torch.equal(again[name], weight), name
    for name, weight in table.items():
        assert torch.equal(rounded(weight), unpacked(packed(table))[name].float()), name


def test_a_missing_step_is_named(table):
    stored = packed(table)
    del stored[f"cube{SCALE}"]
    with pytest.raises(KeyError, match=r"cube\.row_scale"):
        unpacked(stored)
