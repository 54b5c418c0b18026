"""T2L: an untrained one is the start; both trainings do what they say; made once, from a seed."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, collected, prepared_of
from torch.testing import assert_close

from ltdi_peft import t2l
from ltdi_peft.baselines import final_adapter
from ltdi_peft.batched import stack_adapters
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import T2LConfig, T2LTraining
from ltdi_peft.guidance import GUIDANCE, MEAN_SHARES, Guidance
from ltdi_peft.hypernetwork import Hypernetwork, kind_and_layer, mean_difference, parameter_count
from ltdi_peft.prepare import TrainingSet, training_trajectories
from ltdi_peft.score import make_sheet, score
from ltdi_peft.spec import AdapterSpec, Site, check_adapter
from ltdi_peft.t2l import T2LRival, train_t2l
from ltdi_peft.t2l_fit import (
    mean_targets,
    reconstruction_loss,
    t2l_steps,
    validation_accuracy,
    validation_set,
)

WIDTH = 6  # of made-up conditions
TINY = T2LConfig(
    hidden=16,
    layers=1,
    examples=4,
    reconstruction=T2LTraining(steps=45, tasks=3, learning_rate=3e-2, validate_every=15),
    sft=T2LTraining(steps=24, tasks=3, learning_rate=3e-2, validate_every=6),
)
GAUGES = pytest.mark.parametrize("train_a", [False, True], ids=["shared_a", "shared_start"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = collected(tmp_path_factory.mktemp("t2l"))
    return replace(made, recipe=replace(made.recipe, evaluate=replace(made.recipe.evaluate, t2l=TINY)))


@pytest.fixture(scope="module")
def alone(bench):
    """Without validation tasks, so that the last weights stand and not, if it scores best, the start."""
    tasks = {name: task for name, task in bench.suite.tasks.items() if name not in SPLITS["validation"]}
    suite = replace(bench.suite, tasks=tasks, splits={**bench.suite.splits, "validation": ()})
    return replace(bench, suite=suite)


@pytest.fixture(scope="module")
def runs(bench):
    return training_trajectories(bench.recipe, SPLITS["train"])


@pytest.fixture(scope="module")
def data(bench):
    return prepared_of(bench).data


@pytest.fixture(scope="module")
def encoder(bench):
    return PromptEncoder("base", base=bench.base)


def two_layers():
    """q (8 → 6) and v (8 → 4) of layers 3 and 11, rank 2, and a random start."""
    shapes = {"q": 6, "v": 4}
    names = sorted(f"model.layers.{layer}.{kind}" for layer in (3, 11) for kind in shapes)
    sites = tuple(Site(name, 8, shapes[name[-1]], 2, 4.0, 2.0) for name in names)
    rng = torch.Generator().manual_seed(0)
    start = {
        s.name: (torch.randn(2, 8, generator=rng), torch.randn(s.fan_out, 2, generator=rng)) for s in sites
    }
    return AdapterSpec("tiny", sites, {}), start


def network_of(train_a=False, *, moved=False):
    spec, start = two_layers()
    torch.manual_seed(0)
    network = Hypernetwork(spec, start, condition_width=WIDTH, hidden=16, layers=2, train_a=train_a)
    if moved:
        with torch.no_grad():
            for head in network.heads.parameters():
                head += torch.randn_like(head)
    return network


def conditions(count=3):
    rng = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(count, WIDTH, generator=rng), dim=1)


def same_adapter(one, other):
    return all(one[s][i].equal(other[s][i]) for s in other for i in (0, 1)) and list(one) == list(other)


# ---- the network


@GAUGES
def test_untrained_is_the_start_exactly(train_a):
    network = network_of(train_a)
    nothing = {kind: torch.zeros_like(one[:1]) for kind, one in network(conditions(1)).items()}
    for share in MEAN_SHARES:
        rival = T2LRival(network, nothing, Guidance(2.0, share))
        assert all(same_adapter(one, network.start) for one in rival.adapters(conditions()))
    moved = T2LRival(network_of(train_a, moved=True), nothing)
    assert not any(same_adapter(one, network.start) for one in moved.adapters(conditions()))


@GAUGES
def test_every_site_has_its_shapes_and_a_frozen_a_is_the_starts(train_a):
    network = network_of(train_a, moved=True)
    spec, start = two_layers()
    nothing = {kind: torch.zeros_like(one[:1]) for kind, one in network(conditions(1)).items()}
    adapters = T2LRival(network, nothing).adapters(conditions())
    assert len(adapters) == 3
    for adapter in adapters:
        check_adapter(spec, adapter, "generated")
        assert all(adapter[s][0].equal(start[s][0]) is not train_a for s in start)
        assert not any(adapter[s][1].equal(start[s][1]) for s in start)


def test_sites_of_one_module_differ_and_prompts_too():
    """Layer 3 and layer 11 share a head, and all prompts share all: only what they are told differs."""
    found = network_of(moved=True)(conditions())
    assert set(found) == {"model.layers.*.q", "model.layers.*.v"}
    for one in found.values():
        assert (one[:, 0] - one[:, 1]).abs().max() > 1e-3
        assert (one[0] - one[1]).abs().max() > 1e-3


@GAUGES
def test_a_gradient_reaches_every_parameter(train_a):
    network = network_of(train_a, moved=True)
    factors = network.factors(network(conditions()))
    sum(b.square().sum() + a.square().sum() for a, b in factors.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(not factor.requires_grad for pair in network.start.values() for factor in pair)


@GAUGES
def test_differences_undo_factors(train_a):
    network = network_of(train_a, moved=True)
    spec, _ = two_layers()
    with torch.no_grad():
        found = network(conditions(1))
        adapter = {site: (a[0], b[0]) for site, (a, b) in network.factors(found).items()}
    for kind, one in network.differences(adapter).items():
        assert_close(one, found[kind], rtol=0, atol=1e-5)  # start + difference − start, float32
    assert all(one.abs().max() == 0 for one in network.differences(two_layers()[1]).values())
    assert [site.name for site in spec.sites] == list(adapter)


@GAUGES
def test_units_make_differences_of_size_one(train_a):
    network = network_of(train_a)
    rng = torch.Generator().manual_seed(2)
    made = {k: 7 * torch.randn(5, *one.shape[1:], generator=rng) for k, one in network(conditions(1)).items()}
    made["model.layers.*.v"][:, 1] = 0  # a site that no run moved
    network.set_units(made)
    for kind, one in made.items():
        of_a, of_b = network.sizes(kind)
        for part in (one / network.units(kind)).split((of_a, of_b), dim=2):
            size = part.square().mean((0, 2)).sqrt() if part.shape[2] else torch.ones(2)
            assert_close(size, torch.tensor([1.0, 0.0 if kind.endswith("v") and part.shape[2] else 1.0]))


def test_the_number_of_parameters():
    """By hand: condition, two embeddings, inward, one head a module; a block is 2·4·h² + 7·h."""
    h, e = 16, 32
    blocks = 2 * (2 * h + (4 * h * h + 4 * h) + (4 * h * h + h))
    heads = (h + 1) * (6 * 2 + 4 * 2)
    want = (WIDTH * h + h) + (2 + 2) * e + ((h + 2 * e) * h + h) + blocks + 2 * h + heads
    assert parameter_count(network_of()) == want


def test_kinds():
    assert kind_and_layer("model.layers.7.self_attn.q_proj") == ("model.layers.*.self_attn.q_proj", 7)
    assert kind_and_layer("model.layers.7.mlp.experts.3.up") == ("model.layers.*.mlp.experts.3.up", 7)
    assert kind_and_layer("lm_head") == ("lm_head", -1)


def test_sites_of_one_module_with_other_shapes_are_refused():
    sites = tuple(Site(f"layers.{i}.q", 8, 6 + i, 2, 4.0, 2.0) for i in (0, 1))
    start = {site.name: (torch.ones(2, 8), torch.ones(site.fan_out, 2)) for site in sites}
    with pytest.raises(ValueError, match=r"layers\.\*\.q have different.*\(2, 8, 6\), \(2, 8, 7\)"):
        Hypernetwork(AdapterSpec("tiny", sites, {}), start, condition_width=WIDTH)


def test_guidance_stretches_from_the_mean_and_leaves_it_out():
    network = network_of(moved=True)
    mean = {kind: one.detach().mean(0, keepdim=True) for kind, one in network(conditions(5)).items()}

    def b_of(scale, share):
        (adapter,) = T2LRival(network, mean, Guidance(scale, share)).adapters(conditions(1))
        return torch.cat([b.flatten() for _, b in adapter.values()])

    none, one, two = (b_of(scale, 1.0) for scale in (0.0, 1.0, 2.0))
    assert_close(two - one, one - none, rtol=1e-4, atol=1e-5)  # float32 sums
    of_mean = {site: (a[0], b[0]) for site, (a, b) in network.factors(mean).items()}
    mean_b = torch.cat([b.flatten() for _, b in of_mean.values()])
    start_b = torch.cat([b.flatten() for _, b in network.start.values()])
    assert_close(none, mean_b)
    assert_close(b_of(2.0, 0.0) - start_b, two - mean_b, rtol=1e-4, atol=1e-5)


# ---- training


def fitted(bench, data, runs, steps):
    """Losses of reconstruction on these tasks alone."""
    network = t2l.make_network(bench, data, runs[0].start())
    targets = mean_targets(network, data, runs)
    network.set_units(targets)
    training = T2LTraining(steps=steps, tasks=len(data.names), learning_rate=3e-2)
    loss = reconstruction_loss(network, targets)
    rounds = t2l_steps(network, loss, data.conditions, training, TINY, seed=0)
    return [value.item() for _, value in rounds], network, targets


def test_targets_are_the_mean_over_a_tasks_runs(bench, data, runs):
    network = t2l.make_network(bench, data, runs[0].start())
    targets = mean_targets(network, data, runs)
    start = runs[0].start()
    for index, name in enumerate(data.names):
        own = [final_adapter(run) for run in runs if run.task.name == name]
        assert len(own) == 2
        for kind, sites in network.kinds.items():
            for place, site in enumerate(sites):
                want = torch.stack([one[site.name][1] - start[site.name][1] for one in own]).mean(0)
                assert_close(targets[kind][index, place].view_as(want), want)


def test_reconstruction_overfits_one_task(bench, data, runs):
    one = TrainingSet(data.names[:1], data.tokens, data.task, data.conditions[:1])
    losses, network, targets = fitted(bench, one, runs, 150)
    assert losses[0] == pytest.approx(1.0, abs=1e-4)  # zero against targets of size one
    assert losses[-1] < 1e-3
    found = network(data.conditions[0, :1])
    for kind, want in targets.items():
        assert_close(found[kind].detach(), want, rtol=0, atol=0.2 * want.abs().max().item())


@pytest.fixture(scope="module")
def reconstructed(alone, data, runs, encoder):
    return train_t2l(alone, data, runs, encoder, mode="reconstruction", progress=False)


@pytest.fixture(scope="module")
def through_base(alone, data, runs, encoder):
    before = [weight.clone() for weight in alone.base.model.state_dict().values()]
    made = train_t2l(alone, data, runs, encoder, mode="sft", progress=False)
    after = alone.base.model.state_dict().values()
    return *made, all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_reconstruction_lowers_the_error(reconstructed):
    _, about = reconstructed
    steps, losses = zip(*about["losses"], strict=True)
    assert steps == (15, 30, 45)
    assert losses[-1] < 0.5 * losses[0]


def test_sft_lowers_the_loss_and_leaves_the_base_alone(alone, through_base):
    _, about, untouched = through_base
    losses = [loss for _, loss in about["losses"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert untouched
    assert all(weight.grad is None for weight in alone.base.model.parameters())
    # 3 tasks · 4 examples a step; all single runs saw 5 · 2 · 6 · 4
    assert (about["examples"], about["rule"], about["shortened"]) == (24 * 12, 20, False)


def test_both_generate_for_every_prompt_and_leave_a_untouched(bench, runs, data, reconstructed, through_base):
    start = runs[0].start()
    for rival, _ in (reconstructed, through_base[:2]):
        adapters = rival.adapters(data.conditions[:, 0])
        assert len(adapters) == len(data.names)
        for adapter in adapters:
            check_adapter(bench.spec, adapter, "generated")
            assert all(adapter[site][0].equal(start[site][0]) for site in start)
            assert not any(adapter[site][1].equal(start[site][1]) for site in start)


def test_without_validation_tasks_the_last_weights_stand(reconstructed):
    rival, about = reconstructed
    assert {point["accuracy"] for point in about["curve"]} == {0.0}
    assert rival.guidance == Guidance(1.0, 1.0)


def test_validation_tasks_choose_weights_and_guidance(bench, data, runs, encoder, tmp_path):
    recipe = replace(bench.recipe, output=str(tmp_path))
    other = replace(bench, recipe=recipe)
    rival, about = train_t2l(other, data, runs, encoder, mode="sft", progress=False)
    assert [point["step"] for point in about["curve"]] == [0, 6, 12, 18, 24]
    kept = validation_accuracy(other, rival.network, validation_set(other, data, encoder))
    assert kept == max(point["accuracy"] for point in about["curve"])
    tried = about["validation_accuracy"]
    assert list(tried) == [str(share) for share in MEAN_SHARES]
    assert all(list(one) == [str(scale) for scale in GUIDANCE] for one in tried.values())
    assert Guidance(about["scale"], about["mean_share"]) == rival.guidance


def test_validation_scores_each_task_with_its_own_adapter(bench, data, runs, encoder):
    """By hand: an adapter a prompt, with the mean and without, and the better of the two."""
    network = fitted(bench, data, runs, 40)[1]
    validation = validation_set(bench, data, encoder)
    mean = mean_difference(network, data.conditions)
    (task,) = bench.suite.split("validation")
    sheet = make_sheet(bench.adapted, task.evaluation, task.held_out_prompts[:1])
    each = []
    for share in MEAN_SHARES:
        rival = T2LRival(network, mean, Guidance(1.0, share))
        stacked = stack_adapters(rival.adapters(encoder(task.held_out_prompts[:1])))
        each.append(score(bench.adapted, sheet, stacked).accuracy.item())
    assert validation_accuracy(bench, network, validation) == pytest.approx(max(each))


def test_the_best_on_validation_tasks_is_kept(bench, data, runs, encoder, monkeypatch):
    """Accuracies are made up: the second validation is best, and its weights must stand; so at a tie."""
    seen = []

    def made_up(bench, network, validation):
        seen.append({key: weight.clone() for key, weight in network.state_dict().items()})
        return (0.1, 0.4, 0.3, 0.4)[len(seen) - 1]

    monkeypatch.setattr("ltdi_peft.t2l_fit.validation_accuracy", made_up)
    network = t2l.make_network(bench, data, runs[0].start())
    t2l.fit_t2l(bench, network, data, runs, encoder, mode="reconstruction", progress=False)
    kept = network.state_dict()
    assert all(kept[key].equal(weight) for key, weight in seen[1].items())
    assert not all(kept[key].equal(weight) for key, weight in seen[3].items())


def test_same_seed_same_bytes(alone, data, runs, encoder, tmp_path, reconstructed, through_base):
    weights = {}
    for seed in (0, 1):
        recipe = replace(alone.recipe, output=str(tmp_path / str(seed)), seed=seed)
        for mode, folder in t2l.FOLDERS.items():
            train_t2l(replace(alone, recipe=recipe), data, runs, encoder, mode=mode, progress=False)
            weights[seed, mode] = (recipe.folder / folder / t2l.WEIGHTS_FILE).read_bytes()
    for mode, folder in t2l.FOLDERS.items():
        first = (alone.recipe.folder / folder / t2l.WEIGHTS_FILE).read_bytes()
        assert weights[0, mode] == first
        assert weights[1, mode] != first


def never(*args, **kwargs):
    raise RuntimeError("trained again")


def test_a_kept_one_is_read(alone, data, runs, encoder, reconstructed, through_base, monkeypatch):
    monkeypatch.setattr(t2l, "fit_t2l", never)
    for mode, (rival, about) in (("reconstruction", reconstructed), ("sft", through_base[:2])):
        again, same = train_t2l(alone, data, runs, encoder, mode=mode, progress=False)
        assert again.digest() == rival.digest()
        assert same == about
    assert reconstructed[0].digest() != through_base[0].digest()
    assert replace(again, guidance=Guidance(0.5, 0.5)).digest() != again.digest()


def changed(bench, **fields):
    evaluate = replace(bench.recipe.evaluate, t2l=replace(TINY, **fields))
    return replace(bench, recipe=replace(bench.recipe, evaluate=evaluate))


def test_another_plan_is_refused(alone, data, runs, encoder, reconstructed, monkeypatch):
    monkeypatch.setattr(t2l, "fit_t2l", never)
    read = {"mode": "reconstruction", "progress": False}
    with pytest.raises(
        ValueError, match=r"t2l_recon was trained with another \['config'\]. Remove the folder"
    ):
        train_t2l(changed(alone, hidden=8), data, runs, encoder, **read)
    with pytest.raises(ValueError, match=r"another \['runs'\]"):
        train_t2l(alone, data, runs[:-1], encoder, **read)
    with pytest.raises(ValueError, match=r"another \['conditions'\]"):
        train_t2l(alone, replace(data, conditions=data.conditions + 1e-3), runs, encoder, **read)
    # what the other mode alone reads may change
    train_t2l(changed(alone, examples=2, sft=T2LTraining()), data, runs, encoder, **read)


def test_another_validation_set_is_another_plan(bench, data, runs, encoder, reconstructed):
    with pytest.raises(ValueError, match=r"another \['validation'\]"):
        train_t2l(bench, data, runs, encoder, mode="reconstruction", progress=False)


def test_what_cannot_be_made_is_refused_by_name(alone, data, runs, encoder, reconstructed):
    with pytest.raises(ValueError, match=r"mode of T2L is 'both'.*'reconstruction', 'sft'"):
        train_t2l(alone, data, runs, encoder, mode="both", progress=False)
    odd = replace(runs[1], start_path=runs[1].start_path.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"starts from other\.safetensors.*runs of one start"):
        train_t2l(alone, data, [runs[0], odd], encoder, mode="sft", progress=False)
    file = alone.recipe.folder / "t2l_recon" / t2l.WEIGHTS_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, truncated.*Remove its folder"):
        train_t2l(alone, data, runs, encoder, mode="reconstruction", progress=False)
    file.write_bytes(whole)
