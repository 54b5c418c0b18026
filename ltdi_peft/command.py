"""What a subcommand of `ltdi` is.

In: –  Out: `Command`.
Idea: one more subcommand is a function that declares its arguments, one that runs it, and a line in
`commands.COMMANDS`; help, JSON, quiet, exit status and completion come with that.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from ltdi_peft.terminal import Answer


@dataclass(frozen=True)
class Command:
    """A subcommand: what it is called, what its help says, and what it does.

    `run` gets the arguments with `overrides` (a list of --section.field=value, if `overrides` lets any
    through) and `progress` (False with --quiet).
    """

    name: str
    about: str
    example: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Answer]
    overrides: bool = False
