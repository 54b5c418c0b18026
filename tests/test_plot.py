"""Figures hold the numbers of their JSON or store, and nothing is drawn of what is not there."""

import ast
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import ROOT

from ltdi_peft import plot_data
from ltdi_peft.baselines import final_adapter
from ltdi_peft.cli import main
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.figures import write_figures, write_store_figures
from ltdi_peft.generator import load_generator
from ltdi_peft.plot import apart, canvas, label_ends, picture, save_figures
from ltdi_peft.plot_result import FIGURES, methods_figure, result_figures, tasks_figure
from ltdi_peft.plot_store import losses_figure, map_figure, similarity_figure, store_figures
from ltdi_peft.plot_sweep import curve_figure, sampling_figure, training_figure
from ltdi_peft.store import TrajectoryStore

SUFFIXES = ("", "_no_prompt")


@pytest.fixture(scope="module")
def demo():
    return json.loads((ROOT / "docs/results/demo.json").read_text())


def gains(g, low, high, **more):
    return {"G": g, "ci": [low, high], "G_no_prompt": g / 2, "ci_no_prompt": None, **more}


SAMPLING = {
    "tasks": 8,
    "examples": 32,
    "seeds": 1,
    "rows": [
        gains(g, g - 0.1, g + 0.1, method="ours", sampler=sampler, steps=steps, k=3, T=20)
        for sampler, values in (("mean_only", {3: 0.5, 20: 0.6}), ("ddim", {3: 0.4, 20: 0.7}))
        for steps, g in values.items()
    ],
}
TRAINING = {
    "tasks": 8,
    "examples": 32,
    "start_and_codec_saw": 60,
    "start": gains(0.3, 0.2, 0.4),
    "rows": [
        gains(
            g,
            g - 0.1,
            g + 0.1,
            method="linear",
            training_tasks=n,
            G_subsets=single,
            G_no_prompt_subsets=[0.1],
        )
        for n, g, single in ((20, 0.4, [0.35, 0.45]), (60, 0.5, [0.5]))
    ]
    + [gains(0.55, 0.5, 0.6, method="ours", training_tasks=60)],
}


def climbing(*values, steps_to_95):
    """A curve of two tasks, 0.1 above and below its mean."""
    tasks = {"x": [v + 0.1 for v in values], "y": [v - 0.1 for v in values]}
    both = {name: {"accuracy": own, "accuracy_no_prompt": own} for name, own in tasks.items()}
    mean = {"accuracy": list(values), "accuracy_no_prompt": list(values)}
    return {**mean, "per_task": both, "steps_to_95": steps_to_95}


CURVE = {
    "points": [0, 1, 2, 3],
    "base": {"accuracy": 0.1, "accuracy_no_prompt": 0.0},
    "oracle": {"accuracy": 0.8, "accuracy_no_prompt": 0.7},
    "generated": climbing(0.5, 0.6, 0.8, 0.8, steps_to_95=2),
    "start": climbing(0.4, 0.5, 0.6, 0.8, steps_to_95=3),
    "fresh": climbing(0.1, 0.2, 0.3, 0.4, steps_to_95=None),
}


def line(axes, label):
    """x and y of the one line with this label."""
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return [float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]


def segments(axes):
    """The ends of every unlabelled line of two points: the bars of intervals."""
    own = [one for one in axes.lines if one.get_label().startswith("_child")]
    return [np.column_stack([one.get_xdata(), one.get_ydata()]).astype(float).tolist() for one in own]


def note(figure):
    return " ".join(figure.get_supxlabel().split())


# ---- results


def test_methods_are_the_result(demo):
    figure = methods_figure(demo)
    tasks, domains = figure.axes
    order = [label.get_text().partition("(")[2].rstrip(")") for label in tasks.get_yticklabels()]
    assert set(order) == set(demo["methods"]) - {"base", "oracle"}
    for axes, split in ((tasks, "unseen_tasks"), (domains, "unseen_domains")):
        rows = [demo["methods"][name][split] for name in order]
        bars = [[end for end, _ in one] for one in segments(axes)]
        for suffix, word in zip(SUFFIXES, ("task prompt in context", "without the task prompt"), strict=True):
            x, y = line(axes, word)
            assert x == [row[f"G{suffix}"] for row in rows]
            assert [round(value) for value in y] == list(range(len(order)))
            wanted = [row[f"ci{suffix}"] for row in rows if row[f"ci{suffix}"]]
            assert all(ends in bars for ends in wanted)
    assert len(segments(domains)) == 2  # the reference lines at 0 and 1: one domain has no interval
    gains_ = [demo["methods"][name]["unseen_tasks"]["G"] for name in order]
    assert gains_ == sorted(gains_)
    assert "24 unseen tasks" in tasks.get_title(loc="left")
    assert "32 examples a task" in note(figure)


