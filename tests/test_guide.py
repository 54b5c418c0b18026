"""Guidance chosen anew for a generator that is there: what training would choose, and nothing else."""

from dataclasses import replace

import pytest
import torch
from scripts import script
from tiny_bench import collected, untrained_generator

from ltdi_peft.generator import load_generator
from ltdi_peft.guidance import Guidance, Tried, choose_guidance
from ltdi_peft.train import add_alone


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


def test_the_table_says_what_the_chosen_one_is_ahead_by(guide):
    accuracy = torch.tensor([[0.2, 0.4], [0.3, 0.6]], dtype=torch.float64)
    lines = guide.table(Tried((Guidance(1.0, 1.0), Guidance(1.5, 1.0)), accuracy)).splitlines()
    assert "| 1 | 1 | 0.3000 | +0.1500 ± 0.0500 |" in lines
    assert "| 1.5 | 1 | 0.4500 | chosen |" in lines


def test_nothing_is_overwritten(guide, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guide.py", "never/read.yaml", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists already; nothing is overwritten"):
        guide.main()
