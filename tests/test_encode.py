"""gauge, subspace, encode, distance: gauges, compression, the codec file, ΔW. Random factors, no model."""

import math
import runpy
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ltdi_peft.distance import (
    delta_w_distance,
    delta_w_error,
    pairwise_delta_w_distances,
    truncated_mean,
)
from ltdi_peft.encode import HEADER, TOGETHER, AdapterCodec, round_trip
from ltdi_peft.gauge import GAUGES, balanced, turned_to
from ltdi_peft.spec import AdapterSpec, BrokenAdapterError, Site, SpecMismatchError, delta_w
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.subspace import StreamingSubspace
from ltdi_peft.task import Task

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
# Other ranks, alphas, shapes and scalings (alpha/rank and alpha/√rank) at every site: a rank pattern.
SPEC = AdapterSpec(
    base_model="tiny/llama",
    sites=(
        Site("layers.0.q_proj", fan_in=12, fan_out=10, rank=2, alpha=4.0, scaling=2.0),
        Site("layers.0.v_proj", fan_in=12, fan_out=6, rank=3, alpha=3.0, scaling=math.sqrt(3)),
        Site("layers.1.q_proj", fan_in=8, fan_out=16, rank=1, alpha=0.5, scaling=0.5),
    ),
    config={"r": 2, "rank_pattern": {"v_proj": 3}},
)
NAMES = [site.name for site in SPEC.sites]
# Float32 factors and tokens, a float64 gauge in between: about ten roundings of 6e-8.
FLOAT32 = 1e-6


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_adapter(seed, spec=SPEC):
    rng = seeded(seed)
    return {
        s.name: (torch.randn(s.rank, s.fan_in, generator=rng), torch.randn(s.fan_out, s.rank, generator=rng))
        for s in spec.sites
    }


START = random_adapter(0)


def trained(seed, gauge, span=None):
    """START after training: A frozen in shared_a; `span`: B − B_0 lies in a span of that many directions."""
    step = random_adapter(1000 + seed)
    out = {}
    for i, name in enumerate(NAMES):
        (a, b), (da, db) = START[name], step[name]
        if span is not None:
            mix = torch.randn(span, generator=seeded(7 * seed + i))
            db = sum(m * random_adapter(5000 + n)[name][1] for n, m in enumerate(mix.tolist()))
        out[name] = (a if gauge == "shared_a" else a + 0.1 * da, b + 0.1 * db)
    return out


def fitted(gauge="shared_a", width=None, count=12, span=None, **options):
    adapters = [trained(seed, gauge, span) for seed in range(count)]
    start = None if gauge == "canonical" else START
    return AdapterCodec.fit(
        lambda: iter(adapters), SPEC, start, gauge=gauge, width=width, **options
    ), adapters


def with_site(adapter, name, a=None, b=None):
    old_a, old_b = adapter[name]
    return {**adapter, name: (old_a if a is None else a, old_b if b is None else b)}


def dense(adapter, spec=SPEC):
    """All ΔW in one float64 vector, formed the plain way: the reference of every distance."""
    parts = [delta_w(*(w.double() for w in adapter[s.name]), s.scaling).flatten() for s in spec.sites]
    return torch.cat(parts)


def turned(adapter, seed):
    """(GA, BG⁻¹) with a well-conditioned random G, in float64."""
    out = {}
    for i, (name, (a, b)) in enumerate(adapter.items()):
        g = torch.randn(len(a), len(a), generator=seeded(seed + i), dtype=torch.float64)
        g = g + 3 * torch.eye(len(a), dtype=torch.float64)
        out[name] = (g @ a.double(), b.double() @ g.inverse())
    return out


# --- inverse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", GAUGES)
def test_full_width_is_the_identity_on_delta_w(gauge):
    codec, adapters = fitted(gauge)
    for adapter in [*adapters[:2], trained(99, gauge)]:  # 99: never seen by fit
        errors = delta_w_error(SPEC, round_trip(codec, adapter), adapter)
        assert max(errors.values()) < FLOAT32
        assert_close(dense(round_trip(codec, adapter)), dense(adapter), rtol=0, atol=1e-5)  # ‖ΔW‖ is about 10
    assert codec.width == max(frame.dim for frame in codec.frames)


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_narrow_width_is_not_the_identity(gauge):
    """Negative control of the test above: it can fail."""
    codec, _ = fitted(gauge, width=3)
    adapter = trained(99, gauge)
    assert min(delta_w_error(SPEC, round_trip(codec, adapter), adapter).values()) > 1e-3


def test_zero_tokens_are_the_origin():
    for gauge in ("shared_a", "shared_start"):
        codec, _ = fitted(gauge, width=5)
        assert_close(codec.decode(torch.zeros(3, 5)), START, rtol=0, atol=0)
        assert codec.encode(START).abs().max() == 0
    codec, _ = fitted("canonical", width=5)
    assert all(w.abs().max() == 0 for pair in codec.decode(torch.zeros(3, 5)).values() for w in pair)