def test_tasks_are_the_result(demo):
    figure = tasks_figure(demo)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    by_short = {one["task"].partition("/")[2]: one for one in demo["per_task"].values()}
    # group/… is in the unseen domain; nothing else shares a name in the demo but domains tell them apart
    assert len(names) == 26
    for axes, context in zip(figure.axes, ("prompt", "no_prompt"), strict=True):
        for method in ("ours", "oracle", "multi_task_lora"):
            x, y = line(axes, method)
            assert y == list(range(26))
            drawn = sorted(round(value, 6) for value in x)
            values = [one["accuracy"][context] for one in demo["per_task"].values()]
            assert drawn == sorted(round(one[method][0] - one["base"][0], 6) for one in values)
        shown = dict(zip(names, line(axes, "ours")[0], strict=True))
        accuracy = by_short["group/not"]["accuracy"][context]
        assert shown["group/not"] == accuracy["ours"][0] - accuracy["base"][0]
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"verbs", "nouns", "cities", "animals", "things\n(unseen)", "task's own LoRA"} <= set(words)
    assert "26 tasks" in note(figure)


def test_sampling_steps_are_the_section():
    figure = sampling_figure({"sampling_steps": SAMPLING})
    for axes, factor in zip(figure.axes, (1.0, 0.5), strict=True):
        x, y = line(axes, "ours/mean_only")
        assert y == [0.5 * factor, 0.6 * factor]
        assert x == pytest.approx([3, 20], rel=0.03)
        assert line(axes, "ours/ddim")[1] == [0.4 * factor, 0.7 * factor]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3", "20"]
    bars = [[y for _, y in one] for one in segments(figure.axes[0])]
    assert sorted(bars) == sorted(row["ci"] for row in SAMPLING["rows"])
    assert not segments(figure.axes[1])  # no interval, no bar
    assert "k = 3, T = 20" in note(figure)


def test_training_tasks_are_the_section_and_say_what_the_start_saw():
    figure = training_figure({"training_tasks": TRAINING})
    (axes,) = figure.axes
    assert line(axes, "task prompt in context") == ([20, 60], [0.4, 0.5])
    assert line(axes, "without the task prompt") == ([20, 60], [0.2, 0.25])
    assert line(axes, "ours task prompt in context") == ([60], [0.55])
    assert line(axes, "start task prompt in context")[1] == [0.3, 0.3]
    dots = [one.get_ydata() for one in axes.lines if one.get_label() == "_subsets"]
    assert [0.35, 0.45] in [list(one) for one in dots]
    assert "have seen all 60 training tasks at every point" in note(figure)


def test_the_curve_is_the_section():
    figure = curve_figure({"curve": CURVE})
    with_prompt, without = figure.axes
    words = {"generated": "generated adapter", "start": "LoRA for all tasks", "fresh": "from scratch"}
    for origin, word in words.items():
        assert line(with_prompt, word) == ([0, 1, 2, 3], CURVE[origin]["accuracy"])
        assert line(without, word)[1] == CURVE[origin]["accuracy_no_prompt"]
    assert line(with_prompt, "95 % generated adapter") == ([2], [0.8])
    labels = [one.get_label() for one in with_prompt.lines]
    assert "95 % from scratch" not in labels  # it does not get there
    assert line(with_prompt, "task's own LoRA")[1] == [0.8, 0.8]
    band = with_prompt.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() >= 0.4 - 1e-6  # between the two tasks
    assert band[:, 1].max() <= 0.9 + 1e-6
    assert "2 unseen tasks" in note(figure)


def test_missing_sections_give_no_figure(demo):
    assert set(result_figures(demo)) == {"methods", "tasks"}
    assert result_figures({}) == {}
    everything = {"sampling_steps": SAMPLING, "training_tasks": TRAINING, "curve": CURVE}
    assert set(result_figures(demo | everything)) == set(FIGURES)
    deaf = json.loads(json.dumps(demo["per_task"]))
    for one in deaf.values():
        for values in one["accuracy"].values():
            del values["ours"]
    assert result_figures({"per_task": deaf}) == {}


