"""A classifier that is taught to read inputs: what it then reads right, and what it refuses."""

import sys

import pytest
from scripts import script
from tiny_bench import collected, conditioned_bench

from ltdi_peft.config import ConditionConfig
from ltdi_peft.train import recipe_encoder, train_generator


@pytest.fixture(scope="module")
def room():
    return script("benchmarks/read_inputs.py")


def test_prompts_read_right_are_counted(room, tmp_path):
    bench = conditioned_bench(
        collected(tmp_path / "runs"), tmp_path / "run", ConditionConfig("base", attributes=True)
    )
    train_generator(bench.recipe, bench=bench, progress=False)
    encoder, tasks = recipe_encoder(bench), list(bench.suite.split("train"))
    for count in (0, 2):
        found = room.read_right(encoder, tasks, count)
        right = {"question": [], "form": []}
        for task in tasks:
            shown = [[example.input for example in task.train[:count]]] * len(task.held_out_prompts)
            told = encoder(task.held_out_prompts, inputs=shown if count else ())
            for row in told:
                reading = encoder.attributes.reading(row)
                for name in right:
                    right[name].append(reading[name] == dict(task.attributes)[name])
        assert found == {name: pytest.approx(sum(hits) / len(hits)) for name, hits in right.items()}
    assert 0 < found["form"] <= 1


def test_nothing_is_overwritten(room, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["read_inputs.py", "never/read.yaml", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists already; nothing is overwritten"):
        room.main()
