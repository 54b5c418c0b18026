"""Figures of recorded runs and of the chains that were trained on them.

In: what `plot_data` makes of a store.  Out: `Figure`s.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltdi_peft.plot import BLACK, BLUE, GREY, ORANGE, PALE, PALETTE, canvas, counted, label_ends, xy
from ltdi_peft.plot_data import LEAST, AdapterMap, Losses, Similarity, Track, losses, map_runs
from ltdi_peft.store import Trajectory


def store_figures(runs: Sequence[Trajectory]) -> dict[str, Figure]:
    """What runs of one adapter have the data for, prompts apart."""
    figures = {}
    if known := losses(runs):
        figures["losses"] = losses_figure(known)
    if len(runs) >= LEAST:
        figures["trajectories"] = map_figure(map_runs(runs))
    return figures


# ---- trajectories and chains


def map_figure(found: AdapterMap) -> Figure:
    """Recorded trajectories in the plane of the final adapters and, where there are chains, these beside."""
    first, second = (f"{100 * share:.0f} %" for share in found.plane.share)
    targets = "; rings: local targets" if any(track.marks for track in found.recorded) else ""
    note = (
        f"Seen along the two directions in which the final adapters of {len(found.finals)} of {found.runs} "
        f"runs differ most (Frobenius norm of ΔW): {first} and {second} of their variance, what lies in "
        f"other directions is not seen. Grey dots: final adapters. Recorded lines: runs that end far "
        f"apart, with a dot at each recorded snapshot of {found.steps} optimiser steps{targets}."
    )
    panels = ["recorded fine-tunes of training tasks"]
    title = "Where fine-tuning takes adapters from their shared start"
    if found.generated:
        panels += ["chains for unseen tasks; ★ a task's own fine-tune", "distance to it, in all directions"]
        title = "Do generated chains end where a task's own fine-tuning ends?"
        note += (
            " Chains: what each step from noise is decoded to, on the linear prediction that the chain is "
            "centred on; rings: ends of its local chains."
        )
    figure, axes = canvas(title, note, width=14.0 if found.generated else 7.5, height=5.6, panels=panels)
    recorded_panel(axes[0], found)
    if found.generated:
        generated_panel(axes[1], found)
        distance_panel(axes[2], found)
    for one in axes[:2]:
        one.margins(0.28, 0.08)  # room for the names
        one.set_aspect("equal", adjustable="datalim")
        one.set(xlabel="ΔW along the 1st direction", ylabel="ΔW along the 2nd direction")
    return figure


def recorded_panel(axes: Axes, found: AdapterMap) -> None:
    """Final adapters of all runs, whole trajectories of a few, the start."""
    axes.plot(*xy(found.finals), "o", color=PALE, ms=3, label="final adapters")
    for track, colour in zip(found.recorded, PALETTE, strict=False):
        x, y = xy(track.points)
        axes.plot(x, y, "-o", color=colour, ms=3, lw=1.3, label=track.task)
        axes.plot([x[i] for i in track.marks], [y[i] for i in track.marks], "o", ms=9, mfc="none", mec=colour)
        name_end(axes, track, colour, found.start.tolist())
    name_start(axes, found)


def generated_panel(axes: Axes, found: AdapterMap) -> None:
    """Chains from noise, and the unseen tasks' own runs as stars."""
    axes.plot(*xy(found.finals), "o", color=PALE, ms=3, label="final adapters")
    for track, colour in zip(found.generated, PALETTE, strict=False):
        x, y = xy(track.points)
        axes.plot(x, y, "-o", color=colour, ms=2.2, lw=1.1, alpha=0.9, label=track.task)
        axes.plot([x[i] for i in track.marks], [y[i] for i in track.marks], "o", ms=8, mfc="none", mec=colour)
        own = found.oracles[track.task].tolist()
        axes.plot([x[-1], own[0]], [y[-1], own[1]], ":", color=colour, lw=1, label="_gap")
        axes.plot(
            *own, "*", color=colour, ms=15, mec=BLACK, mew=0.7, zorder=5, label=f"own run of {track.task}"
        )
        name_end(axes, track, colour, found.start.tolist())
        axes.annotate(
            "noise", (x[0], y[0]), xytext=(3, -9), textcoords="offset points", color=colour, fontsize=7
        )
    name_start(axes, found)


def distance_panel(axes: Axes, found: AdapterMap) -> None:
    """How far each chain is from the task's own run at every time, and the shared start from it."""
    ends, starts, last = {}, [], 0.0
    axes.set_ylim(0, 1.05 * max(float(one.max()) for one in found.distances.values()))
    for (task, values), colour in zip(found.distances.items(), PALETTE, strict=False):
        *way, start = values.tolist()
        axes.plot(range(len(way)), way, "-o", color=colour, ms=2.5, label=task)
        axes.axhline(start, color=colour, lw=1, ls=":", label=f"start of {task}")
        last = len(way) - 1.0
        ends[task] = (last, way[-1], colour)
        starts.append(start)
    ends["shared start (dotted)"] = (last, sum(starts) / len(starts), BLACK)
    label_ends(axes, ends)
    axes.set(xlabel="chain time (0 = noise)", ylabel="‖ΔW − ΔW of the task's own fine-tune‖")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_end(axes: Axes, track: Track, colour: str, start: list[float]) -> None:
    """The task's name at the end of its line, on the side away from the start."""
    x, y = track.points[-1].tolist()
    steep, right, up = abs(y - start[1]) > abs(x - start[0]), x >= start[0], y >= start[1]
    axes.annotate(
        track.task,
        (x, y),
        xytext=(0 if steep else 6 if right else -6, 7 if up else -7),
        textcoords="offset points",
        ha="center" if steep else "left" if right else "right",
        va="bottom" if up else "top",
        color=colour,
        fontsize=7.5,
    )