def test_colours_of_labels_and_every_figure_is_named(demo):
    everything = {"sampling_steps": SAMPLING, "training_tasks": TRAINING, "curve": CURVE}
    for figure in result_figures(demo | everything).values():
        assert len(figure.get_suptitle()) > 20
        assert note(figure)
        assert all(axes.get_xlabel() for axes in figure.axes)
        assert not any(axes.get_legend() for axes in figure.axes)


# ---- files


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_equal_data_give_equal_bytes(demo, tmp_path, suffix, begins):
    drawn = [save_figures({"m": methods_figure(demo)}, tmp_path / name, suffix) for name in ("a", "b")]
    assert drawn[0] == drawn[1] == {f"m{suffix}": methods_figure(demo).get_suptitle()}
    one, two = ((tmp_path / name / f"m{suffix}").read_bytes() for name in ("a", "b"))
    assert one == two
    assert one.startswith(begins)
    other = json.loads(json.dumps(demo))
    other["methods"]["ours"]["unseen_tasks"]["G"] = 0.1
    assert picture(methods_figure(other), suffix[1:]) != one
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"m{suffix}"]


def test_nothing_to_draw_makes_no_folder(tmp_path):
    assert save_figures({}, tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ltdi_peft.plot")]:
        if name != "ltdi_peft.plot_data":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_an_evaluation_goes_on(no_matplotlib, demo, tmp_path):
    with pytest.warns(UserWarning, match=r"no figures were written: .*pip install 'ltdi_peft\[plot\]'"):
        assert write_figures(demo, tmp_path / "demo") == {}
    assert not (tmp_path / "demo").exists()


def test_without_matplotlib_inspect_says_what_to_install(no_matplotlib, world, tmp_path, capsys):
    assert main(["inspect", str(world.recipe.store_folder), "--plot", str(tmp_path / "p")]) == 2
    assert "figures need matplotlib: pip install 'ltdi_peft[plot]' (" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"pip install 'ltdi_peft\[plot\]'"):
        write_store_figures(world.recipe.store_folder, tmp_path / "p")


def test_the_core_imports_no_matplotlib():
    rooms = {"plot", "plot_result", "plot_store", "plot_sweep"}
    loads = {}
    for path in (ROOT / "ltdi_peft").rglob("*.py"):
        top = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom | ast.Try)
        ]
        loads[path.stem] = " ".join(ast.unparse(node) for node in top)
    drawing = r"from matplotlib|import matplotlib|from ltdi_peft\.plot(_(?!data)\w+)? "
    assert {room for room, text in loads.items() if re.search(drawing, text)} == rooms


def test_labels_keep_apart():
    assert apart([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert apart([0.9, 0.0, 0.5], 0.2) == [0.9, 0.0, 0.5]  # in the order given, untouched where there is room
    moved = sorted(apart([0.1, 0.11, 0.12, 0.5], 0.1))
    assert all(b - a >= 0.1 - 1e-6 for a, b in pairwise(moved))
    _, (axes,) = canvas("t", "n")
    axes.set(yscale="log", ylim=(1e-3, 1))
    label_ends(axes, {"a": (1.0, 0.1, "k"), "b": (1.0, 0.1, "k")})
    low, high = sorted(text.xy[1] for text in axes.texts)
    assert low < 0.1 < high
    assert low * high == pytest.approx(0.01)


# ---- numbers that no file holds


def test_the_plane_is_that_of_principal_components():
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(12, 5, generator=rng, dtype=torch.float64) * torch.tensor([5.0, 3.0, 0.5, 0.2, 0.1])
    squares = torch.cdist(points, points).square()
    plane = plot_data.fit_plane(squares)
    centre = points.mean(0)
    _, values, axes = torch.linalg.svd(points - centre)
    torch.testing.assert_close(plane(squares).abs(), ((points - centre) @ axes[:2].mT).abs())
    other = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    found = plane(torch.cdist(other, points).square())
    torch.testing.assert_close(found.abs(), ((other - centre) @ axes[:2].mT).abs())
    assert plane.share[0] == pytest.approx(float(values[0] ** 2 / (values**2).sum()))
    with pytest.raises(ValueError, match="of 4 runs do not span a plane"):
        plot_data.fit_plane(torch.cdist(points[:4, :1], points[:4, :1]).square())


def test_intervals_by_hand():
    assert plot_data.wilson(0.0, 32) == pytest.approx((0.0, 1.96**2 / (32 + 1.96**2)))
    assert plot_data.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert plot_data.curve_band({"per_task": {"x": {"a": [0.1, 0.2]}}}, "a") == [(0.1, 0.1), (0.2, 0.2)]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50))
    weights = torch.stack([torch.ones(50), torch.arange(50) < 20]).double()
    found = plot_data.weighted_correlation(torch.tensor(x), torch.tensor(y), weights)
    assert found.tolist() == pytest.approx([np.corrcoef(x, y)[0, 1], np.corrcoef(x[:20], y[:20])[0, 1]])
    assert np.isnan(plot_data.middle(torch.tensor([torch.nan]))).all()


