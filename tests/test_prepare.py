"""From runs to what the network sees: honest centres, a cache that cannot be stale, a gate that stops."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_bench import SPLITS, collected, prepared_of, tiny_bench
from torch.testing import assert_close

from ltdi_peft import prepare as room
from ltdi_peft.centre import INTERCEPT
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import CodecConfig
from ltdi_peft.distance import delta_w_distance
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.prepare import (
    Gate,
    GateError,
    TrainingSet,
    all_conditions,
    cache_file,
    fit_centre,
    fit_codec,
    norm_range,
    require_kept,
    require_one_frame,
    round_trip_gate,
    training_trajectories,
)
from ltdi_peft.spec import SpecMismatchError, site_norms
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.train import validation_runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("prepare"))


@pytest.fixture(scope="module")
def runs(bench):
    return training_trajectories(bench.recipe, SPLITS["train"])


@pytest.fixture(scope="module")
def prepared(bench):
    return prepared_of(bench)


def random_set(tasks=6, prompts=2):
    rng = torch.Generator().manual_seed(0)
    conditions = torch.randn(tasks, prompts, 4, generator=rng)
    tokens = torch.randn(tasks, 3, 2, 5, generator=rng)
    return TrainingSet(tuple("abcdef"), tokens, torch.arange(tasks), conditions)


# ---- conditions


def test_conditions_are_read_where_nothing_changed(bench, prepared, monkeypatch):
    monkeypatch.setattr(PromptEncoder, "__call__", lambda *args: pytest.fail("encoded again"))
    assert torch.equal(prepared_of(bench).data.conditions, prepared.data.conditions)


def test_conditions_of_other_texts_or_another_encoder_are_made_anew(bench, tmp_path):
    encoder, tasks = PromptEncoder("base", base=bench.base), [bench.suite[name] for name in SPLITS["train"]]
    found = all_conditions(encoder, tasks, 2, tmp_path, progress=False)
    assert torch.equal(found, all_conditions(encoder, tasks, 2, None, progress=False))
    other = replace(tasks[0], prompts=("name w1", "say w2"))
    asked = all_conditions(encoder, [other, *tasks[1:]], 2, tmp_path, progress=False)
    assert not torch.equal(asked[0], found[0])
    assert torch.equal(asked[1:], found[1:])
    other_model = PromptEncoder("base", base=tiny_bench(bench.recipe).base)
    with torch.no_grad():
        next(other_model.model.parameters()).mul_(-1)
    assert not torch.equal(all_conditions(other_model, tasks, 2, tmp_path, progress=False), found)
    assert len(list(tmp_path.iterdir())) == 3


# ---- centre


def centres(centre):
    """(task, prompt, k, site, width): every training task's centre from each of its paraphrases."""
    tasks, prompts, _ = centre.mixture.shape
    rows = centre.training(
        torch.arange(tasks).repeat_interleave(prompts), torch.arange(prompts).repeat(tasks)
    )
    return rows.view(tasks, prompts, *rows.shape[1:])


def test_a_training_tasks_centre_knows_nothing_of_the_task(bench):
    data, config = random_set(), replace(bench.recipe.diffusion, ridge=0.1)
    tokens = data.tokens.clone()
    tokens[2] += 100.0
    before, after = (centres(fit_centre(one, config)) for one in (data, replace(data, tokens=tokens)))
    assert_close(after[2], before[2], rtol=1e-3, atol=1e-4)  # solved in float64, stored in float32
    others = [0, 1, 3, 4, 5]
    assert (after[others] - before[others]).abs().amax((1, 2, 3, 4)).min() > 0.1  # the control


def test_generation_reads_the_last_target_of_the_full_fit(bench):
    data = random_set()
    centre = fit_centre(data, replace(bench.recipe.diffusion, ridge=0.1))
    prompts = data.conditions[:, 0]
    last = torch.cat([prompts, torch.full((6, 1), INTERCEPT)], 1) @ centre.last_weight
    assert_close(last.view(6, 2, 5), centre.predict(prompts)[:, -1])
    # a weak penalty and more tasks than numbers: far from its mean, near what least squares can do
    weak = fit_centre(data, replace(bench.recipe.diffusion, ridge=1e-9))
    rows = data.conditions.flatten(0, 1).double()
    x = torch.cat([rows, torch.ones(12, 1).double()], 1)
    y = data.tokens.flatten(1).repeat_interleave(2, 0).double()
    fitted = (x @ torch.linalg.lstsq(x, y).solution).float()
    assert_close(weak.predict(rows.float()).flatten(1), fitted, rtol=1e-4, atol=1e-4)


def test_the_mean_centre_is_the_mean_for_everybody(bench):
    data = random_set()
    centre = fit_centre(data, replace(bench.recipe.diffusion, centre="mean"))
    mean = data.tokens.mean(0)
    assert_close(centres(centre), mean.expand_as(centres(centre)))
    assert_close(centre.predict(torch.randn(3, 4)), mean.expand(3, *mean.shape))
    assert centre.strength is None
    residual = data.tokens - mean
    assert centre.spread == pytest.approx(residual.square().mean().sqrt().item())


def test_several_runs_of_a_task_are_averaged():
    data = random_set()
    twice = replace(
        data, tokens=torch.cat([data.tokens + 1, data.tokens - 1]), task=torch.arange(6).repeat(2)
    )
    assert_close(twice.task_means, data.tokens)


# ---- cache, ranges


def test_what_was_fitted_is_read_again(bench, runs, monkeypatch):
    prepared_of(bench)
    monkeypatch.setattr(AdapterCodec, "fit", lambda *args, **kwargs: pytest.fail("fitted again"))
    monkeypatch.setattr(AdapterCodec, "encode_many", lambda *args: pytest.fail("encoded again"))
    again = prepared_of(bench)
    assert again.data.tokens.shape == (len(runs), 3, len(bench.spec.sites), 8)


