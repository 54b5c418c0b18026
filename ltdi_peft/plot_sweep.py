"""Figures of what varies one number: sampling steps, training tasks, gradient steps.

In: a result with the section `sampling_steps`, `training_tasks` or `curve`.  Out: a `Figure`.
"""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltdi_peft.plot import (
    BLACK,
    BLUE,
    CONTEXTS,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    Result,
    canvas,
    counted,
    label_ends,
)
from ltdi_peft.plot_data import curve_band

GAIN = "recovered gain G on validation tasks"
ORIGINS = {
    "generated": ("generated adapter", BLUE),
    "start": ("LoRA for all tasks", ORANGE),
    "fresh": ("from scratch", GREEN),
}


# ---- sweeps on validation tasks


def sampling_figure(result: Result) -> Figure:
    """G against the number of sampling steps, a line a generator and sampler, a panel a context."""
    section = result["sampling_steps"]
    lines: dict[tuple[str, str], list[Result]] = {}
    for row in sorted(section["rows"], key=lambda row: row["steps"]):
        lines.setdefault((row["method"], row["sampler"]), []).append(row)
    about = {row["method"]: f"{row['method']}: k = {row['k']}, T = {row['T']}" for row in section["rows"]}
    note = (
        f"{sweep_sizes(section)}, {counted(section['seeds'], 'generator seed')}. "
        f"{'; '.join(about.values())}: a chain of T steps stops at k local targets and can be walked in "
        f"k … T steps.\nBars: 95 % intervals, tasks resampled; all points share their tasks, so their "
        f"differences are surer than the bars. Points of different samplers stand a little beside each other."
    )
    figure, panels = canvas(
        "How many sampling steps does a generated adapter need?",
        note,
        width=10.0,
        panels=[word for word, _, _ in CONTEXTS.values()],
        share_y=True,
    )
    panels[0].set_ylim(*limits([row for rows in lines.values() for row in rows]))
    for axes, key in zip(panels, CONTEXTS, strict=True):
        ends, end = {}, max(row["steps"] for row in section["rows"]) * 1.03 ** (len(lines) / 2)
        for place, ((method, sampler), rows) in enumerate(lines.items()):
            colour = PALETTE[place % len(PALETTE)]
            x = [row["steps"] * 1.03 ** (place - (len(lines) - 1) / 2) for row in rows]
            draw_gains(axes, x, rows, key, colour, f"{method}/{sampler}")
            ends[f"{method}, {sampler.replace('_', ' ')}"] = (end, rows[-1][f"G{key}"] or 0.0, colour)
        label_ends(axes, ends)
        axes.set(xlabel="sampling steps (log scale)")
        log_ticks(axes, sorted({row["steps"] for row in section["rows"]}))
    panels[0].set_ylabel(GAIN)
    return figure


def training_figure(result: Result) -> Figure:
    """G against the number of training tasks, in both contexts, between the start and the whole generator."""
    section = result["training_tasks"]
    rows = [row for row in section["rows"] if row["method"] == "linear"]
    (whole,) = (row for row in section["rows"] if row["method"] == "ours")
    saw, start = section["start_and_codec_saw"], section["start"]
    note = (
        f"{sweep_sizes(section)}. Only the linear map from prompt to adapter is fitted again, on random "
        f"subsets (small dots: single ones; line: their mean); bars: 95 % intervals, tasks resampled. Stars: "
        f"the whole generator, its network included.\nThe shared start, the codec and the guidance have seen "
        f"all {saw} training tasks at every point: fewer tasks in earnest are likely to do worse than this."
    )
    figure, (axes,) = canvas("What are more training tasks worth?", note, width=8.5)
    counts, ends = [row["training_tasks"] for row in rows], {}
    axes.set_ylim(*limits([*rows, whole, start]))
    for key, (word, colour, _) in CONTEXTS.items():
        draw_gains(axes, [float(count) for count in counts], rows, key, colour, word)
        for row in rows:
            single = [g for g in row[f"G{key}_subsets"] if g is not None]
            axes.plot(
                [row["training_tasks"]] * len(single), single, ".", color=colour, ms=3.5, label="_subsets"
            )
        axes.plot(
            saw, number(whole[f"G{key}"]), "*", color=colour, ms=12, mec=BLACK, mew=0.6, label=f"ours {word}"
        )
        axes.axhline(number(start[f"G{key}"]), color=colour, lw=1, ls=":", label=f"start {word}")
        end = float(max(*counts, saw))
        ends |= {
            f"linear map,\n{word}": (end, rows[-1][f"G{key}"] or 0.0, colour),
            f"shared start alone,\n{word}": (end, start[f"G{key}"] or 0.0, colour),
        }
    label_ends(axes, ends, lines=2)
    axes.set(xlabel="training tasks that the map is fitted on (log scale)", ylabel=GAIN)
    log_ticks(axes, sorted({*counts, saw}))
    return figure


