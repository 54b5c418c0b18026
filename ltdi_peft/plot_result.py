"""Figures of a result file: gain by method, gain by task; with plot_sweep all that a result can show.

In: the JSON of a result.  Out: name → `Figure`, for the sections that it has.
Idea: nothing is computed here that a reader could not check against the file.
"""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltdi_peft.plot import BLACK, BLUE, CONTEXTS, GREY, ORANGE, PALE, Result, canvas, counted
from ltdi_peft.plot_data import wilson
from ltdi_peft.plot_sweep import curve_figure, sampling_figure, training_figure
from ltdi_peft.summary import UNSEEN

WORDS = {
    "in_context": "5 solved examples in context",
    "start": "shared start of all runs",
    "format_only": "one LoRA, answers shuffled",
    "multi_task_lora": "one LoRA for all training tasks",
    "multi_task_lora_4x": "the same at 4 times the rank",
    "mean": "mean of the training adapters",
    "mean_noise": "mean adapter and noise",
    "nearest": "adapter of the nearest prompt",
    "ridge": "linear regression from the prompt",
    "t2l_recon": "hypernetwork, trained on adapters",
    "t2l_sft": "hypernetwork, trained on answers",
    "ours": "generated from the prompt",
    "ours_wrong_prompt": "generated from a wrong prompt",
    "oracle_codec": "own LoRA through the codec: a ceiling",
}
RIVALS = ("multi_task_lora", "start", "ridge", "mean")  # the first one there is stands beside `ours`


def result_figures(result: Result) -> dict[str, Figure]:
    """Every figure that the result has the data for."""
    made = {name: draw(result) for name, (section, draw) in FIGURES.items() if result.get(section)}
    return {name: figure for name, figure in made.items() if figure is not None}


# ---- gain by method


def methods_figure(result: Result) -> Figure:
    """Recovered gain of every method with its interval, in both contexts; a panel a split."""
    methods = {name: row for name, row in result["methods"].items() if name not in ("base", "oracle")}
    splits = [split for split in UNSEEN if split in result["methods"]["base"]]
    order = sorted(methods, key=lambda name: methods[name][splits[0]]["G"] or 0.0)
    note = (
        f"{result['methods']['base'][splits[0]]['examples']} examples a task; "
        f"{counted(len(result['seeds']), 'generator seed')}; {result['base_model']}. Recovered gain G = "
        f"Σ(method − base) / Σ(own LoRA − base), sums of accuracy over tasks.\nBars: 95 % intervals, tasks "
        f"resampled (unseen domains: domains); without a bar where there is but one."
    )
    figure, panels = canvas(
        "How much of the gain of a task's own LoRA is recovered without training on the task?",
        note,
        width=4.6 + 2.9 * len(splits),
        height=1.9 + 0.31 * len(order),
        panels=[panel_name(result["methods"]["base"][split]["tasks"], split) for split in splits],
        share_y=True,
    )
    for axes, split in zip(panels, splits, strict=True):
        gain_panel(axes, [methods[name][split] for name in order])
    names = [f"{WORDS[name]} ({name})" if name in WORDS else name for name in order]
    panels[0].set_yticks(range(len(order)), names)
    for label, name in zip(panels[0].get_yticklabels(), order, strict=True):
        label.set(fontweight="bold" if name == "ours" else "normal")
    return figure


def panel_name(tasks: int, split: str) -> str:
    """How many tasks of which kind, above the words of the reference lines."""
    words = f"{counted(tasks, 'unseen task')} of seen domains"
    return (words if split == "unseen_tasks" else f"{counted(tasks, 'task')} of unseen domains") + "\n\n"


def gain_panel(axes: Axes, rows: list[Result]) -> None:
    """One split: a point and a bar for each method and context; what their colours mean, in a row below."""
    for key, (word, colour, marker) in CONTEXTS.items():
        height = 0.14 if key == "" else -0.14
        for place, row in enumerate(rows):
            if row[f"ci{key}"]:
                axes.plot(row[f"ci{key}"], [place + height] * 2, color=colour, lw=1.6, alpha=0.5)
        found = [
            (row[f"G{key}"], place + height) for place, row in enumerate(rows) if row[f"G{key}"] is not None
        ]
        axes.plot(*zip(*found, strict=True), marker, color=colour, ms=5, label=word)
        below = -1.0 if key == "" else -1.5
        axes.plot(0.03, below, marker, color=colour, ms=5, label="_key")
        axes.text(0.08, below, word, color=colour, fontsize=8, va="center")
    for x, word in ((0, "base\nmodel"), (1, "task's\nown LoRA")):
        axes.axvline(x, color=GREY, lw=1, ls="--", zorder=0)
        axes.text(x, len(rows) - 0.35, word, ha="center", va="bottom", color=GREY, fontsize=7.5)
    axes.set(xlabel="recovered gain G", ylim=(-1.9, len(rows) - 0.4))


