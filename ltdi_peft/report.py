"""A result as Markdown.

In: the result of `evaluate`, or its JSON file.
Out: the table that the command line prints, and the whole report.
Idea: the text holds nothing that the JSON does not.
"""

from collections.abc import Mapping
from typing import Any

from ltdi_peft.summary import UNSEEN
from ltdi_peft.tables import lines_of, shown, shown_ends
from ltdi_peft.targets import targets_table


def table(result: dict[str, Any]) -> str:
    """The methods and the prompt control of a result, as Markdown: what the command line prints."""
    splits = [split for split in UNSEEN if split in result["methods"]["base"]]
    head = [
        "method",
        *(title for split in splits for title in titles(split, result["methods"]["base"][split])),
    ]
    rows = [
        [f"`{method}`", *(cell for split in splits for cell in cells(found[split]))]
        for method, found in result["methods"].items()
    ]
    return "".join([lines_of(head, rows), *(f"\n{line}\n" for line in control_lines(result))])


def titles(split: str, about: dict[str, Any]) -> list[str]:
    """The columns of a split; chance-corrected accuracy where examples have choices."""
    over = ["over chance"] if "accuracy_over_chance" in about else []
    first = f"{split.replace('_', ' ')} ({about['tasks']}): accuracy"
    return [first, *over, "G [95 %]", "without prompt", *over, "G [95 %]"]


def cells(about: dict[str, Any]) -> list[str]:
    """A method's figures on a split, under `titles`."""
    row = []
    for suffix in ("", "_no_prompt"):
        row.append(shown(about[f"accuracy{suffix}"]))
        if "accuracy_over_chance" in about:
            row.append(shown(about[f"accuracy_over_chance{suffix}"]))
        row.append(shown(about[f"G{suffix}"], about[f"ci{suffix}"]))
    return row


def control_lines(result: dict[str, Any]) -> list[str]:
    """Prompt control and power, a line a split."""
    lines = []
    for split, row in result["controls"]["prompt"].items():
        verdict = (
            "reads its prompt" if row["reads_its_prompt"] else "**does not demonstrably read its prompt**"
        )
        parts = [
            f"{name}: right {shown(of['right'])}, wrong {shown(of['wrong'])}, "
            f"difference in {shown_ends(of['ci'])}"
            for name, of in (("prompt in context", row), ("without", row["no_prompt"]))
        ]
        lines.append(f"{split.replace('_', ' ')}: `ours` {verdict} (G, {'; '.join(parts)}).")
    for split, row in result["power"].items():
        lines.append(
            f"Power, {split.replace('_', ' ')}: {row['tasks']} tasks can show (5 %, power 80 %) a difference "
            f"from `{row['against']}` of {shown(row['G'])} in G, {shown(row['accuracy'])} in accuracy."
        )
    return lines


def paired_table(result: dict[str, Any]) -> str:
    """Paired differences of accuracy and gain."""
    rows = []
    for name, splits in result["paired"].items():
        for split, with_prompt in splits.items():
            row = [f"`{name}`", split.replace("_", " ")]
            for of in (with_prompt, with_prompt["no_prompt"]):
                row += [shown(of["accuracy"], of["ci"], "+"), shown(of["G"], of["ci_G"], "+")]
            rows.append(row)
    return lines_of(
        ["difference", "split", "accuracy [95 %]", "G [95 %]", "without prompt", "G [95 %]"], rows
    )


def few_shot_table(rungs: dict[str, Any]) -> str:
    """The few-shot section of a result: accuracy of each road by number of examples, in both contexts."""
    methods = list(next(iter(rungs.values())))
    rows = [
        [count, *(f"{shown(of[m]['accuracy'])} · {shown(of[m]['accuracy_no_prompt'])}" for m in methods)]
        for count, of in rungs.items()
    ]
    tasks = len(rungs[next(iter(rungs))][methods[0]]["per_task"])
    about = f"{tasks} unseen tasks; accuracy with the prompt in context · without it."
    head = ["examples", *(f"`{method}`" for method in methods)]
    parts = [f"## A few examples\n\n{about}\n\n{lines_of(head, rows)}"]
    if all("G" in row for of in rungs.values() for row in of.values()):
        parts += [few_shot_gains(rungs)]
    return "\n".join(parts)


def few_shot_gains(rungs: dict[str, Any]) -> str:
    """G of each road, and its paired difference from a LoRA trained on the same examples."""
    rows = [
        [
            count,
            f"`{method}`",
            shown(row["G"], row["ci"]),
            shown(row["over_lora"], row["over_lora_ci"], "+", 3),
        ]
        for count, of in rungs.items()
        for method, row in of.items()
    ]
    head = ["examples", "method", "G [95 %]", "accuracy over `lora` [95 %]"]
    return f"Prompt in context:\n\n{lines_of(head, rows)}"


def flat(table_: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names, longer lists left out: they are in the JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in table_.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            text = f"{value:.4g}" if isinstance(value, float) else ("–" if value is None else str(value))
            rows.append((f"{prefix}{key}", text))
    return rows


def figures(title: str, values: dict[str, Any]) -> str:
    """A section of plain figures."""
    return f"## {title}\n\n{lines_of(['figure', 'value'], flat(values))}"


def saw_line(method: str, rival: dict[str, Any]) -> str:
    """How many examples a LoRA for all tasks was trained on."""
    short = " It was **shortened** by evaluate.multi_task_steps." if rival.get("shortened") else ""
    return f"`{method}` saw {rival['examples']} examples.{short}\n"


def pictures(recipe: str, drawn: Mapping[str, str]) -> str:
    """The figures in the folder beside the report, file name → title."""
    links = [f"![{title}]({recipe}/{file})\n" for file, title in drawn.items()]
    return "\n".join(["## Figures\n", *links])


def markdown(result: dict[str, Any], drawn: Mapping[str, str] | None = None) -> str:
    """The whole report of a result; `drawn`: file name → title of its figures."""
    head = {key: result[key] for key in ("date", "machine", "commit", "base_model", "suite", "seeds")}
    about = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in head.items())
    notes = [saw_line(name, rival) for name, rival in result["trials"].items() if "examples" in rival]
    return "\n".join(
        [
            f"# {result['recipe']}\n\n{about}\n",
            "Made by `ltdi evaluate`. G is the recovered gain Σ(method − base)/Σ(oracle − base); intervals "
            "are 95 %, bootstrapped over tasks (unseen domains: over domains).\n",
            table(result),
            "".join(notes),
            *([pictures(result["recipe"], drawn)] if drawn else []),
            f"## Targets\n\n{targets_table(result)}",
            *([few_shot_table(result["few_shot"])] if "few_shot" in result else []),
            f"## Paired differences\n\n{paired_table(result)}",
            figures("Memorisation (ΔW distances, medians)", result["controls"]["memorisation"]),
            figures("Cost (seconds)", result["cost"]),
            figures("Trials", result["trials"]),
        ]
    )
