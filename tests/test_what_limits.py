"""What limits generated adapters: the same tables from collected runs and from encoded ones."""

from dataclasses import replace

import pytest
from scripts import script
from tiny_bench import link_runs

from ltdi_peft.collect import open_bench
from ltdi_peft.encoding import encode_store


def rows_of(printed):
    """Both tables, a dict from the first cells of a row to its numbers."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    numbers = [(row, [one for one in row if one.replace(".", "", 1).isdigit()]) for row in cells]
    return {tuple(row[: -len(found)]): [float(one) for one in found] for row, found in numbers if found}


def test_encoded_runs_give_the_tables_of_collected_ones(world, tmp_path, capsys):
    what_limits = script("benchmarks/what_limits.py")
    recipe, file = world.changed(link_runs(world.recipe, tmp_path / "run")), tmp_path / "runs.safetensors"
    bench = open_bench(recipe)
    what_limits.tables(bench, ["base"], 6)
    want = rows_of(capsys.readouterr().out)
    encode_store(recipe, file, width=recipe.codec.width, dtype="float32", progress=False)
    encoded = replace(recipe, train=replace(recipe.train, encoded=str(file)))
    what_limits.tables(replace(bench, recipe=encoded), ["base"], 6)
    got = rows_of(capsys.readouterr().out)
    assert ("`base`", "held out") in got
    assert ("ridge, `base`, held out wording",) in got
    assert set(want) - set(got) == {("true",)}  # as it was before the codec: only a store has that
    for name, numbers in got.items():
        assert numbers == pytest.approx(want[name], abs=0.011), name
