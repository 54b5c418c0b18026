"""The parts of the local page that are plain HTML.

In: what the studio found, or a sentence.  Out: HTML with every text in it escaped.
Idea: a part is a function of what it shows, so it is tested without a browser; colours are Gradio's own
variables, which follow the reader's light or dark mode.
"""

from html import escape

from ltdi_peft.cards import described, read_as
from ltdi_peft.provenance import Provenance
from ltdi_peft.studio import Made, Measured, Studio

STYLE = """
.gradio-container {max-width: 1240px !important}
.ltdi, .ltdi td, .ltdi th {color: var(--body-text-color)}
.ltdi h1 {font-size: 1.5rem; margin: 0 0 .2rem 0}
.ltdi h2 {font-size: 1.1rem; margin: .2rem 0 .1rem 0}
.ltdi .pale {opacity: .7}
.ltdi .card {border: 1px solid var(--border-color-primary); border-radius: var(--block-radius);
  background: var(--block-background-fill); padding: .9rem 1.1rem}
.ltdi .empty {display: flex; align-items: center; justify-content: center; text-align: center;
  min-height: 21rem; border-style: dashed}
.ltdi .said {font-weight: 600; margin-bottom: .6rem; overflow-wrap: anywhere}
.ltdi table {width: 100%; border-collapse: collapse; margin: .3rem 0 .6rem 0}
.ltdi table, .ltdi tr, .ltdi th, .ltdi td {border: 0 !important}
.ltdi th {text-align: left; font-weight: 600; padding: .15rem .9rem .15rem 0; vertical-align: top;
  white-space: nowrap}
.ltdi td {padding: .15rem 0; overflow-wrap: anywhere}
.ltdi .near td {padding-right: .9rem}
.ltdi .near td.wide {width: 45%; padding-right: 0; vertical-align: middle}
.ltdi .bar {height: .6rem; border-radius: .3rem; background: var(--border-color-primary)}
.ltdi .bar div {height: 100%; border-radius: .3rem; background: var(--color-accent)}
.ltdi .note, .ltdi .problem {border-radius: var(--block-radius); padding: .5rem .8rem;
  overflow-wrap: anywhere; border: 1px solid var(--border-color-primary)}
.ltdi .problem {border-color: var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color)}
#card, #card .html-container {padding: 0}
#notice:not(:has(.problem)), #talk-notice:not(:has(.problem)) {display: none}
"""


def part(inner: str) -> str:
    """HTML that the style above is for."""
    return f'<div class="ltdi">{inner}</div>'


def header(studio: Studio) -> str:
    """The title, and what is loaded."""
    config, base = studio.generator.config, studio.base
    about = (
        f"Generator <b>{escape(studio.generator.name or 'not saved')}</b>, trained on "
        f"{len(config.training_tasks)} tasks · base model <b>{escape(base.name)}</b> on "
        f"{escape(str(base.model.device))} · all on this machine"
    )
    title = "<h1>An adapter from a sentence</h1>"
    return part(f'{title}<div class="pale">{about}</div>')


def heading(text: str, about: str) -> str:
    """A section's title with a line about it."""
    return part(f'<h2>{escape(text)}</h2><div class="pale">{escape(about)}</div>')


def problem(sentence: str) -> str:
    """What went wrong."""
    return part(f'<div class="problem" role="alert">{escape(sentence)}</div>')


EMPTY = part(
    '<div class="card empty"><div class="pale">No adapter yet.<br>Type a task and press '
    "<b>Generate adapter</b>;<br>what is known about the adapter will stand here.</div></div>"
)


def result(made: Made) -> str:
    """What is known about an adapter: the task, measurements, nearest training tasks, warnings."""
    rows = {
        "On your examples": examples_cell(made),
        "Generator's score": score_cell(made.provenance),
        "Adapter": f"{described(made.spec)}; seed {made.provenance.seed}, guidance "
        f"{made.provenance.guidance_scale:g}",
    }
    if made.provenance.reading:
        rows = {"Read as": read_as(made.provenance), **rows}
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    notes = "".join(f'<div class="note">{escape(text)}</div>' for text in made.warnings)
    said = f'<div class="said">{escape(made.order.prompt)}</div>'
    return part(f'<div class="card">{said}{confidence(made)}<table>{cells}</table>{notes}</div>')


def confidence(made: Made) -> str:
    """How near the sentence is to what the generator knows."""
    nearest = made.provenance.nearest_similarity
    bars = "".join(
        f'<tr><td>{escape(task)}</td><td>{value:.2f}</td><td class="wide">{bar(value)}</td></tr>'
        for task, value in made.nearest
    )
    about = "cosine of your sentence with the nearest training task; far from all of them, expect little"
    head = f'<div>Confidence <b>{nearest:.2f}</b> <span class="pale">({about})</span></div>'
    return f'{head}<table class="near" aria-label="nearest training tasks">{bars}</table>'


def bar(share: float) -> str:
    """A bar, full at 1."""
    return f'<div class="bar"><div style="width:{100 * min(max(share, 0), 1):.0f}%"></div></div>'


def examples_cell(made: Made) -> str:
    """What base and adapter answer right, and what the examples were used for."""
    if made.measured is None:
        return "not measured; paste some to see"
    order, found = made.order, made.measured
    used = ["were read beside the sentence"] if made.provenance.examples else []
    used += ["chose among candidates"] if order.candidates > 1 else []
    used += [f"taught {order.refine_steps} steps"] if order.refine_steps else []
    seen = f"; they {' and '.join(used)}, so other examples may do worse" if used else ""
    return f"{right(found)}{seen}"


def right(found: Measured) -> str:
    """Both counts."""
    return f"base model {found.base} of {found.count} right, adapter {found.adapter} of {found.count}"


def score_cell(provenance: Provenance) -> str:
    """The generator's own evaluation on unseen tasks, if it carries one."""
    ours = provenance.scores["methods"]["ours"] if provenance.scores else {}
    if "unseen_tasks" not in ours:
        return "unknown; ltdi evaluate would measure it"
    row = ours["unseen_tasks"]
    gain = "–" if row["G"] is None else f"{row['G']:.2f}"
    return (
        f"{row['tasks']} unseen tasks: accuracy {row['accuracy']:.2f}, {gain} of the gain of a "
        f"LoRA trained on the task"
    )