def test_what_is_picked():
    assert plot_data.spread_out(range(10), 5) == [0, 2, 4, 6, 8]
    assert plot_data.spread_out(range(4), 5) == [0, 1, 2, 3]
    places = torch.tensor([[0.0, 0.0], [9.0, 0.0], [8.0, 1.0], [-5.0, 0.0]])
    assert plot_data.far_apart(places, 3) == [1, 3, 0]
    assert sorted(plot_data.far_apart(places, 9)) == [0, 1, 2, 3]


# ---- stores


@pytest.fixture(scope="module")
def runs(world):
    return TrajectoryStore(world.recipe.store_folder).trajectories()


@pytest.fixture(scope="module")
def encoder(world):
    from ltdi_peft.collect import open_bench

    return PromptEncoder("base", base=open_bench(world.recipe).base)


def delta_w(run, adapter):
    """ΔW of all sites as one vector."""
    parts = [site.scaling * (adapter[site.name][1] @ adapter[site.name][0]) for site in run.spec.sites]
    return torch.cat([part.flatten() for part in parts]).double()


def test_trajectories_lie_where_principal_components_put_them(runs):
    found = plot_data.map_runs(runs, k=3)
    finals = torch.stack([delta_w(run, final_adapter(run)) for run in runs])
    _, _, axes = torch.linalg.svd(finals - finals.mean(0), full_matrices=False)
    wanted = (finals - finals.mean(0)) @ axes[:2].mT
    torch.testing.assert_close(found.finals.abs(), wanted.abs(), rtol=1e-3, atol=1e-5)
    start = ((delta_w(runs[0], runs[0].start()) - finals.mean(0)) @ axes[:2].mT).abs()
    torch.testing.assert_close(found.start.abs(), start, rtol=1e-3, atol=1e-5)
    assert (found.runs, found.steps, len(found.recorded)) == (10, 6, 5)
    for track in found.recorded:
        assert len(track.points) == 1 + len(runs[0].snapshots)
        torch.testing.assert_close(track.points[0], found.start)
        assert len(track.marks) == 3
    figure = map_figure(found)
    (axes,) = figure.axes
    x, y = line(axes, "final adapters")
    assert [x, y] == found.finals.mT.tolist()
    assert line(axes, "start") == tuple([value] for value in found.start.tolist())
    names = [one.get_label() for one in axes.lines]
    assert all(track.task in names for track in found.recorded)
    assert "10 of 10 runs" in note(figure)
    assert "6 optimiser steps; rings: local targets" in note(figure)


def test_chains_run_from_noise_to_what_is_generated(world, runs, encoder):
    generator = load_generator(world.recipe.generator_folder)
    prompt = "please a second twice"
    conditions = encoder([prompt])
    way = plot_data.chain_adapters(generator, conditions)
    assert len(way) == generator.chain.T + 1
    with torch.no_grad():
        wanted = generator.codec.decode(generator.tokens(conditions)[0])
    for site, (_, b) in way[-1].items():
        torch.testing.assert_close(b, wanted[site][1])
    oracle = next(
        run
        for run in TrajectoryStore(world.recipe.held_out_folder).trajectories()
        if run.task.name == "a/second/twice"
    )
    ends = tuple(generator.chain.ends.tolist())
    found = plot_data.map_runs(runs, 3, {"a/second/twice": way}, [oracle], ends)
    figure = map_figure(found)
    _, axes, distances = figure.axes
    x, y = line(axes, "a/second/twice")
    assert [x, y] == found.generated[0].points.mT.tolist()
    assert found.generated[0].marks[-1] == generator.chain.T
    star = [value for (value,) in line(axes, "own run of a/second/twice")]
    assert star == found.oracles["a/second/twice"].tolist()
    own = delta_w(oracle, final_adapter(oracle))
    wanted = [float((delta_w(oracle, one) - own).norm()) for one in (*way, runs[0].start())]
    assert line(distances, "a/second/twice")[1] == pytest.approx(wanted[:-1], rel=1e-4)
    assert line(distances, "start of a/second/twice")[1] == pytest.approx([wanted[-1]] * 2, rel=1e-4)


