"""Guidance chosen anew for a generator that is there: what training would choose, and nothing else."""

import importlib
from dataclasses import replace

import pytest
import torch
from scripts import script
from tiny_bench import collected, untrained_generator

from ltdi_peft.generator import load_generator
from ltdi_peft.guidance import Guidance, Tried, choose_alone_share, choose_guidance
from ltdi_peft.train import add_alone

guidance_room = importlib.import_module("ltdi_peft.guidance")


@pytest.fixture(scope="module")
def guide():
    return script("benchmarks/guide.py")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = collected(tmp_path_factory.mktemp("guide"))
    splits = {**bench.suite.splits, "validation": ("b/first/twice", "a/third/plain")}
    splits["unseen_tasks"] = tuple(name for name in splits["unseen_tasks"] if name != "a/third/plain")
    return replace(bench, suite=replace(bench.suite, splits=splits))


def test_both_purposes_are_guided_as_training_would(guide, bench, tmp_path):
    generator = untrained_generator(bench)
    add_alone(generator, {key: weight + 0.05 for key, weight in generator.denoiser.state_dict().items()})
    weights = {key: weight.clone() for key, weight in generator.state_dict().items()}
    names = [task.name for task in bench.suite.split("validation")]
    want = choose_guidance(generator, bench, names)
    found = guide.guided(generator, bench)
    assert torch.equal(found["prompt"].accuracy, want.accuracy)
    chosen = Guidance(generator.config.guidance_scale, generator.config.mean_share)
    assert chosen == want.best()
    twin = generator.purposed(prompt_in_context=False).config
    assert Guidance(twin.guidance_scale, twin.mean_share) == found["no_prompt"].best()
    assert all(torch.equal(weight, weights[key]) for key, weight in generator.state_dict().items())
    generator.save_pretrained(tmp_path / "guided")
    assert load_generator(tmp_path / "guided").config == generator.config


def two_networks(bench):
    """A generator whose two networks differ, and whose norms nothing holds back."""
    generator = untrained_generator(bench)
    add_alone(generator, {key: weight + 0.05 for key, weight in generator.denoiser.state_dict().items()})
    wide = {site: (low * 1e-3, high * 1e3) for site, (low, high) in generator.config.norm_range.items()}
    generator.config = replace(generator.config, norm_range=wide)
    return generator


def test_a_share_of_the_network_for_adapters_alone_is_in_those_beside_a_prompt(bench):
    generator, prompts, options = two_networks(bench), ["say a first", "say b twice"], {"base": bench.base}
    conditions = generator.encode_prompts(prompts, bench.base)
    beside = generator.tokens(conditions)
    alone = generator.purposed(prompt_in_context=False).tokens(conditions)
    assert not torch.equal(beside, alone)
    untouched = generator.generate(prompts, prompt_in_context=False, **options)
    generator.config = replace(generator.config, alone_share=0.25)
    found = generator.generate(prompts, **options)
    for tokens, one in zip(0.75 * beside + 0.25 * alone, found, strict=True):
        for site, pair in generator.codec.decode(tokens).items():
            torch.testing.assert_close(one.adapter[site], pair, rtol=1e-4, atol=1e-6)
    for old, new in zip(
        untouched, generator.generate(prompts, prompt_in_context=False, **options), strict=True
    ):
        assert all(torch.equal(old.adapter[site][1], b) for site, (_, b) in new.adapter.items())


@pytest.mark.parametrize(
    ("accuracy", "chosen"),
    [
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], 0.0),  # equal: none of it
        ([[0.2, 0.3, 0.4], [0.3, 0.4, 0.5], [0.2, 0.2, 0.2]], 0.25),  # ahead on every task
        ([[0.2, 0.5, 0.2], [0.5, 0.2, 0.3], [0.1, 0.1, 0.1]], 0.0),  # ahead, but not told
    ],
)
def test_the_share_is_the_least_that_is_not_told_from_the_best(guide, bench, monkeypatch, accuracy, chosen):
    generator = two_networks(bench)
    config, seen = generator.config, {}

    def scored(bench, tasks, made, count, examples):
        seen["adapters"] = made(tasks[0])
        return torch.tensor(accuracy, dtype=torch.float64)

    monkeypatch.setattr(guidance_room, "task_accuracies", scored)
    names = [task.name for task in bench.suite.split("validation")]
    share, tried = choose_alone_share(generator, bench, names)
    assert (share, list(tried)) == (chosen, ["0.0", "0.25", "0.5"])
    assert generator.config is config
    first = next(iter(generator.spec.sites)).name
    assert len({one[first][1].sum().item() for one in seen["adapters"]}) == 3
    text = guide.shared(generator, bench)
    assert generator.config.alone_share == chosen
    assert f"| {chosen} | {sum(accuracy[int(chosen * 4)]) / 3:.4f} | chosen |" in text


def test_one_task_chooses_nothing(bench):
    generator = two_networks(bench)
    assert choose_alone_share(generator, bench, ["b/first/twice"]) == (0.0, {})


def test_the_table_says_what_the_chosen_one_is_ahead_by(guide):
    accuracy = torch.tensor([[0.2, 0.4], [0.3, 0.6]], dtype=torch.float64)
    lines = guide.table(Tried((Guidance(1.0, 1.0), Guidance(1.5, 1.0)), accuracy)).splitlines()
    assert "| 1 | 1 | 0.3000 | +0.1500 ± 0.0500 |" in lines
    assert "| 1.5 | 1 | 0.4500 | chosen |" in lines


def test_nothing_is_overwritten(guide, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guide.py", "never/read.yaml", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists already; nothing is overwritten"):
        guide.main()
