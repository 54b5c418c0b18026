"""Every example runs, on a tiny model saved by the test; and so does the program of the README.

One chain: recorded runs → a generator trained on them → adapters that peft alone loads.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from scripts import script
from test_readme import README, block
from tiny_bench import SPLITS, tiny_suite, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task
from ltdi_peft.train import train_generator

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A generator small enough for a test, on what the examples recorded.
SMALL = {
    "condition": {"encoder": "base"},
    "diffusion": {"k": 2, "steps": 4},
    "denoiser": {"hidden": 8, "layers": 1, "heads": 2},
    "train": {"steps": 2, "batch_size": 2, "log_with": None},
}

pytestmark = [
    # trl 1.16 sets what transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    # Two steps of training on three tasks: norms outside the training range are clamped, and said to be.
    pytest.mark.filterwarnings("ignore:‖ΔW‖ of:UserWarning"),
]


def example(name):
    """The module of an example, as `python examples/NAME.py` would load it."""
    return script(f"examples/{name}.py")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A 2-layer Llama, hidden 32, with a word tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **shape, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, base_folder):
    """Runs of the flat loop on three training tasks of the tiny suite."""
    store = tmp_path_factory.mktemp("mine") / "trajectories"
    loop = example("flat_loop")
    for task in tiny_suite().split("train")[:3]:
        loop.main(task, model=str(base_folder), store=str(store), steps=6)
    return store


def write_recipe(folder, base_folder, extra_tasks=(), **changes):
    """tasks.jsonl, its splits, and the README's recipe with a tiny model and network."""
    suite = tiny_suite()
    tasks = [*suite.tasks.values(), *extra_tasks]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task.to_dict()) + "\n" for task in tasks))
    splits = {**SPLITS, "train": [*SPLITS["train"], *(task.name for task in extra_tasks)]}
    (folder / "splits.json").write_text(json.dumps({"format_version": 1, "splits": splits}))
    recipe = yaml.safe_load(block("yaml")) | SMALL | {"base": {"model": str(base_folder)}} | changes
    recipe["suite"] = {"source": str(folder / "tasks.jsonl"), "split_file": str(folder / "splits.json")}
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def generator_folder(recorded, base_folder):
    recipe = write_recipe(recorded.parent, base_folder, output=str(recorded.parent))
    train_generator(recipe, progress=False)
    return recorded.parent / "generator"


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == {
        "few_shot", "flat_loop", "generate", "import_library", "record_with_trl",
    }  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}" in text


def test_flat_loop_records_every_step_of_the_schedule(recorded):
    runs = TrajectoryStore(recorded, create=False).trajectories()
    assert {run.task.name for run in runs} == set(SPLITS["train"][:3])
    assert all([s.step for s in run.snapshots] == [1, 2, 3, 4, 5, 6] for run in runs)
    first, *others = runs
    # The example's promise: all runs start from the same adapter.
    assert {run.start_path for run in others} == {first.start_path}


@pytest.mark.slow
def test_record_with_trl(tmp_path, base_folder, capsys):
    example("record_with_trl").main(
        tiny_suite().tasks["a/first/plain"],
        model=str(base_folder),
        store=str(tmp_path / "store"),
        output=str(tmp_path / "trl"),
        steps=6,
        use_cpu=True,
        bf16=False,
    )
    (run,) = TrajectoryStore(tmp_path / "store").trajectories()
    assert [s.step for s in run.snapshots] == [1, 2, 3, 4, 5, 6]
    assert "'status': 'finished'" in capsys.readouterr().out


def test_trl_rows_are_what_collect_trains_on():
    from ltdi_peft.batched import make_row

    words, task = tokenizer(), tiny_suite().tasks["a/first/plain"]
    rows = example("record_with_trl").as_rows(task)
    for i, (row, one) in enumerate(zip(rows, task.train, strict=True)):
        made = make_row(words, task.prompts[i % len(task.prompts)], one)
        assert words(row["prompt"])["input_ids"] == list(made.ids[: made.answer])
        assert words(row["completion"])["input_ids"] == list(made.ids[made.answer : -1])


def test_generate(tmp_path, base_folder, generator_folder, capsys):
    places = {"generator": str(generator_folder), "base_model": str(base_folder)}
    example("generate").main("say a third twice", question="w1 w2 w3", out=str(tmp_path / "out"), **places)
    assert "with the adapter" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_few_shot(tmp_path, base_folder, generator_folder, capsys):
    out = tmp_path / "out"
    pairs = [(e.input, e.answer) for e in tiny_suite().tasks["a/third/plain"].train[:2]]
    example("few_shot").main(
        "say a third", examples=pairs, candidates=2, generator=str(generator_folder), out=str(out)
    )
    assert "the best of 2 by 2 examples" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), out)
    assert any(w.abs().sum() > 0 for name, w in model.named_parameters() if "lora_B" in name)


def test_missing_generator_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no runs/demo/generator
    with pytest.raises((ValueError, OSError), match="runs/demo/generator"):
        example("generate").main()


@pytest.mark.slow
def test_program_of_the_readme(tmp_path, recorded, base_folder, monkeypatch):
    """As it stands, but for the name of the base model, and on a CPU."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "runs/mine/trajectories")
    write_recipe(tmp_path, base_folder, [Task("polite", ["Rewrite politely.", "Say it in a kind way."])])
    program = block("python").replace(SMOLLM2, str(base_folder))
    on_cpu = r"\g<0>, use_cpu=True, bf16=False, report_to='none'"
    program = re.sub(r'SFTConfig\("runs/mine/trl"', on_cpu, program)
    assert "use_cpu" in program
    assert SMOLLM2 in README
    rows = [{"prompt": "w1 w2", "completion": "w3"}] * 16
    exec(compile(program, "README.md", "exec"), {"rows": Dataset.from_list(rows)})
    store = TrajectoryStore(tmp_path / "runs/mine/trajectories")
    assert "polite" in {run.task.name for run in store.trajectories()}
    assert (tmp_path / "french" / "adapter_model.safetensors").is_file()