def name_start(axes: Axes, found: AdapterMap) -> None:
    """The shared start of the runs."""
    x, y = found.start.tolist()
    axes.plot(x, y, "s", color=BLACK, ms=7, zorder=6, label="start")
    axes.annotate("start", (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8, fontweight="bold")


# ---- losses


def losses_figure(found: Losses) -> Figure:
    """The loss of every run at its snapshots, the median and the middle half, the medians of the domains."""
    domains = sorted({domain for domain, _, _ in found.values()})
    note = (
        f"{len(found)} runs; the loss is that of the training batch of the snapshot's step, mean over answer "
        f"tokens. Thin lines: single runs.\nBlack: median over runs; band: the middle half of them"
        + ("; coloured: median of a domain." if 1 < len(domains) <= len(PALETTE) - 1 else ".")
    )
    figure, (axes,) = canvas("How the training loss falls along the recorded runs", note, width=8.5)
    for _, steps, values in found.values():
        axes.plot(steps, values, color=PALE, lw=0.7, alpha=0.8, label="_run")
    rows = list(found.values())
    steps, at = by_step([row[1:] for row in rows])
    low, middle, high = (quantile(at, share) for share in (0.25, 0.5, 0.75))
    axes.fill_between(steps, low, high, color=BLACK, alpha=0.18, lw=0)
    axes.plot(steps, middle, "-o", color=BLACK, ms=4, lw=2, label="median")
    ends = {f"all {len(rows)} runs": (float(steps[-1]), middle[-1], BLACK)}
    if 1 < len(domains) <= len(PALETTE) - 1:
        for domain, colour in zip(domains, PALETTE, strict=False):
            own = [row[1:] for row in rows if row[0] == domain]
            x, values = by_step(own)
            y = quantile(values, 0.5)
            axes.plot(x, y, color=colour, lw=1.5, label=domain)
            ends[f"{domain} ({len(own)})"] = (float(x[-1]), y[-1], colour)
    positive = min(loss for _, _, values in rows for loss in values) > 0
    unit = "nats a token, log scale" if positive else "nats a token"
    axes.set(
        xlabel="optimiser step", ylabel=f"training loss ({unit})", yscale="log" if positive else "linear"
    )
    label_ends(axes, ends)
    return figure


def by_step(rows: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[list[float]]]:
    """Steps at which at least half of the runs have a snapshot, and their losses there."""
    values: dict[int, list[float]] = {}
    for steps, losses_ in rows:
        for step, loss in zip(steps, losses_, strict=True):
            values.setdefault(step, []).append(loss)
    shared = sorted(step for step, found in values.items() if 2 * len(found) >= len(rows)) or sorted(values)
    return shared, [values[step] for step in shared]


def quantile(at: Sequence[Sequence[float]], share: float) -> list[float]:
    """The quantile of the losses at every step."""
    return [torch.tensor(list(values), dtype=torch.float64).quantile(share).item() for values in at]


# ---- similarity


def similarity_figure(found: Similarity) -> Figure:
    """Cosine of conditions against cosine of adapters, a dot a pair of tasks, with binned means."""
    value, low, high = found.correlation
    note = (
        f"{found.tasks} tasks, {len(found.adapters)} pairs. Prompts: cosine of the encoder's means over the "
        f"prompts of a task; adapters: cosine of ΔW − mean ΔW of the final adapters.\nBlack: means of "
        f"{len(found.bins)} equal groups of pairs with 95 % intervals (tasks resampled); Pearson's r = "
        f"{value:.2f} [{low:.2f}, {high:.2f}]."
    )
    figure, (axes,) = canvas(
        "Do tasks with similar prompts have similar adapters?", note, width=7.5, height=5.0
    )
    words = ((True, "tasks of one domain", BLUE, 0.985), (False, "tasks of different domains", ORANGE, 0.93))
    for same, word, colour, height in words:
        part = found.same_domain == same
        x, y = found.conditions[part].tolist(), found.adapters[part].tolist()
        axes.plot(x, y, ".", color=colour, ms=3.5, alpha=0.3, mew=0, label=word)
        text = f"● {word} ({counted(int(part.sum()), 'pair')})"
        axes.text(0.015, height, text, color=colour, va="top", fontsize=8, transform=axes.transAxes)
    axes.axhline(0, color=GREY, lw=1, ls="--")
    for x, _, least, most in found.bins.tolist():
        axes.plot([x, x], [least, most], color=BLACK, lw=1.5, label="_interval")
    axes.plot(*xy(found.bins[:, :2]), "-o", color=BLACK, ms=5, label="mean of a group of pairs")
    axes.set(xlabel="similarity of the prompts (cosine)", ylabel="similarity of the adapters (cosine)")
    return figure
