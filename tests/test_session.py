"""One step of training: what it draws, whose gradient it is, what it keeps; one process, two, or resumed."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_bench import SPLITS, collected, prepared_of
from tiny_session import METHODS, STEPS, recipe64, session64, trained64
from tiny_world import ROOT, run
from torch.testing import assert_close

from ltdi_peft import fit
from ltdi_peft.batched import make_row
from ltdi_peft.config import DiffusionConfig, MetaConfig, TaskLossConfig
from ltdi_peft.resume import made_from, resume, save_point
from ltdi_peft.session import Session, check, last_step_only, pick_rows, unit_rng
from ltdi_peft.task import Task


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("session"))


@pytest.fixture(scope="module")
def prepared(bench):
    return prepared_of(bench)


@pytest.fixture
def make(bench, prepared):
    """make(method="plain", **train fields) → a float32 session of 6 + 2 steps, two units each."""

    def build(method="plain", seed=0, **fields):
        task_loss = TaskLossConfig(steps=2, tasks=2, examples=2)
        recipe = replace(bench.recipe, seed=seed, meta=MetaConfig(method=method))
        fields = {"steps": 6, "batch_size": 8, "task_loss": task_loss, "log_with": None, **fields}
        recipe = replace(recipe, train=replace(recipe.train, **fields))
        return Session(recipe, prepared, Accelerator(cpu=True), bench)

    return build


def weights_of(session):
    return [p.detach().clone() for p in session.network.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- draws and gradients


def test_a_units_numbers_depend_on_seed_step_and_unit():
    drawn = {
        key: torch.rand(3, generator=unit_rng(*key)).tolist()
        for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    }
    assert len(set(map(tuple, drawn.values()))) == 4
    assert torch.rand(3, generator=unit_rng(0, 1, 0)).tolist() == drawn[0, 1, 0]


def test_drawn_rows_are_centred_on_the_fit_without_their_task(make, prepared):
    session = make()
    session.recipe = replace(session.recipe, diffusion=replace(session.recipe.diffusion, mixing=0.0))
    z, condition, dropped = session.draw(unit_rng(0, 1, 0), 64)
    data, centre = prepared.data, prepared.centre
    for row, one in zip(z, condition, strict=True):
        # the task and the paraphrase that have this condition
        task, prompt = (data.conditions == one).all(-1).nonzero()[0].tolist()
        left_out = centre.training(torch.tensor([task]), torch.tensor([prompt]))
        own = (data.tokens[data.task == task] - left_out) / centre.spread
        assert any(torch.allclose(row, wanted, atol=1e-6) for wanted in own)
    assert 0 < dropped.float().mean() < 0.4


def test_the_gradient_is_the_mean_over_the_units(make):
    session = make()
    session.backward(1)
    got = [p.grad.clone() for p in session.network.parameters()]
    losses = [session.unit_loss("weights", unit_rng(0, 1, unit)) for unit in (0, 1)]
    want = torch.autograd.grad(sum(losses) / 2, list(session.network.parameters()))
    assert_close(got, list(want), rtol=1e-5, atol=1e-8)  # float32, summed in another order


def test_reptile_moves_against_the_pseudo_gradient(make):
    session = make("reptile")
    before = weights_of(session)
    loss = session.backward(1)
    assert same(before, weights_of(session))
    assert loss.isfinite()
    assert sum(p.grad.norm() for p in session.network.parameters()) > 0


def test_the_learning_rate_starts_again_in_the_second_stage(make):
    session = make()
    train = session.recipe.train
    rates = [session.learning_rate(index) for index in range(1, session.total + 1)]
    want = [fit.scheduled(train.learning_rate, i, 6, warmup=0.05, schedule="cosine") for i in range(6)]
    want += [
        fit.scheduled(train.task_loss.learning_rate, i, 2, warmup=0.05, schedule="cosine") for i in (0, 1)
    ]
    assert rates == want
    assert [session.stage(index) for index in (1, 6, 7, 8)] == [
        "weights",
        "weights",
        "task_loss",
        "task_loss",
    ]


def test_averaged_weights_are_the_recursion(make):
    session = make(ema=0.5)
    mean = weights_of(session)
    for step in session.steps():
        keep = min(0.5, step.index / (step.index + 10))
        mean = [keep * m + (1 - keep) * p for m, p in zip(mean, weights_of(session), strict=True)]
    assert_close(session.average, mean)
    now, average = weights_of(session), [m.clone() for m in session.average]
    with session.averaged() as network:
        assert same(network.parameters(), average)
        assert not network.training
    assert session.network.training
    assert same(now, weights_of(session))
    with pytest.raises(RuntimeError, match="inside"), session.averaged():
        raise RuntimeError("inside")
    assert same(now, weights_of(session))
    assert same(average, session.average)


def test_the_callers_random_state_is_left_alone(make):
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(4), want)


def test_equal_seeds_start_equal(make):
    first, second, other = make(), make(), make(seed=1)
    assert same(weights_of(first), weights_of(second))
    assert not same(weights_of(first), weights_of(other))


# ---- task loss


def test_task_loss_has_the_right_gradient_and_leaves_the_base_alone(bench):
    recipe = recipe64(bench.recipe.folder, "plain")
    # one step of the chain: there the gradient through the last step alone is the whole gradient
    recipe = replace(
        recipe, diffusion=DiffusionConfig(k=1, steps=1), denoiser=replace(recipe.denoiser, dropout=0.0)
    )
    session = session64(bench.recipe.folder, recipe=recipe)
    base = session.bench.base.model
    before = [p.clone() for p in base.parameters()]
    weight = session.plain_network.map.weight
    session.optimizer.zero_grad()
    session.task_loss(unit_rng(0, 1, 0)).backward()
    index = weight.grad.abs().flatten().argmax()
    got, found = weight.grad.flatten()[index].item(), []
    for shift in (0.03, -0.03):
        with torch.no_grad():
            weight.view(-1)[index] += shift
            found.append(session.task_loss(unit_rng(0, 1, 0)).item())
            weight.view(-1)[index] -= shift
    # Llama takes its norms in float32 whatever its dtype: an error of 1e-7/0.06, beside one ∝ 0.03²
    assert got == pytest.approx((found[0] - found[1]) / 0.06, rel=0.02)
    assert abs(got) > 1e-3
    assert all(p.grad is None for p in base.parameters())
    assert same(before, base.parameters())


def test_only_the_last_step_of_the_chain_has_a_gradient():
    weight = torch.ones(1, requires_grad=True)
    predict = last_step_only(lambda x, t: weight * x, 3)
    for t, wanted in ((0, False), (1, False), (2, True)):
        assert predict(torch.ones(2, 1, 1), torch.full((2,), t)).requires_grad is wanted


@pytest.mark.parametrize(("share", "least", "most"), [(None, 0.5, 0.85), (1.0, 1.0, 1.0), (0.25, 0.1, 0.4)])
def test_a_share_of_the_examples_has_the_prompt(bench, share, least, most):
    pool = bench.pool(bench.suite.split("train")[0])
    rows = pick_rows(pool, 200, share, unit_rng(0, 1, 0))
    assert least <= sum(row in pool.prompted for row in rows) / 200 <= most
    assert set(rows) <= {*pool.prompted, *pool.plain}


def test_without_prompts_their_rows_are_never_made(make, monkeypatch):
    about = TaskLossConfig(steps=1, tasks=2, examples=2, prompt_in_context=0.0)
    session = make(steps=0, task_loss=about)
    monkeypatch.setattr(type(session.bench), "pool", lambda *_: pytest.fail("rows with prompts"))
    session.task_loss(unit_rng(0, 1, 0)).backward()
    task = session.bench.suite.split("train")[0]
    pool = session.bench.plain_pool(task)
    assert pool.prompted == ()
    assert len(pool.plain) == min(len(task.train), session.recipe.collect.rows)
    ids = {row.ids for row in pool.rows}
    assert ids == {make_row(session.bench.base.tokenizer, None, e).ids for e in task.train[: len(pool.plain)]}


def test_task_loss_falls_on_its_own_tasks(make):
    session = make(steps=1, task_loss=TaskLossConfig(steps=12, tasks=2, examples=8, learning_rate=0.02))

    def loss():
        with torch.no_grad():
            return sum(session.task_loss(unit_rng(7, 0, unit)).item() for unit in range(4))

    next(steps := session.steps())
    before = loss()
    for _ in steps:
        pass
    assert loss() < before


# ---- refusals


class Pretending(Accelerator):
    """An accelerator that says it shards, or has other processes."""

    def __init__(self, kind=DistributedType.NO, processes=1):
        super().__init__(cpu=True)
        self.kind, self.processes = kind, processes

    distributed_type = property(lambda self: self.kind)
    num_processes = property(lambda self: self.processes)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_reptile_with_sharding_is_refused_by_name(bench, prepared, kind):
    recipe = replace(bench.recipe, meta=MetaConfig(method="reptile"))
    with pytest.raises(ValueError, match=rf"'reptile' needs replicated weights.*{kind.value}.*method: plain"):
        check(recipe, prepared, Pretending(kind), bench)
    check(replace(recipe, meta=MetaConfig()), prepared, Pretending(kind), bench)


def test_parts_that_do_not_divide_are_refused(bench, prepared):
    with pytest.raises(ValueError, match=r"train\.units is 2.*multiple of the 3 processes"):
        check(bench.recipe, prepared, Pretending(processes=3), bench)
    odd = replace(bench.recipe, train=replace(bench.recipe.train, batch_size=5))
    with pytest.raises(ValueError, match=r"train\.batch_size is 5.*multiple of train\.units, 2"):
        check(odd, prepared, Pretending(), bench)
    about = TaskLossConfig(steps=1, tasks=3)
    odd = replace(bench.recipe, train=replace(bench.recipe.train, task_loss=about))
    with pytest.raises(ValueError, match=r"train\.task_loss\.tasks is 3"):
        check(odd, prepared, Pretending(), bench)


def test_task_loss_without_examples_is_refused(bench, prepared):
    recipe = replace(bench.recipe, train=replace(bench.recipe.train, task_loss=TaskLossConfig(steps=1)))
    with pytest.raises(ValueError, match="pass a bench"):
        check(recipe, prepared, Pretending(), None)
    name = SPLITS["train"][0]
    bare = Task(name, ("do it",))
    suite = replace(bench.suite, tasks={**bench.suite.tasks, name: bare})
    with pytest.raises(ValueError, match=rf"task '{name}' has none"):
        check(recipe, prepared, Pretending(), replace(bench, suite=suite))


# ---- resume


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(make, method, tmp_path):
    whole = make(method)
    losses = [step.loss.item() for step in whole.steps()]
    first = make(method)
    for step in first.steps():
        if step.index == 5:
            break
    save_point(first, tmp_path)
    second = make(method)
    resume(second, tmp_path)
    assert second.done == 5
    assert [step.loss.item() for step in second.steps()] == losses[5:]
    assert same(weights_of(whole), weights_of(second))
    assert same(whole.average, second.average)
    without = make(method)  # the control: from the same step without the optimiser's state
    resume(without, tmp_path)
    without.optimizer.state.clear()
    list(without.steps())
    assert not same(weights_of(whole), weights_of(without))


def test_a_changed_recipe_or_store_is_refused_by_name(make, prepared, tmp_path):
    session = make()
    session.step()
    save_point(session, tmp_path)
    with pytest.raises(ValueError, match=r"other \['recipe.train.learning_rate'\]. Remove .* to train again"):
        resume(make(learning_rate=1e-4), tmp_path)
    resume(make(log_every=3, checkpoint_every=7), tmp_path)
    other = make()
    data = replace(prepared.data, tokens=prepared.data.tokens + 1e-3)
    other.prepared = replace(prepared, data=data)
    with pytest.raises(ValueError, match=r"other \['collected runs'\]"):
        resume(other, tmp_path)


def test_what_may_change_between_two_halves(bench, prepared):
    recipe, made = bench.recipe, made_from(bench.recipe, prepared)
    evaluation = replace(recipe.evaluate, examples=1)
    assert made_from(replace(recipe, name="x", output="y", evaluate=evaluation), prepared) == made
    assert made_from(replace(recipe, seed=1), prepared) != made
    assert json.loads(json.dumps(made)) == made


def test_an_unfinished_resume_point_is_passed_over_and_two_are_kept(make, tmp_path):
    session = make()
    for step in session.steps():
        save_point(session, tmp_path)
        if step.index == 3:
            break
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "progress.json").unlink()
    again = make()
    resume(again, tmp_path)
    assert again.done == 2
    empty = make()
    resume(empty, tmp_path / "none")
    assert empty.done == 0


# ---- two processes


@pytest.mark.slow
def test_two_processes_are_one(bench, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate/cpu2.yaml")
    said = run(*launch, ROOT / "tests/tiny_session.py", bench.recipe.folder, tmp_path)
    assert said.returncode == 0, said.stderr
    for method in METHODS:
        losses, weights = trained64(bench.recipe.folder, method)
        about = json.loads((tmp_path / f"{method}.json").read_text())
        assert about["world_size"] == 2
        assert len(losses) == 2 * STEPS
        # float64; sums over units in another order
        assert_close(torch.tensor(about["losses"]), torch.tensor(losses), rtol=1e-10, atol=1e-10)
        assert_close(load_file(tmp_path / f"{method}.safetensors"), weights, rtol=1e-10, atol=1e-10)
        assert not math.isclose(losses[0], losses[1], rel_tol=1e-6)