# ---- gain by task


def tasks_figure(result: Result) -> Figure | None:
    """Gain of `ours`, of its rival and of the task's own LoRA on every unseen task, by domain."""
    tasks = list(result["per_task"].values())
    methods = tasks[0]["accuracy"]["prompt"]
    rival = next((name for name in RIVALS if name in methods), None)
    if "ours" not in methods or rival is None:
        return None
    tasks.sort(key=lambda one: (one["split"] == "unseen_tasks", one["domain"], gain(one, "ours", "prompt")))
    note = (
        f"{counted(len(tasks), 'task')} that no generator was trained on, "
        f"{min(one['examples'] for one in tasks)} examples each, sorted by gain within their domain. Blue "
        f"bars: 95 % (Wilson) of the generated adapter's accuracy on these examples; the other points are "
        f"about as uncertain.\nLeft: the model also reads the task prompt; right: the adapter alone must "
        f"know the task."
    )
    contexts = {"prompt": CONTEXTS[""], "no_prompt": CONTEXTS["_no_prompt"]}
    figure, panels = canvas(
        "On which unseen tasks do generated adapters help?",
        note,
        width=9.5,
        height=1.9 + 0.165 * len(tasks),
        panels=[word for word, _, _ in contexts.values()],
        share_y=True,
    )
    for axes, context in zip(panels, contexts, strict=True):
        task_panel(axes, tasks, context, rival)
    name_points(panels, rival, len(tasks) + 0.25)
    panels[0].set_yticks(range(len(tasks)), [one["task"].removeprefix(f"{one['domain']}/") for one in tasks])
    panels[0].tick_params("y", labelsize=7)
    name_domains(panels, tasks)
    return figure


def mean(values: list[float]) -> float:
    """Over seeds."""
    return sum(values) / len(values)


def gain(one: Result, method: str, context: str) -> float:
    """Accuracy over the base model's on one task."""
    return mean(one["accuracy"][context][method]) - mean(one["accuracy"][context]["base"])


def task_panel(axes: Axes, tasks: list[Result], context: str, rival: str) -> None:
    """One context: a row a task."""
    for place, one in enumerate(tasks):
        accuracy = one["accuracy"][context]
        ends = [end - mean(accuracy["base"]) for end in wilson(mean(accuracy["ours"]), one["examples"])]
        axes.plot(ends, [place] * 2, color=BLUE, lw=1.4, alpha=0.4)
    for method, (style, _) in marks(rival).items():
        axes.plot(
            [gain(one, method, context) for one in tasks], range(len(tasks)), ls="", label=method, **style
        )
    axes.axvline(0, color=GREY, lw=1, ls="--", zorder=0)
    axes.set(xlabel="gain in accuracy over the base model", ylim=(-0.8, len(tasks) + 1))


def marks(rival: str) -> dict[str, tuple[dict[str, Any], str]]:
    """How the three methods of a task are marked, and their words."""
    return {
        "oracle": ({"marker": "|", "color": BLACK, "ms": 9, "mew": 1.6}, "task's own LoRA"),
        rival: ({"marker": "D", "color": ORANGE, "ms": 4.2, "mfc": "white", "mew": 1.2}, WORDS[rival]),
        "ours": ({"marker": "o", "color": BLUE, "ms": 4.8}, "generated from the prompt"),
    }


def name_points(panels: list[Axes], rival: str, height: float) -> None:
    """What the marks mean, above the first row: two names in the left panel, one in the right."""
    places = ((panels[0], 0.0), (panels[0], 0.36), (panels[1], 0.0))
    for (axes, x), (style, word) in zip(places, marks(rival).values(), strict=True):
        axes.plot(x, height, ls="", label="_key", **style)
        axes.text(x + 0.025, height, word, color=style["color"], fontsize=7.5, va="center")


def name_domains(panels: list[Axes], tasks: list[Result]) -> None:
    """A line between domains, and their names at the right."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(tasks):
        groups.setdefault((one["split"], one["domain"]), []).append(place)
    for (split, domain), places in groups.items():
        word = domain if split == "unseen_tasks" else f"{domain}\n(unseen)"
        at = panels[-1].get_yaxis_transform()
        panels[-1].text(1.02, sum(places) / len(places), word, transform=at, va="center", fontsize=8)
        for axes in panels:
            axes.axhline(places[0] - 0.5, color=PALE, lw=0.8)


FIGURES: dict[str, tuple[str, Callable[[Result], Figure | None]]] = {
    "methods": ("methods", methods_figure),
    "tasks": ("per_task", tasks_figure),
    "sampling_steps": ("sampling_steps", sampling_figure),
    "gradient_steps": ("curve", curve_figure),
    "training_tasks": ("training_tasks", training_figure),
}
"""File name → the section of a result that it needs, and how it is drawn."""