def test_decoded_factors_are_plain_and_own_their_memory():
    codec, adapters = fitted("shared_a")
    decoded = round_trip(codec, adapters[0])
    for site in SPEC.sites:
        a, b = decoded[site.name]
        assert (a.shape, b.shape) == ((site.rank, site.fan_in), (site.fan_out, site.rank))
        assert a.dtype == b.dtype == torch.float32
        assert a.is_contiguous()
        assert b.is_contiguous()
        a.zero_()
    assert_close(codec.decode(torch.zeros(3, codec.width)), START, rtol=0, atol=0)
    assert list(decoded) == NAMES


def test_tokens_have_a_mask_and_zero_padding():
    codec, adapters = fitted("shared_a")
    assert codec.mask.sum(1).tolist() == [20, 18, 16]  # fan_out · rank
    tokens = codec.encode(adapters[0])
    assert tokens.shape == (3, 20)
    assert (tokens[~codec.mask] == 0).all()
    wide, _ = fitted("shared_a", width=50)  # wider than any site
    assert wide.encode(adapters[0]).shape == (3, 50)
    assert max(delta_w_error(SPEC, round_trip(wide, adapters[0]), adapters[0]).values()) < FLOAT32


# --- gauges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", ["canonical", "reference"])
def test_imported_gauges_forget_g(gauge):
    codec, adapters = fitted(gauge)
    assert_close(codec.encode(turned(adapters[0], 3)), codec.encode(adapters[0]), rtol=0, atol=1e-5)


def test_shared_start_does_not_forget_g():
    """Negative control: the same check fails in a gauge that relies on the start."""
    codec, adapters = fitted("shared_start")
    turned_tokens = codec.encode(turned(adapters[0], 3))
    assert (turned_tokens - codec.encode(adapters[0])).abs().max() > 0.1


def test_balanced_factors_are_balanced_ordered_and_signed():
    a, b = random_adapter(4)[NAMES[1]]
    new_a, new_b = balanced(a, b)
    assert_close(new_b @ new_a, b.double() @ a.double(), rtol=0, atol=1e-12)  # float64
    assert_close(new_a @ new_a.mT, new_b.mT @ new_b, rtol=0, atol=1e-12)
    singular = torch.linalg.svdvals(b.double() @ a.double())[:3]
    assert_close((new_a @ new_a.mT).diag(), singular, rtol=0, atol=1e-12)
    largest = new_b.abs().argmax(0)
    assert (new_b[largest, range(3)] > 0).all()


def test_a_rank_above_the_layer_is_padded():
    a, b = torch.randn(5, 9, generator=seeded(1)), torch.randn(3, 5, generator=seeded(2))
    new_a, new_b = balanced(a, b)
    assert (new_a.shape, new_b.shape) == ((5, 9), (3, 5))
    assert_close(new_b @ new_a, b.double() @ a.double(), rtol=0, atol=1e-12)


def test_procrustes_finds_the_rotation_of_the_reference():
    a, b = balanced(*random_adapter(4)[NAMES[1]])
    q = torch.linalg.qr(torch.randn(3, 3, generator=seeded(5), dtype=torch.float64))[0]
    assert_close(turned_to((q.mT @ a, b @ q), (a, b)), (q.mT @ a, b @ q), rtol=0, atol=1e-10)


def test_procrustes_is_continuous_where_singular_values_cross():
    """`canonical` swaps its columns when σ_1 and σ_2 change places, `reference` does not."""
    spec = replace(SPEC, sites=SPEC.sites[:1])
    a = torch.linalg.qr(torch.randn(12, 2, generator=seeded(1)))[0].mT.contiguous()
    b = torch.linalg.qr(torch.randn(10, 2, generator=seeded(2)))[0]
    before, after = ({NAMES[0]: (a, b * torch.tensor([1 + d, 1 - d]))} for d in (0.01, -0.01))
    jump = {}
    for gauge, start in (("canonical", None), ("reference", before)):
        codec = AdapterCodec.fit(lambda: [before, after], spec, start, gauge=gauge, width=None)
        jump[gauge] = float((codec.encode(after) - codec.encode(before)).norm() / codec.encode(before).norm())
    assert jump["reference"] < 0.02
    assert jump["canonical"] > 0.5


def test_canonical_decodes_for_its_own_scaling():
    codec, adapters = fitted("canonical")
    coordinates = codec.encode(adapters[0]) * codec.scale[:, None]
    for site, x, used in zip(SPEC.sites, coordinates, codec.mask, strict=True):
        # ‖√S Vᵀ‖² + ‖U√S‖² = 2·Σ S of scaling·BA
        singular = torch.linalg.svdvals(delta_w(*adapters[0][site.name], site.scaling))
        assert_close(x[used].square().sum(), 2 * singular.sum(), rtol=1e-5, atol=0)