def number(value: float | None) -> float:
    """NaN, which is not drawn, for no number."""
    return math.nan if value is None else value


def limits(rows: list[Result]) -> tuple[float, float]:
    """An axis that holds all gains and intervals, 0 among them."""
    found = [row[f"G{key}"] for key in CONTEXTS for row in rows]
    found += [end for key in CONTEXTS for row in rows for end in row[f"ci{key}"] or ()]
    known = [0.0, *(value for value in found if value is not None)]
    room = 0.05 * max(max(known) - min(known), 0.1)
    return min(known) - room, max(known) + room


def draw_gains(axes: Axes, x: list[float], rows: list[Result], key: str, colour: str, name: str) -> None:
    """A line of gains with the bars of their intervals."""
    for at, row in zip(x, rows, strict=True):
        if row[f"ci{key}"]:
            axes.plot([at] * 2, row[f"ci{key}"], color=colour, lw=1.3, alpha=0.45)
    axes.plot(x, [number(row[f"G{key}"]) for row in rows], "-o", color=colour, ms=4.5, label=name)


def log_ticks(axes: Axes, values: list[int]) -> None:
    """A logarithmic axis with exactly these numbers on it."""
    axes.set_xscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def sweep_sizes(section: Result) -> str:
    """How much a sweep was scored on."""
    return f"{counted(section['tasks'], 'validation task')}, {section['examples']} examples each"


# ---- gradient steps


def curve_figure(result: Result) -> Figure:
    """Mean accuracy against gradient steps from each origin, with the mark of 95 % of the oracle's gain."""
    section = result["curve"]
    note = (
        f"{counted(len(section['generated']['per_task']), 'unseen task')}; a constant learning rate, chosen "
        f"for each origin on validation tasks. Bands: 95 % intervals of the mean, tasks resampled.\n"
        f"Ring, with the task prompt: the first step with 95 % of the gain of the task's own LoRA; a line "
        f"without a ring does not get there."
    )
    figure, panels = canvas(
        "How many gradient steps does a new task still need, from each origin?",
        note,
        width=10.0,
        panels=[word for word, _, _ in CONTEXTS.values()],
        share_y=True,
    )
    for axes, key in zip(panels, ("accuracy", "accuracy_no_prompt"), strict=True):
        curve_panel(axes, section, key)
    panels[0].set_ylabel("mean accuracy on unseen tasks")
    return figure


def curve_panel(axes: Axes, section: Result, key: str) -> None:
    """One context: a curve an origin, between base model and oracle."""
    points, ends = section["points"], {}
    axes.set_ylim(-0.03, 1.03)
    for origin, (name, colour) in ORIGINS.items():
        row = section[origin]
        low, high = zip(*curve_band(row, key), strict=True)
        axes.fill_between(points, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(points, row[key], "-o", color=colour, ms=3.5, label=name)
        ends[name] = (float(points[-1]), row[key][-1], colour)
        if key == "accuracy" and row["steps_to_95"] is not None:
            reached = row[key][points.index(row["steps_to_95"])]
            axes.plot(row["steps_to_95"], reached, "o", ms=11, mfc="none", mec=colour, label=f"95 % {name}")
    for name, found in (("base model", section["base"]), ("task's own LoRA", section["oracle"])):
        axes.axhline(found[key], color=GREY, lw=1, ls="--", zorder=0, label=name)
        ends[name] = (float(points[-1]), found[key], GREY)
    label_ends(axes, ends)
    axes.set(xlabel="gradient steps (0, then log scale)")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(-0.2, 1.1 * points[-1])
    # Powers of two, and the last point if it is none.
    shown = [p for p in points if p & (p - 1) == 0 and (p == points[-1] or 1.6 * p <= points[-1])]
    shown = sorted({*shown, points[-1]})
    axes.set_xticks(shown, [str(point) for point in shown])
    axes.minorticks_off()
