"""Resume points of a fit that takes an hour: one file, replaced as the fit goes on.

In: factors in training, AdamW's moments, what the caller keeps beside them.  Out: the same, after a kill.
Idea: draws come from a seed and are drawn again, so factors, moments and the step's number are all there is
to keep: on a CPU an interrupted and resumed fit equals an uninterrupted one bit for bit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ltdi_peft.batched import Stacked
from ltdi_peft.files import read_header, replace_file
from ltdi_peft.fit import FitState
from ltdi_peft.strict import differing

HEADER = "fit"
POINT_FILE = "unfinished.safetensors"  # in the folder that the fit's adapter goes to
EVERY = 100  # steps between two resume points


@dataclass(frozen=True)
class FitPoint:
    """The resume point of one fit in `file`; `plan`, as JSON, is what the fit depends on."""

    file: Path
    plan: dict[str, Any]

    def save(
        self, state: FitState, stacked: Stacked, kept: Mapping[str, Tensor], about: Sequence[Any]
    ) -> None:
        """Write it, whole or not at all. `kept` and `about` (as JSON) come back from `load`."""
        table = {f"kept.{name}": weight for name, weight in kept.items()}
        for site, factors in stacked.items():
            table |= {f"factor.{kind}.{site}": f.detach() for kind, f in zip("AB", factors, strict=True)}
        for index, moments in state.moments.items():
            table |= {f"moment.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        header = {HEADER: json.dumps({"plan": self.plan, "step": state.step, "about": about})}
        copies = {name: weight.to("cpu", copy=True).contiguous() for name, weight in table.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.file, save(copies, metadata=header))

    def load(self, state: FitState, stacked: Stacked) -> tuple[dict[str, Tensor], list[Any]] | None:
        """Bring `state` and `stacked` to where the fit stood; what was kept, or None where there is no point.

        ValueError when the file was written by a fit of another plan.
        """
        if not self.file.is_file():
            return None
        try:
            header = read_header(self.file, HEADER)
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.file} is damaged ({error}). Remove it to train from the beginning."
            ) from error
        if changed := differing(header["plan"], json.loads(json.dumps(self.plan))):
            raise ValueError(
                f"{self.file} was written with another {changed}. Remove it to train from the beginning, or "
                f"give the run another `output`."
            )
        kept: dict[str, Tensor] = {}
        for name, weight in load_file(self.file).items():
            part, rest = name.split(".", 1)
            if part == "kept":
                kept[rest] = weight
                continue
            key, rest = rest.split(".", 1)
            if part == "factor":
                stacked[rest]["AB".index(key)].copy_(weight)
            else:
                state.moments.setdefault(int(key), {})[rest] = weight
        state.step = header["step"]
        return kept, header["about"]

    def remove(self) -> None:
        """The fit is done."""
        self.file.unlink(missing_ok=True)
