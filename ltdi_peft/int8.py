"""Matrices in 8 bits a number: what makes a generator small enough to ship.

In: a table of tensors.  Out: the table with its matrices as int8 rows, each with one float32 scale; and back.
Idea: rounding a row to 255 levels moves a product with it by under 1 %, independently from row to row; twice
the directions fit into the same bytes, which is worth far more (docs/log.md).
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

SCALE = ".row_scale"  # added to the name of a packed matrix
LEVELS = 127
SHORTEST = 32  # numbers of a row; what has shorter ones is kept in 16 bits, which costs little


def rounded(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight as `unpacked` gives it back, float32."""
    return unpacked_row(*packed_row(weight)) if is_packed(weight) else weight.half().float()


def packed_row(
    weight: Float[Tensor, "*rows column"],
) -> tuple[Int8[Tensor, "*rows column"], Float[Tensor, "*rows 1"]]:
    """Rows as integers −127 … 127, and the step of each row."""
    weight = weight.float()
    step = (weight.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / step).round().to(torch.int8), step


def unpacked_row(
    rows: Int8[Tensor, "*rows column"], step: Float[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows column"]:
    """The inverse of `packed_row`, up to its rounding."""
    return rows.float() * step


def is_packed(weight: Tensor) -> bool:
    """Whether `packed` turns this tensor into int8: a matrix, or more, with rows that are long enough."""
    return weight.ndim > 1 and weight.shape[-1] >= SHORTEST


def packed(table: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix `NAME` as int8 with its steps as `NAME.row_scale`, all else in 16 bits."""
    out = {}
    for name, weight in table.items():
        if is_packed(weight):
            rows, step = packed_row(weight)
            out |= {name: rows.contiguous(), f"{name}{SCALE}": step.contiguous()}
        else:
            out[name] = weight.half()
    return out


def unpacked(table: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`. KeyError names the steps of an int8 matrix that are missing."""
    return {
        name: unpacked_row(weight, table[name + SCALE]) if weight.dtype == torch.int8 else weight
        for name, weight in table.items()
        if not name.endswith(SCALE)
    }
