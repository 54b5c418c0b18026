"""How figures look and are written; what they show is in plot_result and plot_store.

In: a title, a note, sizes.  Out: a `Figure` without any window; PNG or SVG files.
Idea: a figure is read without its text: the title says what it is about, lines carry their names, the note
tells the sample sizes and what an interval is. Equal data give equal bytes on one machine.
Source: colours that colour-blind people can tell apart, Okabe & Ito 2008.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import fill
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ltdi_peft.files import replace_file

try:
    import matplotlib
except ImportError as error:
    raise ImportError(f"figures need matplotlib: pip install 'ltdi_peft[plot]' ({error}).") from error
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # matplotlib needs it too

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
AMBER, BLACK, GREY, PALE = "#E69F00", "#000000", "#6E6E6E", "#C8C8C8"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
# Suffix of a result's keys → words, colour and marker of the two contexts.
CONTEXTS = {"": ("task prompt in context", BLUE, "o"), "_no_prompt": ("without the task prompt", ORANGE, "s")}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that bytes do not depend on the machine's fonts
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "svg.hashsalt": "ltdi_peft",
    "svg.fonttype": "none",
    "savefig.dpi": 110,
}
COLOURS = 64  # of a PNG's palette
LABEL = 0.05  # height of a line of a label, as a share of the axis
NOTE_POINTS, NOTE_CHARACTERS = 7.5, 18  # size of the note; characters of that size an inch


Result = dict[str, Any]
"""The JSON of a result, or a part of it."""


def styled() -> AbstractContextManager[None]:
    """Within the block matplotlib draws in `STYLE`; a user's own settings come back afterwards."""
    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]  # wants a Literal of all keys


def counted(count: int, word: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def canvas(
    title: str,
    note: str,
    *,
    width: float = 9.0,
    height: float = 4.5,
    panels: Sequence[str] = ("",),
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with one axes a panel, beside each other, its title above and its note below.

    A line break in the note stays, longer lines are broken to the figure's width.
    """
    lines = [fill(line, int(NOTE_CHARACTERS * width)) for line in note.splitlines()]
    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(1, len(panels), squeeze=False, sharey=share_y)[0])
        for one, name in zip(axes, panels, strict=True):
            one.set_title(name)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=NOTE_POINTS, color=GREY)
    return figure, axes


def save_figures(figures: Mapping[str, Figure], folder: Path, suffix: str = ".png") -> dict[str, str]:
    """Write each as `<folder>/<name><suffix>` (.png or .svg); returns file name → title."""
    written = {}
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}{suffix}", picture(figure, suffix.removeprefix(".")))
        written[f"{name}{suffix}"] = figure.get_suptitle()
    return written


def picture(figure: Figure, kind: str) -> bytes:
    """The file of a figure; neither the date nor the version of matplotlib is in it."""
    out = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with styled():
        figure.savefig(out, format=kind, metadata=metadata)
    return few_colours(out) if kind == "png" else out.getvalue()


def few_colours(png: io.BytesIO) -> bytes:
    """The picture with a palette: a third of the bytes, as figures stay in the repository."""
    out = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def apart(places: list[float], least: float) -> list[float]:
    """The places moved, in their order, until neighbours are `least` apart: for labels of lines that meet."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(50 * len(places)):
        for i in range(len(moved) - 1):
            lack = least - (moved[i + 1] - moved[i])
            if lack > 1e-9:
                moved[i], moved[i + 1] = moved[i] - lack / 2, moved[i + 1] + lack / 2
    found = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        found[i] = place
    return found


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]], lines: int = 1) -> None:
    """Names, of so many lines, at the right ends of curves: name → (x, y, colour); they do not overlap."""
    logarithmic = axes.get_yscale() == "log"
    low, high = (math.log(y) if logarithmic else y for y in axes.get_ylim())
    wanted = [math.log(y) if logarithmic else y for _, y, _ in ends.values()]
    heights = apart(wanted, lines * LABEL * (high - low))
    for (name, (x, _, colour)), y in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            (x, math.exp(y) if logarithmic else y),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def xy(points: Float[Tensor, "point 2"]) -> tuple[list[float], list[float]]:
    """Columns of a tensor for matplotlib."""
    return points[:, 0].tolist(), points[:, 1].tolist()
