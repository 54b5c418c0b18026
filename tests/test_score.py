"""Scoring: exact match is what greedy generation gives; multiple choice by hand."""

import pytest
import torch
from tiny_adapters import peft_twin, random_stacked, top_sites
from torch.testing import assert_close

from ltdi_peft.batched import AdaptedBase
from ltdi_peft.config import FitConfig
from ltdi_peft.fit import fit_steps, make_pool
from ltdi_peft.score import Score, by_example, make_sheet, pick_shots, score
from ltdi_peft.task import Example, Task

# Two thirds of the answers are w40: a short fit learns these and not the others.
EXAMPLES = tuple(
    Example(f"w{8 + i} w{20 + 2 * i}" + " w9" * (i % 3), "w40" if i % 3 else f"w{50 + i} w{41 + i}")
    for i in range(9)
)


@pytest.fixture
def trained(tiny_wrapped):
    """A float64 base, and one trained beside one random adapter."""
    base = tiny_wrapped(dtype=torch.float64)
    adapted = AdaptedBase(base, top_sites(base.model))
    stacked = random_stacked(adapted.sites, 2, dtype=torch.float64)
    task = Task(name="t", prompts=("w7",), train=EXAMPLES)
    pool = make_pool(adapted, task, len(EXAMPLES))
    config = FitConfig(steps=30, batch_size=9, learning_rate=5e-2, prompt_in_context=1.0)
    first = {name: (a[:1].clone(), b[:1].clone()) for name, (a, b) in stacked.items()}
    for _ in fit_steps(adapted, first, [pool], config, seeds=[0], train_a=True):
        pass
    both = {
        n: (torch.cat([first[n][0], a[1:]]), torch.cat([first[n][1], b[1:]])) for n, (a, b) in stacked.items()
    }
    return adapted, both


def generated_right(twin, tokenizer, row):
    """Whether greedy generation from the question gives the row's answer and then the end token."""
    question, answer = list(row.ids[: row.answer]), list(row.ids[row.answer :])
    ids = torch.tensor([question])
    made = twin.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(answer),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return made[0, len(question) :].tolist() == answer


def test_exact_match_is_what_generate_gives(trained):
    adapted, stacked = trained
    sheet = make_sheet(adapted, EXAMPLES, ["w7"])
    found = score(adapted, sheet, stacked)
    for index in range(2):
        twin = peft_twin(adapted.base.model, adapted.sites, stacked, index)
        wanted = [generated_right(twin, adapted.base.tokenizer, row) for row in sheet.rows]
        assert found.correct[index].tolist() == wanted
    right = found.correct[0].sum().item()
    assert 0 < right < len(EXAMPLES), f"{right} of {len(EXAMPLES)} right: both kinds are needed"
    assert_close(found.accuracy, found.correct.float().mean(1))


def log_likelihood(twin, row):
    """Mean log-likelihood of a row's answer tokens, end token counted."""
    with torch.no_grad():
        logits = twin(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = range(row.answer, len(row.ids))
    return sum(logits[place - 1, row.ids[place]].item() for place in places) / len(places)


def test_multiple_choice_by_hand(trained):
    adapted, stacked = trained
    choices = ("w40", "w41 w42 w43", "w44 w45")
    examples = [Example(f"w{8 + i}", choices[i % 3], choices) for i in range(6)]
    sheet = make_sheet(adapted, examples, None)
    found = score(adapted, sheet, stacked)
    assert len(sheet.rows) == 18
    for adapter in range(2):
        twin = peft_twin(adapted.base.model, adapted.sites, stacked, adapter)
        for index, example in enumerate(examples):
            likely = [log_likelihood(twin, row) for row in sheet.rows[3 * index : 3 * index + 3]]
            best = choices[likely.index(max(likely))]
            assert found.correct[adapter, index].item() == (best == example.answer)
            expected = -likely[choices.index(example.answer)]
            assert found.loss[adapter, index].item() == pytest.approx(expected, rel=1e-5)  # kept in float32
    assert 0 < found.correct.sum() < found.correct.numel()


def test_small_batches_give_the_same(trained, monkeypatch):
    adapted, stacked = trained
    sheet = make_sheet(adapted, EXAMPLES, ["w7", "w8"])
    whole = score(adapted, sheet, stacked)
    monkeypatch.setattr("ltdi_peft.score.SCORE_TOKENS", 20)
    pieces = score(adapted, sheet, stacked)
    assert torch.equal(whole.correct, pieces.correct)
    assert_close(whole.loss, pieces.loss, rtol=1e-6, atol=0)


def test_prompts_take_turns(trained):
    adapted, _ = trained
    sheet = make_sheet(adapted, EXAMPLES[:4], ["w7", "w8"])
    assert [row.ids[0] for row in sheet.rows] == [7, 8, 7, 8]


def test_shots_are_in_every_row(trained):
    adapted, stacked = trained
    shots = (Example("w30", "w31"), Example("w32", "w33"))
    sheet, plain = (make_sheet(adapted, EXAMPLES[:4], ["w7", "w8"], shots=s) for s in (shots, ()))
    question = [row.ids[1 : row.answer] for row in plain.rows]
    for row, asked in zip(sheet.rows, question, strict=True):
        assert row.ids[1 : row.answer] == (4, 30, 5, 31, 2, 4, 32, 5, 33, 2, *asked)
    assert not torch.equal(score(adapted, sheet, stacked).loss, score(adapted, plain, stacked).loss)


def test_shots_are_the_first_with_different_answers():
    pairs = [("a", "x"), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "z"), ("f", "y")]
    task = Task(name="t", prompts=("p",), train=pairs, evaluation=[("g", "x")])
    assert [e.input for e in pick_shots(task, 2)] == ["a", "c"]
    assert [e.input for e in pick_shots(task, 5)] == ["a", "c", "e", "b", "d"]
    assert pick_shots(task, 0) == ()
    with pytest.raises(ValueError, match=r"task 't' has 6 training examples; 7 are to stand in context"):
        pick_shots(task, 7)


def test_no_examples_are_refused(trained):
    with pytest.raises(ValueError, match="no examples to score"):
        make_sheet(trained[0], [], None)


def test_rows_become_examples(trained):
    adapted, _ = trained
    examples = [Example("w8", "w9"), Example("w8", "w11", ("w10", "w11"))]
    sheet = make_sheet(adapted, examples, None)
    exact = torch.tensor([[True, False, False], [False, True, True]])
    loss = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.1, 0.2]])
    found = by_example(sheet, exact, loss)
    assert isinstance(found, Score)
    assert found.correct.tolist() == [[True, True], [False, False]]
    assert_close(found.loss, torch.tensor([[0.5, 1.0], [3.0, 0.2]]))