def test_losses_are_those_of_the_snapshots(runs):
    found = plot_data.losses(runs)
    assert set(found) == {run.run_id for run in runs}
    domain, steps, values = found[runs[0].run_id]
    assert (domain, steps) == (runs[0].task.domain, [s.step for s in runs[0].snapshots])
    assert values == [s.loss for s in runs[0].snapshots]
    (axes,) = losses_figure(found).axes
    single = [list(one.get_ydata()) for one in axes.lines if one.get_label() == "_run"]
    assert single == [values for _, _, values in found.values()]
    medians = [np.median([values[i] for _, _, values in found.values()]) for i in range(len(steps))]
    assert line(axes, "median") == (steps, pytest.approx(medians))
    own = [values for d, _, values in found.values() if d == "a"]
    assert line(axes, "a")[1] == pytest.approx(np.median(own, axis=0))


def test_runs_without_losses_have_no_loss_figure(runs):
    from dataclasses import replace

    silent = [replace(r, snapshots=tuple(replace(s, loss=None) for s in r.snapshots)) for r in runs]
    assert plot_data.losses(silent) == {}
    assert set(store_figures(silent)) == {"trajectories"}
    assert set(store_figures(runs[:2])) == {"losses"}


def test_similarity_by_brute_force(runs, encoder):
    found = plot_data.similarity(runs, encoder, draws=100)
    first = [run for run in runs if run.seed == 0]
    assert (found.tasks, len(found.adapters)) == (5, 10)
    changes = torch.stack([delta_w(run, final_adapter(run)) for run in first])
    cosines = torch.nn.functional.normalize(changes - changes.mean(0), dim=1)
    prompts = torch.stack([encoder(run.task.prompts).mean(0) for run in first]).double()
    prompts = torch.nn.functional.normalize(prompts, dim=1)
    i, j = torch.triu_indices(5, 5, offset=1)
    torch.testing.assert_close(found.adapters, (cosines @ cosines.mT)[i, j], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.conditions, (prompts @ prompts.mT)[i, j])
    assert found.same_domain.sum() == 3 + 1  # three tasks of a, two of b
    value, low, high = found.correlation
    assert value == pytest.approx(np.corrcoef(found.conditions, found.adapters)[0, 1])
    assert low <= value <= high
    figure = similarity_figure(found)
    (axes,) = figure.axes
    for same, word in ((True, "tasks of one domain"), (False, "tasks of different domains")):
        part = found.same_domain == same
        assert line(axes, word) == (found.conditions[part].tolist(), found.adapters[part].tolist())
    assert line(axes, "mean of a group of pairs")[1] == found.bins[:, 1].tolist()
    assert "5 tasks, 10 pairs" in note(figure)


def test_inspect_draws_a_store(world, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ltdi_peft.figures.PromptEncoder", lambda name: encoder)
    folder = tmp_path / "figures"
    assert main(["inspect", str(world.recipe.store_folder), "--plot", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[11] == "10 rows"
    assert [line.partition(": ")[0] for line in lines[12:]] == [
        str(folder / f"{name}.png") for name in ("losses", "trajectories", "similarity")
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        "losses.png",
        "similarity.png",
        "trajectories.png",
    ]


def test_an_encoder_that_cannot_be_had_costs_one_figure(world, tmp_path, monkeypatch):
    def nowhere(name):
        raise OSError("not on the Hub")

    monkeypatch.setattr("ltdi_peft.figures.PromptEncoder", nowhere)
    with pytest.raises(OSError, match="not on the Hub"):
        write_store_figures(world.recipe.store_folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "trajectories.png"]


def test_an_empty_store_is_refused(tmp_path):
    TrajectoryStore(tmp_path / "store")
    with pytest.raises(ValueError, match="holds no finished run, so there is nothing to draw"):
        write_store_figures(tmp_path / "store", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_the_committed_figures_are_small():
    figures = sorted(Path(ROOT / "docs/results").rglob("*.png"))
    assert len(figures) >= 8
    assert [path.name for path in figures if path.stat().st_size > 150_000] == []
