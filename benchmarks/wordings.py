"""What a new wording of a known task costs: to the encoder, to the model that reads it, to a generator.

    python benchmarks/wordings.py recipes/two_purposes.yaml [--generator FOLDER] [--examples 24]

Nothing is collected or trained. First table: of the built-in questions' held-out wordings, the share that a
ridge classifier on the encoder's conditions, fitted on so many training wordings of each, gives to the right
question: among all, and among those of the question's own domain; a recipe that tunes its encoder is trained
first. Second: accuracy on the recipe's validation
tasks, of the generator and of the origin that it adds to, with a training or a held-out wording in the
model's context (or none), and a training or a held-out wording given to the generator.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch.nn import functional
from tqdm import tqdm

from ltdi_peft.batched import stack_adapters
from ltdi_peft.centre import fit_ridge
from ltdi_peft.collect import Bench, open_bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import load_recipe
from ltdi_peft.generate import find_generator
from ltdi_peft.generator import Generator
from ltdi_peft.score import make_sheet, score
from ltdi_peft.suite import DOMAINS, UNSEEN_DOMAINS
from ltdi_peft.suite.wordings import worded
from ltdi_peft.tables import lines_of
from ltdi_peft.task import Task
from ltdi_peft.train import recipe_encoder

COUNTS = (
    2,
    4,
    6,
    8,
    10,
    20,
    30,
)  # the first 10 are those beside the rules, the others of suite/wordings.json
STRENGTHS = (1e-3, 1e-2)  # of the classifier; the better one is shown


def recognised(encoder: PromptEncoder, count: int) -> tuple[float, float]:
    """Share of held-out wordings given to the right question: among all, and within its domain."""
    questions = [(d.name, q) for d in DOMAINS if d.name not in UNSEEN_DOMAINS for q in d.questions]
    asks = [worded(q.ask, "questions", f"{domain}/{q.name}", "many") for domain, q in questions]
    asked = [(i, text) for i, own in enumerate(asks) for text in own[:count]]
    held = [(i, text) for i, (_, q) in enumerate(questions) for text in q.held_out]
    x, new = (encoder([text for _, text in rows]) for rows in (asked, held))
    label, wanted = (torch.tensor([i for i, _ in rows]) for rows in (asked, held))
    domain = torch.tensor([[a == b for b, _ in questions] for a, _ in questions])
    found = []
    for strength in STRENGTHS:
        ridge = fit_ridge(x, functional.one_hot(label, len(questions)), strength)
        says = ridge(new)
        own = says.masked_fill(~domain[wanted], -torch.inf)
        found.append(tuple((s.argmax(1) == wanted).double().mean().item() for s in (says, own)))
    return max(found)


def accuracies(bench: Bench, generator: Generator, task: Task, examples: int) -> list[list[float]]:
    """For a training wording, a held-out one and none in context: origin, and ours given either wording."""
    wordings = (task.prompts[:1], task.held_out_prompts[:1])
    origin = generator.codec.nothing()
    rows = []
    for context in (*wordings, None):
        asked = {"base": bench.base, "prompt_in_context": context is not None}
        made = [generator.generate(list(wording), **asked)[0].adapter for wording in wordings]
        sheet = make_sheet(bench.adapted, task.evaluation[:examples], context)
        stacked = stack_adapters([origin, *made], bench.adapted.device)
        rows.append(score(bench.adapted, sheet, stacked).accuracy.tolist())
    return rows


def accuracy_table(found: Sequence[list[list[float]]]) -> str:
    """Means over the tasks."""
    head = ["in context", "origin", "ours, given a training wording", "ours, given a held-out wording"]
    rows = []
    for place, name in enumerate(("a training wording", "a held-out wording", "no prompt")):
        columns = zip(*(one[place] for one in found), strict=True)
        rows.append([name, *(f"{statistics.fmean(column):.3f}" for column in columns)])
    return lines_of(head, rows)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--generator", help="a folder; the package's own by default")
    parser.add_argument("--examples", type=int, default=24)
    known, overrides = parser.parse_known_args()
    bench = open_bench(load_recipe(known.recipe, overrides))
    encoder = recipe_encoder(bench)
    rows = [[str(count), *(f"{share:.2f}" for share in recognised(encoder, count))] for count in COUNTS]
    print(lines_of(["training wordings of a question", "right, of all", "right, in its domain"], rows))
    generator = find_generator(known.generator)
    tasks = tqdm(bench.suite.split("validation"), unit="task")
    print(accuracy_table([accuracies(bench, generator, task, known.examples) for task in tasks]))


if __name__ == "__main__":
    main()
