"""The local page of `ltdi serve`: type a task, see the adapter, talk to base and adapted model.

In: a `Studio`.  Out: a Gradio page on 127.0.0.1.
Idea: the page only lays out and passes on; what it shows is made in studio.py and page_parts.py. No other
machine is asked anything: no analytics, no share link. What the library refuses is one sentence on the page.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ltdi_peft.page_parts import EMPTY, STYLE, header, heading, problem, result
from ltdi_peft.studio import ARROW, Made, Order, Studio, parse_examples
from ltdi_peft.talk import Question
from ltdi_peft.task import Example
from ltdi_peft.terminal import one_line

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
    import uvicorn  # Gradio's own server
    from fastapi import FastAPI
    from gradio.components import Component
    from gradio.themes import Default
except ImportError as error:
    raise ImportError(f"the page needs Gradio: pip install 'ltdi_peft[serve]' ({error}).") from error

HOST = "127.0.0.1"
REFUSALS = (ValueError, OSError, ImportError)  # what every subcommand says in one line
PLAIN, TEMPLATE = "Input: … Output: …", "the model's chat template"
HOUR = 3600  # seconds
NO_TEXT, PENDING = "(no text)", "…"  # shown for an answer that ended at once, and for one to come
THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

Messages = list[dict[str, Any]]  # Gradio's {"role": …, "content": …}


@dataclass(frozen=True)
class Exchange:
    """A message and what both models answered."""

    message: str
    base: str
    adapted: str


@dataclass(frozen=True)
class Talk:
    """What an open page remembers."""

    made: Made | None = None
    exchanges: tuple[Exchange, ...] = ()


class Callbacks:
    """What the page's buttons do, on one studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def generate(
        self,
        task: str,
        examples: str,
        seed: int | float | None,
        guidance: int | float | None,
        candidates: int | float,
        steps: int | float,
        talk: Talk,
    ) -> tuple[Any, ...]:
        """The page's memory, card, notice, download, both conversations, message box and send button."""
        try:
            order = Order(
                task.strip(), parse_examples(examples), int(seed or 0), guidance, int(candidates), int(steps)
            )
            made = self.studio.make(order)
        except REFUSALS as error:
            return (talk, gr.skip(), problem(one_line(error)), *[gr.skip()] * 5)
        self.forget(talk)
        download = gr.DownloadButton(value=str(made.archive), interactive=True)
        message = gr.Textbox(interactive=True, placeholder="An input of the task")
        return Talk(made), result(made), "", download, [], [], message, gr.Button(interactive=True)

    def ask(
        self, message: str, in_context: bool, keep: bool, style: str, longest: int | float, talk: Talk
    ) -> Iterator[tuple[Any, ...]]:
        """The page's memory, both conversations, message box, notice; again as each answer comes."""
        made, before = talk.made, talk.exchanges
        try:
            if made is None:
                raise ValueError("there is no adapter yet; type a task and generate one.")
            prompt = made.order.prompt if in_context else None
            question = Question(message.strip(), prompt, style == TEMPLATE, max_new_tokens=int(longest))
            yield talk, *conversations(before, Exchange(question.message, PENDING, PENDING)), "", ""
            earlier = earlier_of(before, "base") if keep else ()
            base = self.studio.ask_base(replace(question, earlier=earlier))
            yield talk, *conversations(before, Exchange(question.message, base, PENDING)), "", ""
            earlier = earlier_of(before, "adapted") if keep else ()
            adapted = self.studio.ask_adapted(made, replace(question, earlier=earlier))
        except REFUSALS as error:
            yield talk, *conversations(before), message, problem(one_line(error))
            return
        after = (*before, Exchange(question.message, base, adapted))
        yield replace(talk, exchanges=after), *conversations(after), "", ""

    def clear(self, talk: Talk) -> tuple[Talk, Messages, Messages, str]:
        """The page's memory without the conversation, both conversations, notice."""
        return replace(talk, exchanges=()), [], [], ""

    def forget(self, talk: Talk) -> None:
        """Called when a page was closed, and when its adapter is replaced."""
        if talk.made is not None:
            self.studio.forget(talk.made)


def conversations(exchanges: tuple[Exchange, ...], *last: Exchange) -> tuple[Messages, Messages]:
    """What was said with the base model and with the adapted one, as Gradio shows it."""
    both: tuple[Messages, Messages] = [], []
    for one in (*exchanges, *last):
        for said, answer in zip(both, (one.base, one.adapted), strict=True):
            said.append({"role": "user", "content": one.message})
            said.append({"role": "assistant", "content": answer or NO_TEXT})
    return both


def earlier_of(exchanges: tuple[Exchange, ...], who: str) -> tuple[Example, ...]:
    """The conversation with `base` or `adapted` as its context; exchanges without an answer are left out."""
    pairs = [(one.message, one.base if who == "base" else one.adapted) for one in exchanges]
    return tuple(Example(asked, said) for asked, said in pairs if said)


