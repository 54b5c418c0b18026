"""A generated adapter in lm-evaluation-harness: tasks of the built-in suite, base model against adapter.

    pip install 'lm-eval[hf]'
    python benchmarks/lm_eval_check.py --generator runs/demo/generator     2 minutes of one CPU core
    Expect: nouns/plural/plain base 0.000, adapter 0.969; the other two tasks 0.000 and 0.000, as in the
    package's own scorer (32 examples, the generator that `make demo` trained).

Writes each task as the harness wants it (a YAML file and a JSONL file), generates the adapter from a prompt
that no training task has, and runs the harness's own command, which it prints:

    lm_eval run --model hf --model_args pretrained=BASE,peft=FOLDER --tasks NAME --include_path TASKS
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from ltdi_peft.base import locate
from ltdi_peft.batched import example_text
from ltdi_peft.generator import load_generator
from ltdi_peft.task import Task, load_suite

TASKS = ("nouns/plural/plain", "verbs/third/plain", "animals/moves/brackets")  # unseen in recipes/demo.yaml
LONGEST = 12  # tokens of an answer


def write_task(task: Task, prompt: str, folder: Path, examples: int) -> str:
    """The task's first evaluation examples, `prompt` in context, for the harness; returns its name there."""
    name = "ltdi_" + task.name.replace("/", "_")
    rows = [{"text": example_text(prompt, e.input), "answer": e.answer} for e in task.evaluation[:examples]]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": LONGEST, "do_sample": False},
        "filter_list": [
            {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    return name


def harness(
    base: str, adapter: str | Path | None, names: Sequence[str], folder: Path, out: Path, *, batch: int = 1
) -> dict[str, float]:
    """Run the harness in a process of its own; exact match by task. Its samples lie in `out`."""
    model = f"pretrained={base},dtype=float32" + (f",peft={adapter}" if adapter else "")
    words = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--tasks", ",".join(names)]
    words += ["--include_path", str(folder), "--device", "cpu", "--output_path", str(out), "--log_samples"]
    words += ["--batch_size", str(batch)]
    print("python", *words, flush=True)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with {done.returncode}: {done.stderr[-2000:]}")
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {name: results[name]["exact_match,strip"] for name in names}


def main() -> None:
    """Print one line a task: exact match without and with its generated adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of the built-in suite")
    parser.add_argument("--examples", type=int, default=32, help="of each task")
    arguments = parser.parse_args()
    generator, suite = load_generator(arguments.generator), load_suite("builtin")
    base = locate(generator.config.base_model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tasks = [suite[name] for name in arguments.tasks]
        prompts = [task.held_out_prompts[0] for task in tasks]
        pairs = zip(tasks, prompts, strict=True)
        names = [write_task(task, prompt, folder, arguments.examples) for task, prompt in pairs]
        plain = harness(base, None, names, folder, folder / "base", batch=16)
        for name, made in zip(names, generator.generate(prompts), strict=True):
            made.save_pretrained(folder / "adapters" / name)
            found = harness(base, folder / "adapters" / name, [name], folder, folder / name, batch=16)
            print(f"{name}: base {plain[name]:.3f}, generated adapter {found[name]:.3f}", flush=True)


if __name__ == "__main__":
    main()
