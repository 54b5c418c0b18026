"""`ltdi serve`: the local page as a subcommand.

In: parsed arguments.  Out: the page's address on stdout, then nothing until Ctrl-C, which is its normal end.
"""

import sys
import webbrowser
from argparse import ArgumentParser, Namespace

from ltdi_peft.command import Command
from ltdi_peft.terminal import Answer, show

PORT = 7860  # Gradio's own


def serve_arguments(parser: ArgumentParser) -> None:
    """What to load, and where to serve it."""
    parser.add_argument("--generator", help="folder or Hub id; else $LTDI_GENERATOR")
    parser.add_argument("--base-model", help="folder or Hub id; else the generator's own")
    parser.add_argument("--device", help="cpu, cuda, …; else the accelerator of this machine, else its CPU")
    parser.add_argument("--load-in-4bit", action="store_true", help="load the base model in 4 bits (NF4)")
    parser.add_argument("--port", type=int, default=PORT, help=f"0 for any free one; default {PORT}")
    parser.add_argument("--no-browser", action="store_true", help="only print the page's address")


def serve_page(known: Namespace) -> Answer:
    """`ltdi serve`."""
    from ltdi_peft.page import bound, build, serve
    from ltdi_peft.studio import open_studio

    def announce(address: str) -> None:
        said = Answer([{"url": address}], [f"{address}  (Ctrl-C ends it)"])
        show(said, as_json=known.json, no_color=known.no_color)
        sys.stdout.flush()
        if not known.no_browser:
            webbrowser.open(address)

    options = {"device": known.device, "load_in_4bit": known.load_in_4bit}
    with bound(known.port) as at:  # before anything is loaded, which takes a while
        studio = open_studio(known.generator, base_model=known.base_model, **options)
        try:
            serve(build(studio), at, announce)
        finally:
            studio.close()
    return Answer([], [])


SERVE = Command(
    "serve",
    "a local page: type a task, talk to base and adapted model",
    "--generator runs/demo/generator",
    serve_arguments,
    serve_page,
)