def test_shared_a_refuses_another_a():
    codec, adapters = fitted("shared_a")
    a, _ = adapters[0][NAMES[1]]
    moved = a.clone()
    moved[0, 0] += 0.25
    with pytest.raises(SpecMismatchError, match=r"layers.0.v_proj.*differs.*0\.25.*shared_start"):
        codec.encode(with_site(adapters[0], NAMES[1], a=moved))
    with pytest.raises(SpecMismatchError, match=r"adapter 1 of the stream.*layers.0.v_proj"):
        AdapterCodec.fit(
            lambda: [with_site(adapters[0], NAMES[1], a=moved)], SPEC, START, gauge="shared_a", width=4
        )
    rounded = a * (1 + 2e-7)  # two float32 roundings: still the same A
    assert codec.encode(with_site(adapters[0], NAMES[1], a=rounded)).shape == (3, 20)


def test_shared_a_refuses_a_rank_deficient_start():
    a, _ = START[NAMES[1]]
    flat = a.clone()
    flat[2] = flat[0] - 2 * flat[1]
    start = with_site(START, NAMES[1], a=flat)
    with pytest.raises(ValueError, match=r"layers.0.v_proj.*rank-deficient.*shared_start"):
        AdapterCodec.fit(lambda: [start], SPEC, start, gauge="shared_a", width=4)


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("gauge", ["shared_a", "shared_start"])
def test_shared_gauges_are_affine(gauge, width):
    codec, adapters = fitted(gauge, width=width)
    pairs = [[x[name] for x in adapters[:4]] for name in NAMES]
    mean = {
        name: (torch.stack([a for a, _ in p]).mean(0), torch.stack([b for _, b in p]).mean(0))
        for name, p in zip(NAMES, pairs, strict=True)
    }
    assert_close(codec.encode(mean), codec.encode_many(adapters[:4]).mean(0), rtol=0, atol=1e-5)


def test_token_distances_are_delta_w_distances_in_shared_a():
    codec, (x, y, *_) = fitted("shared_a")
    tokens = (codec.encode(x) - codec.encode(y)) * codec.scale[:, None]  # out of the per-site scale
    for site, row in zip(SPEC.sites, tokens, strict=True):
        want = (delta_w(*x[site.name], site.scaling) - delta_w(*y[site.name], site.scaling)).norm()
        assert_close(row.norm(), want, rtol=1e-5, atol=0)


def test_unit_steps_of_a_and_b_move_delta_w_equally_in_shared_start():
    codec, _ = fitted("shared_start")
    for site, frame, weights in zip(SPEC.sites, codec.frames, codec.block_weights, strict=True):
        rng = seeded(3)
        moved = {"a": [], "b": []}
        for _ in range(2000):
            da = torch.randn(site.rank, site.fan_in, generator=rng, dtype=torch.float64)
            db = torch.randn(site.fan_out, site.rank, generator=rng, dtype=torch.float64)
            moved["a"].append((site.scaling * frame.b @ da / da.norm()).square().sum())
            moved["b"].append((site.scaling * db @ frame.a / db.norm()).square().sum())
        per_unit = torch.stack([torch.stack(moved[k]).mean() for k in ("a", "b")]).sqrt()
        # Mean over 2000 random directions: about 1 % of standard error.
        assert_close(per_unit, weights, rtol=0.05, atol=0)


def test_a_fresh_start_is_weighted_by_the_training_adapters():
    fresh = {name: (a, torch.zeros_like(b)) for name, (a, b) in START.items()}
    adapters = [trained(seed, "shared_start") for seed in range(4)]
    codec = AdapterCodec.fit(lambda: iter(adapters), SPEC, fresh, gauge="shared_start", width=None)
    for site, (weight_a, weight_b) in zip(SPEC.sites, codec.block_weights.tolist(), strict=True):
        rms_b = torch.stack([x[site.name][1].square().sum() for x in adapters]).mean().sqrt()
        assert math.isclose(weight_a, site.scaling * rms_b / site.rank**0.5, rel_tol=1e-5)
        assert math.isclose(
            weight_b, site.scaling * fresh[site.name][0].norm() / site.rank**0.5, rel_tol=1e-5
        )
    assert max(delta_w_error(SPEC, round_trip(codec, adapters[0]), adapters[0]).values()) < FLOAT32
    # B stays zero everywhere: any finite weight will do, but there must be one.
    still = AdapterCodec.fit(lambda: iter([fresh]), SPEC, fresh, gauge="shared_start", width=None)
    assert still.encode(fresh).abs().max() == 0


