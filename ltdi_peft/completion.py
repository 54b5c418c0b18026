"""Shell completion for `ltdi`, made from the parser itself.

In: the parsers of the subcommands.  Out: a script for bash, zsh or fish.
Idea: a script has all words in it, so that completing starts no Python. Words that do not begin with a dash
are file names, but for those that the parser lists.
"""

import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Words:
    """What may stand behind a subcommand: options with their help, those that take a value, and values."""

    about: str
    options: dict[str, str]
    valued: frozenset[str]
    choices: tuple[str, ...]
    fields: tuple[str, ...]  # of recipes, as --section.field=


def words_of(parser: ArgumentParser, *, overrides: bool) -> Words:
    """Read off a subcommand's parser."""
    from ltdi_peft.config import Recipe, to_dict  # reads YAML, which `ltdi --help` need not

    options, valued, choices = {}, set(), []
    for action in parser._actions:  # argparse has no public list; shtab and argcomplete read this one too
        for option in action.option_strings:
            options[option] = action.help or ""
            if action.nargs != 0:
                valued.add(option)
        if not action.option_strings:
            choices += action.choices or []
    fields = tuple(f"--{name}=" for name in field_names(to_dict(Recipe()))) if overrides else ()
    return Words(parser.description or "", options, frozenset(valued), tuple(choices), fields)


def field_names(table: Mapping[str, Any], above: str = "") -> list[str]:
    """Dotted names of a recipe's fields."""
    found = []
    for key, value in table.items():
        found += field_names(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
    return found


BASH = """# eval "$(ltdi completion bash)"
_ltdi() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" options="" values="" command="${{COMP_WORDS[1]}}"
    if (( COMP_CWORD == 1 )); then
        options="--help --version" values="{commands}"
    else
        case "$command" in
{cases}
        esac
    fi
    if [[ $current == -* ]]; then values="$options"; fi
    COMPREPLY=($(compgen -W "$values" -- "$current"))
    if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace; fi
}}
complete -o default -F _ltdi ltdi
"""

ZSH = """#compdef ltdi
# eval "$(ltdi completion zsh)", or save it as _ltdi in a folder of $fpath
_ltdi() {{
    if (( CURRENT == 2 )); then
        local -a commands=({commands})
        _describe command commands
        return
    fi
    shift words
    (( CURRENT-- ))
    case "$words[1]" in
{cases}
    esac
}}
if [[ "$funcstack[1]" == _ltdi ]]; then _ltdi "$@"; else compdef _ltdi ltdi; fi
"""


def bash(commands: Mapping[str, Words]) -> str:
    """The script for bash."""
    cases = [
        f'            {name}) options="{" ".join([*words.options, *words.fields])}" '
        f'values="{" ".join(words.choices)}" ;;'
        for name, words in commands.items()
    ]
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def zsh(commands: Mapping[str, Words]) -> str:
    """The script for zsh."""

    def case(name: str, words: Words) -> str:
        specs = [
            f"{option}=[{bare(about)}]:value:_files" if option in words.valued else f"{option}[{bare(about)}]"
            for option, about in words.options.items()
        ]
        specs += [f"{field}-:value:" for field in words.fields]
        specs.append(f"*:value:({' '.join(words.choices)})" if words.choices else "*:file:_files")
        return f"        {name}) _arguments {' '.join(map(quoted, specs))} ;;"

    described = " ".join(quoted(f"{name}:{words.about}") for name, words in commands.items())
    cases = "\n".join(case(name, words) for name, words in commands.items())
    return ZSH.format(commands=described, cases=cases)


def bare(text: str) -> str:
    """Without what separates the parts of a specification for zsh."""
    return re.sub(r"[][:]", "", text)


def fish(commands: Mapping[str, Words]) -> str:
    """The script for fish."""
    lines = ["# ltdi completion fish | source"]
    for name, words in commands.items():
        start, on = "complete -c ltdi", f"-n '__fish_seen_subcommand_from {name}'"
        lines.append(f"{start} -f -n __fish_use_subcommand -a {name} -d {quoted(words.about)}")
        for option, about in words.options.items():
            kind = "-s" if re.fullmatch("-[a-z]", option) else "-l"
            value = " -r" if option in words.valued else ""
            lines.append(f"{start} {on} {kind} {option.lstrip('-')}{value} -d {quoted(about)}")
        lines += [f"{start} {on} -l {field.strip('-=')} -x" for field in words.fields]
        if words.choices:
            lines.append(f"{start} -f {on} -a {quoted(' '.join(words.choices))}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """In single quotes that all three shells read alike."""
    return "'" + text.replace("'", "’") + "'"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def script(shell: str, parsers: Mapping[str, tuple[ArgumentParser, bool]]) -> Sequence[str]:
    """The lines of a shell's script, for subcommand → (its parser, whether it takes overrides)."""
    words = {name: words_of(parser, overrides=overrides) for name, (parser, overrides) in parsers.items()}
    return SHELLS[shell](words).splitlines()
