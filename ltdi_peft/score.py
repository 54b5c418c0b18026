"""Loss and accuracy of many adapters on a task's examples.

In: a `Sheet` (examples as rows, lower activations kept) and `Stacked` adapters.
Out: per adapter and example, correct or not and the mean loss a token.
Idea: greedy output equals the target exactly when every answer token and the end token is the arg max given
the tokens before it, so one forward pass decides what generating would; multiple choice takes the choice
with the largest mean log-likelihood a token, the end token counted.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ltdi_peft.batched import AdaptedBase, Row, Stacked, batches_by_tokens, make_row
from ltdi_peft.task import Example, Task

# Tokens a scoring batch: the logits of its answers stay near 100 MB at a vocabulary of 49,152.
SCORE_TOKENS = 4096


@dataclass(frozen=True)
class Sheet:
    """A task's examples, ready to be answered by any adapter."""

    rows: tuple[Row, ...]
    inputs: tuple[Tensor, ...]
    example: tuple[int, ...]  # which example a row belongs to; several rows are its choices
    right: tuple[bool, ...]  # whether a row holds the right answer


@dataclass(frozen=True)
class Score:
    """Per adapter and example. `loss` is of the right answer, mean over its tokens (nats)."""

    correct: Bool[Tensor, "adapter example"]
    loss: Float[Tensor, "adapter example"]

    @property
    def accuracy(self) -> Float[Tensor, " adapter"]:
        """Share of examples answered right."""
        return self.correct.float().mean(-1)


def make_sheet(
    base: AdaptedBase,
    examples: Sequence[Example],
    prompts: Sequence[str] | None,
    *,
    shots: Sequence[Example] = (),
) -> Sheet:
    """Rows of `examples`; with `prompts`, example i has prompt i modulo their number in its context.

    Every row has `shots`, solved examples, in its context. ValueError without examples.
    """
    if not examples:
        raise ValueError("no examples to score: a task needs evaluation examples for this.")
    rows, owner, right = [], [], []
    for index, example in enumerate(examples):
        prompt = prompts[index % len(prompts)] if prompts else None
        for answer in example.choices or (example.answer,):
            rows.append(make_row(base.base.tokenizer, prompt, example, answer, shots=shots))
            owner.append(index)
            right.append(answer == example.answer)
    return Sheet(tuple(rows), tuple(base.inputs(rows)), tuple(owner), tuple(right))


def chance(examples: Sequence[Example]) -> float:
    """Expected accuracy of guessing among the choices; 0 where there are none."""
    return statistics.fmean(1 / len(e.choices) if e.choices else 0.0 for e in examples)


def pick_shots(task: Task, count: int) -> tuple[Example, ...]:
    """The first `count` training examples of the task, those with an answer not seen before first.

    Fixed by the task alone. ValueError for a task with fewer training examples.
    """
    if len(task.train) < count:
        raise ValueError(
            f"task {task.name!r} has {len(task.train)} training examples; {count} are to stand in context."
        )
    by_answer: dict[str, Example] = {}
    for example in task.train:
        by_answer.setdefault(example.answer, example)
    different = list(by_answer.values())[:count]
    more = [example for example in task.train if by_answer[example.answer] is not example]
    return (*different, *more[: count - len(different)])


@torch.no_grad()
def score(base: AdaptedBase, sheet: Sheet, stacked: Stacked) -> Score:
    """Every adapter of `stacked` on every example of `sheet`."""
    count = next(iter(stacked.values()))[0].shape[0]
    exact = torch.zeros(count, len(sheet.rows), dtype=torch.bool)
    loss = torch.zeros(count, len(sheet.rows))
    order = sorted(range(len(sheet.rows)), key=lambda index: len(sheet.rows[index].ids))
    lengths = [len(row.ids) for row in sheet.rows]
    for batch in batches_by_tokens(order, lengths, max(1, SCORE_TOKENS // count)):
        rows = [sheet.rows[index] for index in batch]
        inputs = [sheet.inputs[index] for index in batch]
        logits, target, owner = base.answer_logits(rows * count, inputs * count, stacked)
        token_loss = functional.cross_entropy(logits, target, reduction="none")
        wrong = summed((logits.argmax(-1) != target).float(), owner, len(rows) * count)
        mean = summed(token_loss, owner, len(rows) * count) / torch.bincount(owner)
        exact[:, batch] = (wrong == 0).view(count, -1).cpu()
        loss[:, batch] = mean.view(count, -1).float().cpu()
    return by_example(sheet, exact, loss)


def summed(
    values: Float[Tensor, " position"], owner: Int[Tensor, " position"], count: int
) -> Float[Tensor, " owner"]:
    """The sum of the values of each owner 0 … count − 1."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, owner, values)


def by_example(sheet: Sheet, exact: Bool[Tensor, "adapter row"], loss: Float[Tensor, "adapter row"]) -> Score:
    """Rows → examples: a plain example is right when its row is exact, a choice when its loss is least."""
    examples = max(sheet.example) + 1
    correct = torch.zeros(len(exact), examples, dtype=torch.bool)
    right_loss = torch.zeros(len(exact), examples)
    for index in range(examples):
        rows = [row for row, owner in enumerate(sheet.example) if owner == index]
        answer = next(row for row in rows if sheet.right[row])
        right_loss[:, index] = loss[:, answer]
        if len(rows) == 1:
            correct[:, index] = exact[:, answer]
        else:
            correct[:, index] = loss[:, rows].argmin(-1) == rows.index(answer)
    return Score(correct, right_loss)