def test_gauges_do_not_mix(tmp_path):
    codec, _ = fitted("shared_a", width=4)
    codec.save(tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match=r"gauge 'shared_a', expected 'canonical'"):
        AdapterCodec.load(tmp_path / "codec.safetensors", gauge="canonical")
    assert AdapterCodec.load(tmp_path / "codec.safetensors", gauge="shared_a").gauge == "shared_a"
    with pytest.raises(ValueError, match=r"gauge is 'svd'; known gauges are shared_a"):
        AdapterCodec.fit(lambda: [START], SPEC, START, gauge="svd", width=4)
    with pytest.raises(ValueError, match=r"'canonical' has the zero adapter"):
        AdapterCodec.fit(lambda: [START], SPEC, START, gauge="canonical", width=4)
    with pytest.raises(ValueError, match=r"'shared_a' needs a start"):
        AdapterCodec.fit(lambda: [START], SPEC, None, gauge="shared_a", width=4)


# --- streaming compression --------------------------------------------------------------------------------


def streamed(data, width):
    subspace = StreamingSubspace(data.shape[1], width)
    for x in data:
        subspace.add(x)
    return subspace, *subspace.basis()


def test_streaming_equals_a_one_shot_svd_on_low_rank_data():
    rng = seeded(0)
    factors = torch.randn(900, 12, generator=rng, dtype=torch.float64) * 0.5 ** torch.arange(12)
    data = factors @ torch.randn(12, 150, generator=rng, dtype=torch.float64)  # 900 rows: 13 merges
    for width in (12, 5):  # 12: the exact rank. 5: keep = 7 < 12, so merges lose something
        subspace, energy, basis = streamed(data, width)
        _, s, vh = torch.linalg.svd(data, full_matrices=False)
        cosines = torch.linalg.svdvals(basis @ vh[:width].mT)
        assert_close(basis @ basis.mT, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
        assert_close(subspace.energy, float(data.square().sum()), rtol=1e-12, atol=0)
        if width == 12:
            assert subspace.lost < 1e-10 * subspace.energy
            assert cosines.min() > 1 - 1e-9
            assert_close(energy, float(s[:12].square().sum()), rtol=1e-9, atol=0)
        else:
            projected = float((data @ basis.mT).square().sum())
            assert subspace.lost > 1e-6 * subspace.energy
            assert energy <= projected <= float(s[:5].square().sum())
            assert projected > 0.999 * float(
                s[:5].square().sum()
            )  # half as many rows again are kept for this


def test_streaming_finds_no_more_directions_than_there_are():
    data = torch.randn(30, 3, generator=seeded(1), dtype=torch.float64)
    data = data @ torch.randn(3, 90, generator=seeded(2), dtype=torch.float64)
    _, _, basis = streamed(data, 10)
    assert basis.shape == (3, 90)
    _, energy, basis = streamed(torch.zeros(4, 90, dtype=torch.float64), 10)
    assert (energy, basis.shape) == (0.0, (0, 90))


def test_basis_signs_do_not_depend_on_the_signs_of_the_data():
    data = torch.randn(40, 80, generator=seeded(1), dtype=torch.float64)
    assert_close(streamed(-data, 6)[2], streamed(data, 6)[2], rtol=0, atol=1e-10)


def test_passes_follow_the_memory_budget_and_change_nothing():
    whole, adapters = fitted("shared_start", width=4)
    passes = []

    def stream():
        passes.append(1)
        return iter(adapters)

    needs = [StreamingSubspace(frame.dim, 4).bytes for frame in whole.frames]
    for budget, expected in ((sum(needs), 1), (sum(needs) - 1, 2), (max(needs), 3)):
        passes.clear()
        codec = AdapterCodec.fit(stream, SPEC, START, gauge="shared_start", width=4, memory_budget=budget)
        assert len(passes) == expected
        assert_close(codec.bases, whole.bases, rtol=0, atol=0)
        assert_close(codec.scale, whole.scale, rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"memory_budget is 1000 bytes.*layers.0.q_proj.*{needs[0]}"):
        AdapterCodec.fit(stream, SPEC, START, gauge="shared_start", width=4, memory_budget=1000)


def test_the_stream_is_read_lazily():
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for seed in range(100):
            adapter = trained(seed, "shared_start")
            alive.add(adapter[NAMES[0]][1])
            most = max(most, len(alive))
            yield adapter

    AdapterCodec.fit(stream, SPEC, START, gauge="shared_start", width=4)
    assert most <= 2  # the one in use, and the next one being made


class Counting(Mapping):
    """An adapter that notes which sites are asked for."""

    def __init__(self, adapter, asked):
        self.adapter, self.asked = adapter, asked

    def __getitem__(self, site):
        self.asked.append(site)
        return self.adapter[site]

    def __iter__(self):
        return iter(self.adapter)

    def __len__(self):
        return len(self.adapter)


@pytest.mark.parametrize(("count", "readings"), [(12, 1), (200, 2)])  # 200: merges lose, and are measured
def test_a_pass_asks_for_its_own_sites_alone(count, readings):
    whole, adapters = fitted("shared_start", width=4, count=count)
    asked = []
    most = max(StreamingSubspace(frame.dim, 4).bytes for frame in whole.frames)  # one site a pass
    codec = AdapterCodec.fit(
        lambda: (Counting(adapter, asked) for adapter in adapters),
        SPEC,
        START,
        gauge="shared_start",
        width=4,
        memory_budget=most,
    )
    # Not of the first: beartype looks at the first item of every mapping that it checks.
    for site in NAMES[1:]:
        assert asked.count(site) == readings * count
    assert_close(codec.bases, whole.bases, rtol=0, atol=0)
    assert_close(codec.scale, whole.scale, rtol=0, atol=0)
    assert_close(codec.energy_kept, whole.energy_kept, rtol=0, atol=0)


def test_encoding_keeps_no_second_copy_of_the_bases():
    codec, adapters = fitted("shared_start", width=4, basis_dtype="float16")
    before = codec.encode_many(adapters)
    assert codec._placed == {}
    codec.decode(before[0])  # now they are there
    assert codec._placed != {}
    assert torch.equal(codec.encode_many(adapters), before)


def test_streaming_buffers_are_bounded():
    subspace = StreamingSubspace(300, 8)
    for x in torch.randn(1000, 300, generator=seeded(1), dtype=torch.float64):
        subspace.add(x)
    assert held_bytes(subspace) == subspace.bytes < 1000 * 300 * 8 / 8
    assert subspace.basis()[1].shape == (8, 300)
    assert held_bytes(subspace) == 0


def held_bytes(subspace):
    return sum(rows.nbytes for rows in (subspace._kept, subspace._spare, subspace._fresh))


# 12 rows are kept, 64 more fit: fewer than kept, all of these, some of the others, one merge, many.
@pytest.mark.parametrize("count", [5, 12, 30, 77, 1000])
def test_the_subspace_of_few_directions_is_exact(count):
    directions = torch.randn(7, 300, generator=seeded(2), dtype=torch.float64)
    rows = torch.randn(count, 7, generator=seeded(3), dtype=torch.float64) @ directions
    subspace = StreamingSubspace(300, 8)
    for x in rows:
        subspace.add(x)
    energy, basis = subspace.basis()
    _, values, expected = torch.linalg.svd(rows, full_matrices=False)
    found = min(count, 7)
    assert_close(energy, float(values.square().sum()), rtol=1e-12, atol=0)
    assert_close(basis @ basis.mT, torch.eye(found).double(), rtol=0, atol=1e-12)
    assert_close((basis @ expected[:found].mT).abs(), torch.eye(found).double(), rtol=0, atol=1e-9)
    assert subspace.lost == pytest.approx(0, abs=1e-9 * energy)


def test_a_stream_that_cannot_be_repeated_is_refused():
    adapters = [trained(seed, "shared_start") for seed in range(5)]
    used_up = iter(adapters)
    with pytest.raises(ValueError, match=r"\[0, 5\] adapters in different passes"):
        AdapterCodec.fit(lambda: used_up, SPEC, START, gauge="shared_start", width=4, memory_budget=70_000)
    with pytest.raises(ValueError, match="stream of training adapters is empty"):
        AdapterCodec.fit(lambda: [], SPEC, START, gauge="shared_a", width=4)


def test_error_falls_with_width_out_of_sample():
    errors, kept = [], []
    for width in (1, 2, 4, 8, 20):
        codec, _ = fitted("shared_a", width=width, count=40, span=8)
        held_out = [trained(seed, "shared_a", span=8) for seed in range(100, 110)]
        errors.append(sum(delta_w_distance(SPEC, round_trip(codec, x), x) for x in held_out))
        kept.append(float(codec.energy_kept.mean()))
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert kept[:4] == sorted(kept[:4])
    # 8 directions hold all the differences, also of adapters that fit never saw; 4 do not.
    assert max(errors[3:]) < 1e-5 * errors[0]
    assert errors[2] > 0.1 * errors[0]
    assert kept[3] == pytest.approx(1, abs=1e-6)


def test_energy_kept_is_the_share_inside_the_basis():
    codec, adapters = fitted(
        "shared_a", width=3, count=80
    )  # 80 > 68 rows of buffer: merges lose, a pass measures
    full, _ = fitted("shared_a", count=80)
    energy = [(c.encode_many(adapters) * c.scale[:, None]).square().sum((0, 2)) for c in (codec, full)]
    assert_close(codec.energy_kept, energy[0] / energy[1], rtol=1e-5, atol=0)
    assert (codec.energy_kept < 0.9).all()
    assert_close(full.energy_kept, torch.ones(3), rtol=0, atol=0)


# --- scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count"), [(None, 12), (6, 12), (3, 80)])
@pytest.mark.parametrize("gauge", GAUGES)
def test_training_tokens_have_rms_one_per_site(gauge, width, count):
    codec, adapters = fitted(gauge, width=width, count=count)
    squares = codec.encode_many(adapters).square().sum((0, 2))
    assert_close(squares / (count * codec.mask.sum(1)), torch.ones(3), rtol=1e-4, atol=0)


def test_later_adapters_change_nothing():
    codec, adapters = fitted("shared_a", width=5)
    before = codec.encode(adapters[0])
    loud = {name: (a, 100 * b) for name, (a, b) in trained(77, "shared_a").items()}
    assert codec.encode(loud).square().mean() > 100  # not rescaled
    codec.encode_many([loud, loud])
    assert torch.equal(codec.encode(adapters[0]), before)
    with_loud = AdapterCodec.fit(lambda: [*adapters, loud], SPEC, START, gauge="shared_a", width=5)
    assert not torch.equal(with_loud.encode(adapters[0]), before)  # control: fit would have noticed it


@pytest.mark.parametrize("width", [None, 4])
def test_a_site_that_never_moves_has_scale_one(width, tmp_path):
    adapters = [{**trained(s, "shared_a"), NAMES[1]: START[NAMES[1]]} for s in range(6)]
    codec = AdapterCodec.fit(lambda: adapters, SPEC, START, gauge="shared_a", width=width)
    assert codec.scale[1] == 1
    assert codec.energy_kept[1] == 1
    assert codec.encode(adapters[0]).isfinite().all()
    codec.save(tmp_path / "codec.safetensors")
    again = AdapterCodec.load(tmp_path / "codec.safetensors")
    assert_close(again.decode(codec.encode(adapters[0])), round_trip(codec, adapters[0]), rtol=0, atol=0)


@pytest.mark.parametrize("gauge", GAUGES)
def test_many_are_decoded_in_order_as_if_one_by_one(gauge):
    codec, adapters = fitted(gauge, width=5)
    tokens = codec.encode_many([adapters[i % 3] for i in range(TOGETHER + 2)])  # more than one product
    many = list(codec.decode_many(tokens))
    assert len(many) == TOGETHER + 2
    for row, made in zip(tokens, many, strict=True):
        for name, pair in codec.decode(row).items():
            assert_close(made[name], pair, rtol=0, atol=1e-5)
            assert all(factor.is_contiguous() for factor in made[name])


# --- differentiable decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("gauge", GAUGES)
def test_decode_factors_equals_decode(gauge, width):
    codec, adapters = fitted(gauge, width=width)
    tokens = codec.encode_many(adapters[:3])
    batch = codec.decode_factors(tokens)
    for i in range(3):
        single = codec.decode(tokens[i])
        # Same operations; a product over a batch may round otherwise than one over a single row.
        for name in NAMES:
            assert_close((batch[name][0][i], batch[name][1][i]), single[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("gauge", GAUGES)
def test_decode_gradient_equals_finite_differences(gauge, width):
    codec, adapters = fitted(gauge, width=width)
    tokens = codec.encode_many(adapters[:1]).double().requires_grad_()

    def weights(tokens):
        # B A, not A and B: in shared_a A is constant and has no gradient of its own.
        return torch.cat([(b @ a).flatten() for a, b in codec.decode_factors(tokens).values()])

    assert torch.autograd.gradcheck(weights, (tokens,), fast_mode=True)  # along random directions
    (gradient,) = torch.autograd.grad(weights(tokens).sum(), tokens)
    assert (gradient[:, ~codec.mask] == 0).all()
    assert (gradient[:, codec.mask] != 0).all()


def test_decode_factors_keeps_device_and_dtype_and_caches():
    codec, adapters = fitted("shared_a", width=5)
    tokens = codec.encode_many(adapters[:1])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = codec.decode_factors(tokens.to(dtype))[NAMES[0]]
        assert a.dtype == b.dtype == dtype
    rows = codec._at(torch.device("cpu"), torch.float64)
    codec.decode_factors(tokens.double())
    assert codec._at(torch.device("cpu"), torch.float64) is rows


def test_buffers_made_in_inference_mode_still_take_gradients():
    codec, adapters = fitted("shared_start", width=5)
    tokens = codec.encode_many(adapters[:1]).double()
    with torch.inference_mode():
        codec.decode_factors(tokens)
    tokens.requires_grad_()
    sum(b.sum() for _, b in codec.decode_factors(tokens).values()).backward()
    assert tokens.grad is not None


# --- the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_dtype", ["float32", "float16"])
@pytest.mark.parametrize("gauge", GAUGES)
def test_save_and_load_are_bit_exact(gauge, basis_dtype, tmp_path):
    codec, adapters = fitted(gauge, width=6, basis_dtype=basis_dtype)
    codec.save(tmp_path / "one.safetensors")
    again = AdapterCodec.load(tmp_path / "one.safetensors")
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert (again.spec, again.gauge, again.width) == (codec.spec, gauge, 6)
    tokens = codec.encode(adapters[0])
    assert torch.equal(again.encode(adapters[0]), tokens)
    assert_close(again.decode(tokens), codec.decode(tokens), rtol=0, atol=0)
    assert_close(again.energy_kept, codec.energy_kept, rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]  # no .partial


def test_float16_bases_are_smaller_and_still_invert(tmp_path):
    sizes = {}
    for basis_dtype in ("float32", "float16"):
        codec, adapters = fitted("shared_start", width=10, basis_dtype=basis_dtype)
        codec.save(tmp_path / basis_dtype)
        sizes[basis_dtype] = sum(
            v.nbytes for k, v in load_file(tmp_path / basis_dtype).items() if "basis" in k
        )
        tokens = codec.encode(adapters[0])
        assert_close(
            codec.encode(codec.decode(tokens)), tokens, rtol=0, atol=1e-5
        )  # not 1e-3, float16's rounding
    assert sizes["float16"] * 2 == sizes["float32"]


def test_equal_codecs_give_equal_bytes(tmp_path):
    saved, two_keys = set(), set()
    for _ in range(12):
        codec, _ = fitted("shared_start", width=6)
        codec.save(tmp_path / "codec")
        saved.add((tmp_path / "codec").read_bytes())
        save_file({"x": torch.zeros(1)}, tmp_path / "two", metadata={"width": "6", "gauge": "shared_start"})
        two_keys.add((tmp_path / "two").read_bytes())
    assert len(saved) == 1
    # Control, wrong with probability 2**-11: two metadata keys come in random order, also in one process.
    assert len(two_keys) == 2


def rewritten(path, about=None, drop=()):
    """The codec file with another header, or with tensors left out."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()[HEADER]
    table = {name: w for name, w in load_file(path).items() if name not in drop}
    save_file(table, path, metadata={HEADER: header if about is None else about(header)})


def test_broken_files_are_refused(tmp_path):
    codec, _ = fitted("shared_a", width=4)
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    rewritten(path)
    assert AdapterCodec.load(path).width == 4  # control: rewriting alone breaks nothing
    rewritten(path, lambda header: header.replace('"format_version": 1', '"format_version": 4'))
    with pytest.raises(ValueError, match=r"codec.safetensors: codec format version 4.*versions 1 to 3"):
        AdapterCodec.load(path)
    for name, message in (("scale", "'scale' is missing"), (f"{NAMES[0]}.basis", "q_proj.basis is missing")):
        codec.save(path)
        rewritten(path, drop=[name])
        with pytest.raises(ValueError, match=message):
            AdapterCodec.load(path)
    codec.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"codec.safetensors: not a readable safetensors file"):
        AdapterCodec.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a codec"):
        AdapterCodec.load(path)


# --- bad input --------------------------------------------------------------------------------------------


def test_adapters_that_do_not_fit_are_refused():
    codec, adapters = fitted("shared_start", width=4)
    good = adapters[0]
    a, b = good[NAMES[0]]
    with pytest.raises(BrokenAdapterError, match=r"missing.*layers.0.q_proj"):
        codec.encode({name: good[name] for name in NAMES[1:]})
    with pytest.raises(BrokenAdapterError, match=r"layers.9.q_proj"):
        codec.encode({**good, "layers.9.q_proj": (a, b)})
    with pytest.raises(BrokenAdapterError, match=r"layers.0.q_proj.*\(4, 12\).*\(2, 12\)"):
        codec.encode(with_site(good, NAMES[0], a=torch.zeros(4, 12), b=torch.zeros(10, 4)))
    for bad in (math.nan, math.inf):
        broken = b.clone()
        broken[3, 1] = bad
        with pytest.raises(BrokenAdapterError, match=r"run 7.*layers.0.q_proj.*NaN"):
            codec.encode(with_site(good, NAMES[0], b=broken), "run 7")
        with pytest.raises(BrokenAdapterError, match=r"adapter 2 of the stream.*NaN"):
            AdapterCodec.fit(
                lambda x=broken: [good, with_site(good, NAMES[0], b=x)],
                SPEC,
                START,
                gauge="shared_start",
                width=4,
            )
    assert codec.encode(good).shape == (3, 4)


def test_tokens_of_another_shape_are_refused():
    codec, adapters = fitted("shared_a", width=4)
    with pytest.raises(ValueError, match=r"\(site, width\) = \(3, 5\), this codec's have \(3, 4\)"):
        codec.decode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"= \(2, 4\)"):
        codec.decode_factors(torch.zeros(1, 2, 4))
    tokens = codec.encode(adapters[0])
    tokens[0, 0] = math.nan
    with pytest.raises(BrokenAdapterError, match="NaN"):
        codec.decode(tokens)
    assert codec.encode_many([]).shape == (0, 3, 4)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="width is 0"):
        fitted(width=0)
    with pytest.raises(ValueError, match=r"basis_dtype is 'int8'; known are float32, float16"):
        fitted(basis_dtype="int8")
    silent = replace(SPEC, sites=(replace(SPEC.sites[0], alpha=0.0, scaling=0.0), *SPEC.sites[1:]))
    with pytest.raises(ValueError, match=r"layers.0.q_proj: scaling is 0"):
        AdapterCodec.fit(lambda: [START], silent, None, gauge="canonical", width=4)


def test_the_benchmark_measures_its_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    store = TrajectoryStore(tmp_path / "store")
    for seed in range(6):
        task = Task(name=f"task {seed}", prompts=("Do it.",))
        run = store.start_run(SPEC, task, seed=0, start=START, planned_steps=1)
        run.write(1, trained(seed, "shared_start"))
        run.finish(1)
    codec_error = runpy.run_path(f"{BENCHMARKS}/codec_error.py")
    result = codec_error["measured"](tmp_path / "store", [3, 30], [], targets=1)
    assert result.title == "5 adapters of 3 sites, 0.00 M numbers, fitted; 1 of 1 other tasks held out"
    # A moves.
    assert [row[0] for row in result.rows] == [g for g in GAUGES if g != "shared_a" for _ in range(2)]
    error = {(row[0], row[1]): float(row[2]) for row in result.rows}
    assert error["shared_start", "3"] > error["shared_start", "30"] > 0.01  # five adapters span no sixth


# --- distances in ΔW --------------------------------------------------------------------------------------


def test_distances_equal_those_of_formed_matrices():
    left, right = [random_adapter(s) for s in range(3)], [random_adapter(s) for s in range(2, 7)]
    want = torch.stack([torch.stack([(dense(x) - dense(y)).norm() for y in right]) for x in left])
    assert_close(pairwise_delta_w_distances(SPEC, left, right), want, rtol=0, atol=1e-6)  # 1e-8 of norms ~ 50
    assert_close(delta_w_distance(SPEC, left[0], right[1]), float(want[0, 1]), rtol=1e-10, atol=0)
    relative = delta_w_distance(SPEC, left[0], right[1], relative=True)
    assert_close(relative, float(want[0, 1] / dense(right[1]).norm()), rtol=1e-10, atol=0)
    errors = delta_w_error(SPEC, left[0], right[1])
    for site in SPEC.sites:
        x, y = (delta_w(*(w.double() for w in z[site.name]), site.scaling) for z in (left[0], right[1]))
        assert_close(errors[site.name], float((x - y).norm() / y.norm()), rtol=1e-10, atol=0)


def test_distance_sees_through_the_gauge_and_small_differences():
    adapter = random_adapter(1)
    assert delta_w_distance(SPEC, adapter, adapter) == 0
    assert delta_w_distance(SPEC, turned(adapter, 5), adapter, relative=True) < 1e-7
    nudged = {name: (a.double(), b.double() * (1 + 1e-9)) for name, (a, b) in adapter.items()}
    assert delta_w_distance(SPEC, nudged, adapter, relative=True) == pytest.approx(1e-9, rel=1e-4)


def test_relative_error_of_a_zero_delta_w():
    zero = {name: (a, 0 * b) for name, (a, b) in START.items()}
    assert set(delta_w_error(SPEC, zero, zero).values()) == {0.0}
    assert set(delta_w_error(SPEC, START, zero).values()) == {math.inf}
    assert delta_w_distance(SPEC, START, zero, relative=True) == math.inf
    assert pairwise_delta_w_distances(SPEC, [], [zero]).shape == (0, 1)


def test_truncated_mean_is_the_best_of_its_rank():
    adapters = [random_adapter(s) for s in range(4)]
    mean = truncated_mean(adapters, SPEC)
    for site in SPEC.sites:
        full = torch.stack([delta_w(*x[site.name], site.scaling) for x in adapters]).double().mean(0)
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        best = u[:, : site.rank] * s[: site.rank] @ vh[: site.rank]
        assert_close(delta_w(*mean[site.name], site.scaling).double(), best, rtol=0, atol=1e-5)
        assert mean[site.name][0].shape == (site.rank, site.fan_in)
    naive = {n: tuple(sum(x[n][i] for x in adapters) / 4 for i in (0, 1)) for n in NAMES}
    assert (
        delta_w_distance(SPEC, naive, mean, relative=True) > 0.1
    )  # control: the mean of factors is another thing
    with pytest.raises(ValueError, match="at least one"):
        truncated_mean([], SPEC)


def test_truncated_mean_of_one_adapter_is_the_adapter():
    adapter = random_adapter(8)
    assert delta_w_distance(SPEC, truncated_mean(iter([adapter]), SPEC), adapter, relative=True) < FLOAT32