def build(studio: Studio) -> gr.Blocks:
    """The page's layout, wired to the callbacks."""
    calls = Callbacks(studio)
    with gr.Blocks(title="ltdi serve", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        memory = gr.State(Talk(), delete_callback=calls.forget)
        gr.HTML(header(studio))
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                order, make, notice = order_part(studio)
            with gr.Column(scale=6, min_width=380):
                card = gr.HTML(EMPTY, elem_id="card")
                download = gr.DownloadButton("Download adapter (.zip)", interactive=False, elem_id="download")
        gr.HTML(heading("Talk to both", "The same message to both models; greedy answers."))
        with gr.Row():
            base = conversation("Base model", "base", "What the base model says will stand here.")
            adapted = conversation("With the adapter", "adapted", "What the adapted model says, here.")
        message, send, options, clear, talk_notice = message_part(studio)
        shown = [memory, card, notice, download, base, adapted, message, send]
        make.click(calls.generate, [*order, memory], shown, show_progress_on=card, api_name="generate")
        asked, told = [message, *options, memory], [memory, base, adapted, message, talk_notice]
        sent = [send.click, message.submit]
        gr.on(sent, calls.ask, asked, told, show_progress="hidden", api_name="ask")
        cleared = [memory, base, adapted, talk_notice]
        gr.on([clear.click, base.clear, adapted.clear], calls.clear, [memory], cleared, api_name="clear")
    return page


def order_part(studio: Studio) -> tuple[list[Component], gr.Button, gr.HTML]:
    """The fields that say what to make, the button, and the place for a problem."""
    own = studio.generator.config.guidance_scale
    task = gr.Textbox(
        label="Task, in a sentence",
        lines=2,
        placeholder="Say how this animal moves. Put the answer in square brackets.",
        elem_id="task",
    )
    examples = gr.Textbox(
        label="Examples (optional)",
        info=f"One a line: input {ARROW} answer. The adapter learns from them; both models are measured.",
        lines=4,
        max_lines=12,
        placeholder=f"horse {ARROW} [walks]\nsalmon {ARROW} [swims]",
        elem_id="examples",
    )
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            seed = gr.Number(0, label="Seed", info="the same seed, the same adapter", precision=0)
            guidance = gr.Number(None, label="Guidance scale", info=f"empty: the generator's own, {own:g}")
        with gr.Row():
            steps = gr.Slider(0, 64, 8, step=1, label="Refinement steps", info="on the examples, if any")
            many = gr.Slider(1, 16, 1, step=1, label="Candidates", info="the examples choose the best one")
    make = gr.Button("Generate adapter", variant="primary", elem_id="generate")
    notice = gr.HTML("", elem_id="notice")
    return [task, examples, seed, guidance, many, steps], make, notice


def conversation(label: str, name: str, empty: str) -> gr.Chatbot:
    """One model's side; answers are shown as they are, not as Markdown."""
    return gr.Chatbot(
        label=label, elem_id=name, height=340, placeholder=empty, render_markdown=False, buttons=[]
    )


def message_part(
    studio: Studio,
) -> tuple[gr.Textbox, gr.Button, list[Component], gr.Button, gr.HTML]:
    """The message, how it is asked, and the place for a problem."""
    with gr.Row(equal_height=True):
        message = gr.Textbox(
            show_label=False,
            placeholder="Generate an adapter first",
            interactive=False,
            scale=8,
            container=False,
            elem_id="message",
        )
        send = gr.Button("Send", variant="primary", interactive=False, scale=1, min_width=90, elem_id="send")
        clear = gr.Button("Clear", scale=1, min_width=90, elem_id="clear")
    notice = gr.HTML("", elem_id="talk-notice")
    with gr.Row():
        with gr.Column(min_width=240):
            in_context = gr.Checkbox(True, label="Task prompt in context", elem_id="in-context")
            keep = gr.Checkbox(False, label="Earlier messages in context", elem_id="keep")
        styles = [PLAIN, TEMPLATE] if studio.base.tokenizer.chat_template else [PLAIN]
        style = gr.Radio(styles, value=PLAIN, label="Message format", min_width=240, elem_id="style")
        longest = gr.Slider(1, 256, 32, step=1, label="Longest answer, tokens", min_width=240)
    return message, send, [in_context, keep, style, longest], clear, notice


def bound(port: int) -> socket.socket:
    """A socket of this machine's own address at the port, or for 0 at any free one.

    ValueError for a port in use.
    """
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a page that has just ended
    try:
        one.bind((HOST, port))
    except (OSError, OverflowError) as error:
        one.close()
        raise ValueError(
            f"port {port} of {HOST} cannot be had ({error}); choose another by --port, or 0 for any free one."
        ) from error
    return one


def serve(page: gr.Blocks, at: socket.socket, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `announce` gets the page's address as soon as a browser may ask for it.

    Not by Gradio's own `launch`, which asks its server for the page, through a proxy where the environment
    names one, and gives up after 3 s.
    """
    host, port = at.getsockname()
    # The page's own look: no links to Gradio's site, no history of calls kept in the browser.
    look = {"css": STYLE, "theme": THEME, "footer_links": [], "run_history": False}
    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its pages about itself load scripts
    app = gr.mount_gradio_app(bare, page, "/", server_name=host, server_port=port, ssr_mode=False, **look)
    # Open pages hold a connection, so an end that waits for them would not come.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    at.listen()
    announce(f"http://{host}:{port}/")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its own orderly end
        server.run(sockets=[at])
