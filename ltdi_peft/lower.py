"""Activations below the first adapted layer, kept on disk.

In: rows.  Out: what the upper part of the model reads of them, from a file if they were asked for before.
Idea: no adapter reaches these layers, so they are the same for the origin, the second stage, every rival and
a resumed run; on a CPU they take longer than anything else that is not trained. One file a task, named by a
digest of all that it depends on; readers map it, so kept rows take no memory of their own.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ltdi_peft.batched import AdaptedBase, Row
from ltdi_peft.files import replace_file


def kept_inputs(base: AdaptedBase, rows: Sequence[Row], folder: Path) -> list[Tensor]:
    """`base.inputs(rows)`, kept in `folder`: bit for bit what was computed first."""
    file = folder / f"{digest(base, rows)}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, save({"rows": torch.cat(base.inputs(rows)).contiguous()}))
    return list(load_file(file)["rows"].split([len(row.ids) for row in rows]))


def digest(base: AdaptedBase, rows: Sequence[Row]) -> str:
    """16 hex digits of the base's weights, where it is cut, how it computes, and the rows."""
    model = base.base.model
    about = [base.base.weights_fingerprint, base.cut, str(model.dtype), model.device.type]
    text = json.dumps([about, [row.ids for row in rows]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
