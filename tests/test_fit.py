"""Fitting many adapters: what transformers.Trainer gives, what each alone gives, and SAM by hand."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny_adapters import factors_of, one_of, peft_twin, random_rows, random_stacked, top_sites
from torch.testing import assert_close
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, get_scheduler

from ltdi_peft.batched import AdaptedBase
from ltdi_peft.config import FitConfig
from ltdi_peft.fit import (
    Pool,
    backward,
    clip_per_adapter,
    draws,
    fit_steps,
    gradient_norms,
    joined,
    losses,
    make_pool,
    scheduled,
    sharpen,
)
from ltdi_peft.task import Example, Task

EXACT = {"rtol": 0, "atol": 1e-10}  # float64; the same sums in another order
CONFIG = FitConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup=0.0, prompt_in_context=0.6)


def pool_of(adapted, seed, count=18):
    """Rows of many lengths; the first two thirds count as prompted."""
    rows = random_rows(count, seed=seed)
    cut = 2 * count // 3
    return Pool(rows, tuple(adapted.inputs(rows)), tuple(range(cut)), tuple(range(cut, count)))


def bench_of(base, count=3):
    adapted = AdaptedBase(base, top_sites(base.model))
    stacked = random_stacked(adapted.sites, count, dtype=base.model.dtype)
    return adapted, stacked, [pool_of(adapted, seed) for seed in range(count)]


@pytest.fixture
def double(tiny_wrapped):
    """A float64 base, three adapters, a pool each."""
    return bench_of(tiny_wrapped(dtype=torch.float64))


def clone(stacked):
    return {name: (a.clone(), b.clone()) for name, (a, b) in stacked.items()}


def run(adapted, stacked, pools, config, seeds, train_a=True):
    return list(fit_steps(adapted, stacked, pools, config, seeds=seeds, train_a=train_a))


class FixedOrder(Trainer):
    """A Trainer that takes its examples as they come."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def labelled(rows):
    """Rows as a Trainer's batch: padded, masked, −100 outside the answer."""
    longest = max(len(row.ids) for row in rows)
    padded = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        rest = longest - len(row.ids)
        padded["input_ids"].append([*row.ids, *[0] * rest])
        padded["attention_mask"].append([*[1] * len(row.ids), *[0] * rest])
        padded["labels"].append([*[-100] * row.answer, *row.ids[row.answer :], *[-100] * rest])
    return {key: torch.tensor(value) for key, value in padded.items()}


def token_mean(outputs, labels, num_items_in_batch=None):
    """Trainer's own loss without its cast to float32, so that a float64 run can be compared to 1e-9."""
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch


def trainer_fit(twin, rows, config, folder, *, own_loss, scheduler):
    """Train `twin` with transformers.Trainer on these rows, in this order."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    optimizers = (None, None)
    if scheduler:
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], config.learning_rate)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler))
    FixedOrder(
        twin,
        arguments,
        data_collator=labelled,
        train_dataset=rows,
        optimizers=optimizers,
        compute_loss_func=token_mean if own_loss else None,
    ).train()


# float32: AdamW divides by √v, so rounding of near-zero gradients shows up to 1e-5 of a factor's norm.
TRAINER_CASES = {
    "trainer's loss and schedule": (torch.float32, {"schedule": "linear"}, True, 1e-4),
    "A frozen, cosine": (torch.float32, {"schedule": "cosine"}, False, 1e-4),
    "float64": (torch.float64, {"schedule": "linear"}, True, 1e-9),
    "clipped, warm-up, float64": (torch.float64, {"max_grad_norm": 0.02, "warmup": 0.4}, True, 1e-9),
}


@pytest.mark.parametrize("case", TRAINER_CASES)
def test_fit_gives_the_adapters_of_trainer(case, tiny_wrapped, tmp_path):
    dtype, changes, train_a, tolerance = TRAINER_CASES[case]
    config = replace(CONFIG, **changes)
    adapted, stacked, pools = bench_of(tiny_wrapped(dtype=dtype), count=1)
    twin = peft_twin(adapted.base.model, adapted.sites, stacked, 0)
    start = factors_of(twin, adapted.sites)
    start = {site: (a.clone(), b.clone()) for site, (a, b) in start.items()}
    if not train_a:
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    order = [index for batch in islice(draws(pools[0], config, 5), config.steps) for index in batch]

    def share(step):
        return scheduled(1.0, step, config.steps, warmup=config.warmup, schedule=config.schedule)

    rows = [pools[0].rows[index] for index in order]
    own = {"own_loss": dtype == torch.float64, "scheduler": share if config.warmup else None}
    trainer_fit(twin, rows, config, tmp_path, **own)
    run(adapted, stacked, pools, config, [5], train_a)
    for site, (a, b) in factors_of(twin, adapted.sites).items():
        for got, wanted, first in zip(stacked[site], (a, b), start[site], strict=True):
            if wanted is a and not train_a:
                assert torch.equal(got[0], first)
                continue
            moved = (wanted - first).norm()
            assert moved > 0.1 * config.learning_rate * config.steps, (
                "Trainer did not train: nothing was compared"
            )
            assert (got[0] - wanted).norm() <= tolerance * moved, (
                site,
                float((got[0] - wanted).norm() / moved),
            )


def test_grouping_changes_nothing(double):
    adapted, stacked, pools = double
    alone = [one_of(stacked, index) for index in range(3)]
    together = run(adapted, stacked, pools, CONFIG, [3, 4, 5])
    for index, own in enumerate(alone):
        steps = run(adapted, own, [pools[index]], CONFIG, [3 + index])
        for name, (a, b) in own.items():
            assert_close(stacked[name][0][index], a[0], **EXACT)
            assert_close(stacked[name][1][index], b[0], **EXACT)
        for one, many in zip(steps, together, strict=True):
            assert_close(many.loss[index], one.loss[0], **EXACT)
            assert one.index == many.index


def test_piecewise_gradients_are_those_of_the_losses(double):
    adapted, stacked, pools = double
    rows, inputs = [r for p in pools for r in p.rows[:8]], [i for p in pools for i in p.inputs[:8]]
    leaves = [factor.requires_grad_(True) for pair in stacked.values() for factor in pair]
    whole = losses(adapted, rows, inputs, stacked)
    wanted = torch.autograd.grad(whole.sum(), leaves)
    assert_close(backward(adapted, rows, inputs, stacked), whole.detach(), **EXACT)
    for factor, gradient in zip(leaves, wanted, strict=True):
        assert_close(factor.grad, gradient, **EXACT)
    assert all(weight.grad is None for weight in adapted.base.model.parameters())


def test_loss_is_peft_models_own(double):
    """Each adapter's loss is the PEFT model's with labels −100 outside the answer (which is float32)."""
    adapted, stacked, pools = double
    rows, inputs = [r for p in pools for r in p.rows[:4]], [i for p in pools for i in p.inputs[:4]]
    found = losses(adapted, rows, inputs, stacked)
    for index in range(3):
        twin = peft_twin(adapted.base.model, adapted.sites, stacked, index)
        expected = twin(**labelled(rows[4 * index : 4 * index + 4])).loss
        assert_close(found[index].float(), expected.detach().float(), rtol=1e-5, atol=0)


def test_frozen_a_stays_bit_for_bit(double):
    adapted, stacked, pools = double
    before = clone(stacked)
    run(adapted, stacked, pools, CONFIG, [0, 1, 2], train_a=False)
    for name, (a, b) in stacked.items():
        assert torch.equal(a, before[name][0])
        assert (b - before[name][1]).abs().max() > 0
        assert not a.requires_grad
        assert not b.requires_grad


def test_stopping_early_leaves_plain_tensors(double):
    adapted, stacked, pools = double
    steps = fit_steps(adapted, stacked, pools, CONFIG, seeds=[0, 1, 2], train_a=True)
    next(steps)
    steps.close()
    assert not any(factor.requires_grad for pair in stacked.values() for factor in pair)


def test_a_pool_and_a_seed_for_each_adapter(double):
    adapted, stacked, pools = double
    with pytest.raises(ValueError, match="3 adapters need a pool and a seed each, got 1 and 1"):
        run(adapted, stacked, pools[:1], CONFIG, [0])


# SAM and clipping


@pytest.fixture
def batch(double):
    """(adapted, stacked with gradients on, rows, inputs, trained)."""
    adapted, stacked, pools = double
    rows, inputs = [r for p in pools for r in p.rows[:4]], [i for p in pools for i in p.inputs[:4]]
    trained = [factor.requires_grad_(True) for pair in stacked.values() for factor in pair]
    return adapted, stacked, rows, inputs, trained


def test_sam_gradient_by_hand(batch):
    adapted, stacked, rows, inputs, trained = batch
    names = [(name, place) for name in stacked for place in (0, 1)]
    rho = 0.3
    gradients = torch.autograd.grad(losses(adapted, rows, inputs, stacked).sum(), trained)
    norm = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
    moved = {name: [None, None] for name in stacked}
    for (name, place), factor, g in zip(names, trained, gradients, strict=True):
        shifted = factor.detach() + rho * g / norm[:, None, None]
        moved[name][place] = shifted.requires_grad_(True)
    there = {name: tuple(pair) for name, pair in moved.items()}
    wanted = torch.autograd.grad(
        losses(adapted, rows, inputs, there).sum(), [f for p in there.values() for f in p]
    )

    before = [factor.detach().clone() for factor in trained]
    backward(adapted, rows, inputs, stacked)
    plain = [factor.grad.clone() for factor in trained]
    sharpen(adapted, rows, inputs, stacked, trained, rho)
    for factor, old, gradient in zip(trained, before, wanted, strict=True):
        assert torch.equal(factor.detach(), old), "θ must come back bit for bit"
        assert_close(factor.grad, gradient, **EXACT)
    assert max((f.grad - g).abs().max() for f, g in zip(trained, plain, strict=True)) > 1e-4


def test_sam_at_radius_zero_is_plain(batch):
    adapted, stacked, rows, inputs, trained = batch
    backward(adapted, rows, inputs, stacked)
    plain = [factor.grad.clone() for factor in trained]
    sharpen(adapted, rows, inputs, stacked, trained, 0.0)
    for factor, gradient in zip(trained, plain, strict=True):
        assert_close(factor.grad, gradient, **EXACT)


def test_sam_changes_a_fit(double):
    adapted, stacked, pools = double
    sharp = clone(stacked)
    run(adapted, stacked, pools, CONFIG, [0, 1, 2])
    run(adapted, sharp, pools, replace(CONFIG, sam_rho=0.5), [0, 1, 2])
    name = next(iter(stacked))
    assert (sharp[name][1] - stacked[name][1]).abs().max() > 1e-4


@pytest.mark.parametrize("most", [1e-3, 0.3, 100.0])
def test_clipping_is_torchs_on_each_adapter(batch, most):
    adapted, stacked, rows, inputs, trained = batch
    backward(adapted, rows, inputs, stacked)
    copies = []
    for index in range(3):
        own = [torch.nn.Parameter(factor.detach()[index].clone()) for factor in trained]
        for mine, factor in zip(own, trained, strict=True):
            mine.grad = factor.grad[index].clone()
        total = torch.nn.utils.clip_grad_norm_(own, most)
        assert_close(gradient_norms(trained)[index], total, **EXACT)
        copies.append(own)
    clip_per_adapter(trained, most)
    for index, own in enumerate(copies):
        for mine, factor in zip(own, trained, strict=True):
            assert_close(factor.grad[index], mine.grad, **EXACT)


# Schedules and draws


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_without_warm_up_are_those_of_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=7)
    for step in range(7):
        got = scheduled(0.5, step, 7, warmup=0.0, schedule=name)
        assert math.isclose(got, optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        optimizer.step()
        scheduler.step()


def test_warm_up_rises_to_the_peak_and_no_step_is_wasted():
    rates = [scheduled(1.0, step, 10, warmup=0.25, schedule="linear") for step in range(10)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0]
    assert_close(torch.tensor(rates[3:]), torch.tensor([1 - i / 7 for i in range(7)]))
    assert min(rates) > 0


def some_pool(prompted, plain):
    rows = random_rows(prompted + plain)
    places = tuple(range(prompted)), tuple(range(prompted, prompted + plain))
    return Pool(rows, tuple(torch.tensor(row.ids) for row in rows), *places)


def test_draws_take_every_row_once_an_epoch():
    pool = some_pool(12, 6)
    drawn = [i for batch in islice(draws(pool, replace(CONFIG, batch_size=7), 0), 60) for i in batch]
    for own in (pool.prompted, pool.plain):
        mine = [index for index in drawn if index in own]
        epochs = [mine[i : i + len(own)] for i in range(0, len(mine) - len(own) + 1, len(own))]
        assert len(epochs) > 5
        assert all(sorted(epoch) == sorted(own) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2, "epochs have orders of their own"


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8, 1.0])
def test_draws_mix_prompted_and_plain_by_their_share(share):
    pool, count = some_pool(10, 5), 4000
    config = replace(CONFIG, batch_size=count, prompt_in_context=share)
    prompted = sum(index < 10 for index in next(draws(pool, config, 1)))
    assert abs(prompted / count - share) <= 4 * math.sqrt(share * (1 - share) / count)  # four deviations


def test_draws_follow_their_seed_and_need_no_plain_rows():
    pool = some_pool(10, 5)
    first, again, other = (list(islice(draws(pool, CONFIG, seed), 4)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(i < 10 for b in islice(draws(some_pool(10, 0), CONFIG, 0), 9) for i in b)


# Pools


def task_of(count):
    examples = [Example(f"w{10 + i} w{20 + i}", f"w{30 + i}") for i in range(count)]
    return Task(name="t", prompts=("w7", "w8"), train=examples)


def test_pool_has_prompted_rows_in_turn_and_half_of_them_plain(tiny_wrapped):
    base = tiny_wrapped()
    adapted = AdaptedBase(base, top_sites(base.model))
    pool = make_pool(adapted, task_of(7), 5)
    assert (len(pool.prompted), len(pool.plain)) == (5, 3)
    assert [pool.rows[index].ids[0] for index in pool.prompted] == [7, 8, 7, 8, 7]
    for index in pool.plain:
        assert base.tokenizer.decode(pool.rows[index].ids).startswith("Input:")
    assert make_pool(adapted, task_of(7), 5, plain=False).plain == ()
    with pytest.raises(ValueError, match="task 'u' has no training examples"):
        make_pool(adapted, Task(name="u", prompts=("w7",)), 5)


def test_joined_pools_keep_rows_and_kinds(double):
    _, _, pools = double
    both = joined(pools[:2])
    for kind in ("prompted", "plain"):
        wanted = [pool.rows[i] for pool in pools[:2] for i in vars(pool)[kind]]
        assert [both.rows[i] for i in vars(both)[kind]] == wanted
    assert all(torch.equal(both.inputs[18 + i], pools[1].inputs[i]) for i in range(18))


@pytest.mark.slow
def test_smollm2_float32_equals_peft_with_adamw():
    """The real model, cut at layer 20: three steps of four equal PEFT, AdamW and clipping written out."""
    from ltdi_peft.base import load_base

    base = load_base(dtype="float32")
    assert base.model.config.num_hidden_layers == 30
    adapted = AdaptedBase(base, top_sites(base.model, range(20, 30)))
    assert adapted.cut == 20
    task = Task(
        name="t",
        prompts=("Answer with the capital.", "Name the capital city."),
        train=[("France", "Paris"), ("Italy, the Republic", "Rome"), ("Spain", "Madrid"), ("Peru", "Lima")]
        * 1,
    )
    pool = make_pool(adapted, task, 4)
    stacked = random_stacked(adapted.sites, 1, scale=0.02)
    config = FitConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup=0.0)
    twin = peft_twin(base.model, adapted.sites, stacked, 0)
    start = {site: b @ a for site, (a, b) in factors_of(twin, adapted.sites).items()}
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for step, batch in enumerate(islice(draws(pool, config, 9), 3)):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimizer.zero_grad()
        twin(**labelled([pool.rows[index] for index in batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    run(adapted, stacked, [pool], config, [9])
    for site, (a, b) in factors_of(twin, adapted.sites).items():
        moved = b @ a - start[site]
        got = stacked[site][1][0] @ stacked[site][0][0] - start[site]
        assert (got - moved).norm() <= 1e-4 * (b @ a).norm(), site
        assert moved.norm() > 1e-3 * (b @ a).norm()