def test_the_cache_changes_with_runs_and_codec_alone(bench, runs):
    recipe = bench.recipe
    name = cache_file(recipe, runs, "codec").name
    assert cache_file(replace(recipe, codec=replace(recipe.codec, gate=0.5)), runs, "codec").name == name
    assert cache_file(replace(recipe, codec=CodecConfig(width=4)), runs, "codec").name != name
    assert cache_file(recipe, runs[1:], "codec").name != name
    last = runs[0].snapshots[-1]
    other = replace(runs[0], snapshots=(*runs[0].snapshots[:-1], replace(last, loss=last.loss + 1e-12)))
    assert cache_file(recipe, [other, *runs[1:]], "codec").name != name


def test_norm_range_holds_every_final_adapter(bench, runs):
    ranges = norm_range(runs)
    for one in runs:
        for site, norm in site_norms(one.spec, one.adapter(one.snapshots[-1])).items():
            low, high = ranges[site]
            assert low <= norm <= high
    assert all(low < high for low, high in ranges.values())


# ---- refusals


def test_too_few_tasks_are_refused(bench, tmp_path):
    recipe = replace(bench.recipe, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"finished runs of 0 training tasks.*ltdi collect"):
        training_trajectories(recipe, SPLITS["train"])
    with pytest.raises(ValueError, match="finished runs of 1 training tasks"):
        training_trajectories(bench.recipe, SPLITS["train"][:1])


def test_runs_of_two_starts_are_refused_unless_the_gauge_forgets_them(bench, runs, tmp_path):
    shutil.copytree(bench.recipe.store_folder, tmp_path / "trajectories")
    store = TrajectoryStore(tmp_path / "trajectories")
    task = bench.suite[SPLITS["train"][0]]
    writer = store.start_run(bench.spec, task, seed=9, start=bench.fresh, planned_steps=6)
    writer.write(6, runs[0].adapter(runs[0].snapshots[-1]))
    writer.finish(6)
    recipe = replace(bench.recipe, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"-s9 starts from .*'shared_a' all runs need one start"):
        training_trajectories(recipe, SPLITS["train"])
    free = replace(recipe, collect=replace(recipe.collect, gauge="canonical"))
    assert len(training_trajectories(free, SPLITS["train"])) == len(runs) + 1


def test_another_rank_is_refused(bench, runs):
    sites = tuple(replace(site, alpha=8.0) for site in bench.spec.sites)
    odd = replace(runs[0], spec=replace(bench.spec, sites=sites))
    with pytest.raises(SpecMismatchError, match=r"alpha 8\.0, expected 4\.0"):
        require_one_frame([runs[0], odd], bench.recipe)


# ---- gate


@pytest.fixture
def graded(monkeypatch, runs):
    """Accuracy = 1 − relative ΔW distance to the oracle, which is the third candidate."""

    def score(adapted, sheet, stacked):
        one = [{site: (a[i], b[i]) for site, (a, b) in stacked.items()} for i in range(4)]
        distances = [delta_w_distance(runs[0].spec, adapter, one[2], relative=True) for adapter in one]
        return SimpleNamespace(accuracy=1 - torch.tensor(distances))

    monkeypatch.setattr(room, "score", score)


def test_full_width_passes_the_gate_and_a_narrow_codec_does_not(bench, runs, graded):
    held_out = validation_runs(bench.recipe, bench)
    whole = fit_codec(replace(bench.recipe, codec=CodecConfig(width=None, dtype="float32")), runs)
    gate = round_trip_gate(bench, whole, held_out)
    assert gate.kept > 0.999
    require_kept(gate, 0.95, whole)
    narrow = fit_codec(replace(bench.recipe, codec=CodecConfig(width=1)), runs)
    gate = round_trip_gate(bench, narrow, held_out)
    assert gate.kept < 0.95
    with pytest.raises(
        GateError, match=rf"keeps {gate.kept:.3f} .*{gate.before:.3f} before, {gate.after:.3f}"
    ):
        require_kept(gate, 0.95, narrow)


def test_the_gate_runs_the_base_model(bench, runs):
    held_out = validation_runs(bench.recipe, bench)
    whole = fit_codec(replace(bench.recipe, codec=CodecConfig(width=None, dtype="float32")), runs)
    gate = round_trip_gate(bench, whole, held_out)
    assert gate.before == gate.after  # what is equal answers equally
    assert 0 <= gate.base <= 1


def test_kept_share():
    assert Gate(0.1, 0.3, 0.5, 0.4).kept == pytest.approx(0.75)
    assert Gate(0.5, 0.5, 0.5, 0.5).kept == 0.0  # no gain, so nothing is shown
    assert Gate(0.5, 0.5, 0.4, 0.5).kept == 0.0


def test_a_gate_without_validation_runs_is_refused(bench, prepared):
    with pytest.raises(ValueError, match=r"needs runs of validation tasks.*codec.gate: 0"):
        round_trip_gate(bench, prepared.codec, [])


def test_canonical_runs_are_prepared_too(bench, runs):
    recipe = replace(bench.recipe, collect=replace(bench.recipe.collect, gauge="canonical"))
    recipe = replace(recipe, codec=CodecConfig(width=None, dtype="float32"))
    made = prepared_of(replace(bench, recipe=recipe))
    last = runs[0].adapter(runs[0].snapshots[-1])
    got = made.codec.decode(made.data.tokens[0, -1])
    assert delta_w_distance(bench.spec, got, last, relative=True) < 1e-4  # float32 factors of an SVD
