"""A tiny base model, its suite and a recipe as files, so that programs in other processes can use them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from tiny_bench import tiny_bench, tiny_recipe, tiny_suite

from ltdi_peft.config import Recipe, build, to_dict

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class World:
    """`recipe` writes to `folder`/run; its base model is the folder `base`, its suite `tasks.jsonl`."""

    folder: Path
    recipe: Recipe

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def recipe_file(self, folder: Path, **sections) -> Path:
        """A YAML file of the recipe with other `output` and other fields in these sections."""
        table = to_dict(self.changed(folder, **sections))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(table))
        return file

    def changed(self, folder: Path, **sections) -> Recipe:
        """The recipe with `output` = `folder` and other fields in these sections."""
        table = {**to_dict(self.recipe), "output": str(folder)}
        for name, fields in sections.items():
            table[name] = {**table[name], **fields}
        return build(Recipe, table, "test")


def make_world(folder: Path) -> World:
    """Save the base model and the suite of `tiny_bench`."""
    recipe = tiny_recipe(folder / "run")
    bench = tiny_bench(recipe)
    bench.base.model.save_pretrained(folder / "base")
    bench.base.tokenizer.save_pretrained(folder / "base")
    suite = tiny_suite()
    lines = [json.dumps(task.to_dict()) for task in suite.tasks.values()]
    (folder / "tasks.jsonl").write_text("\n".join(lines))
    suite.save_splits(folder / "splits.json")
    return World(
        folder,
        replace(
            recipe,
            base=replace(recipe.base, model=str(folder / "base"), dtype="float32"),
            suite=replace(
                recipe.suite, source=str(folder / "tasks.jsonl"), split_file=str(folder / "splits.json")
            ),
            train=replace(recipe.train, steps=8, batch_size=8, log_every=1, checkpoint_every=4),
        ),
    )


def run(*command: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program of this environment, on one thread, its warnings not errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
