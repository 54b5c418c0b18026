"""`ltdi`: the parser, the exit status, and the options that every subcommand has.

In: a command line.  Out: an answer on stdout, progress and errors on stderr, and an exit status.
Idea: what is the same for all subcommands is here, what differs in `commands.COMMANDS`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ltdi_peft.command import Command
from ltdi_peft.commands import COMMANDS
from ltdi_peft.completion import SHELLS, script
from ltdi_peft.quiet import drop_kernel_notice
from ltdi_peft.terminal import Answer, complain, show

OK, UNEXPECTED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
ABOUT = "Record LoRA fine-tunes, train a generator, generate adapters."
STATUS = """\
exit status:
  0    done
  1    an unexpected error, with its traceback: please report it
  2    bad input, said in one line on stderr
  130  interrupted; what is recorded is kept, and the same command continues

shell completion: eval "$(ltdi completion bash)"; also zsh and fish"""
OVERRIDES = "recipe fields are overridden by --section.field=value, e.g. --train.steps=500"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. What is not foreseen is raised, and Python ends with 1."""
    parser = make_parser()
    known, rest = parser.parse_known_args(arguments)
    command: Command = known.command
    if rest and not command.overrides:
        parser.error(f"unknown arguments {rest}")
    known.overrides, known.progress = rest, not known.quiet
    if known.quiet:  # the libraries below read these when they are imported, which is later
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    drop_kernel_notice()
    try:
        answer = command.run(known)
        show(answer, as_json=known.json, no_color=known.no_color)
        sys.stdout.flush()
        if answer.failure:
            raise ValueError(answer.failure)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `ltdi tasks | head` is no error; what is left unwritten must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        complain(f"ltdi {command.name}", error, no_color=known.no_color)
        return BAD_INPUT
    return OK


def make_parser() -> argparse.ArgumentParser:
    """All subcommands, each with an example in its help."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="ltdi", description=ABOUT, epilog=STATUS, formatter_class=kind, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ltdi_peft {version('ltdi_peft')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (*COMMANDS, COMPLETION):
        epilog = f"example: ltdi {command.name} {command.example}"
        own = commands.add_parser(
            command.name,
            help=command.about,
            description=command.about,
            epilog=epilog + (f"\n{OVERRIDES}" if command.overrides else ""),
            formatter_class=kind,
            allow_abbrev=False,
        )
        add_arguments(own, command)
        own.set_defaults(command=command)
    return parser


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """The subcommand's own, and those that all have."""
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a line")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--no-color", action="store_true", help="plain text on terminals too, as NO_COLOR=1")


# ---- completion, which needs the parsers of all others


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=list(SHELLS), help="whose script to print")


def completion(known: argparse.Namespace) -> Answer:
    """`ltdi completion SHELL`."""
    parsers = {}
    for command in (*COMMANDS, COMPLETION):
        own = argparse.ArgumentParser(description=command.about)
        add_arguments(own, command)
        parsers[command.name] = (own, command.overrides)
    lines = script(known.shell, parsers)
    return Answer([{"shell": known.shell, "script": "\n".join(lines)}], lines)


COMPLETION = Command(
    "completion", "a completion script for your shell", "bash", completion_arguments, completion
)


if __name__ == "__main__":  # for `accelerate launch -m ltdi_peft.cli collect RECIPE`
    raise SystemExit(main())
