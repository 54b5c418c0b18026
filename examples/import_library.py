"""Bring adapters that exist into a store, and write down the suite that a recipe needs to train on them.

python examples/import_library.py
"""

import json
from pathlib import Path

import ltdi_peft


def main(
    manifest: str = "adapters.jsonl",  # lines {"path": …, "task": …, "prompts": […]}; docs/import.md
    *,
    store: str = "runs/library/trajectories",
    suite: str = "tasks.jsonl",
    splits: str = "splits.json",
) -> None:
    """Import what fits, say why the rest does not, and put every imported task in the training split."""
    for row in ltdi_peft.import_adapters(manifest, store):
        print(f"{row['status']:14} {row['path']}  {row['reason']}")

    runs = ltdi_peft.TrajectoryStore(store, create=False).trajectories()
    tasks = {run.task.name: run.task for run in runs}
    Path(suite).write_text("".join(json.dumps(task.to_dict()) + "\n" for task in tasks.values()))
    ltdi_peft.TaskSuite("library", tasks, {"train": tuple(tasks)}).save_splits(splits)
    print(f"{len(runs)} runs of {len(tasks)} tasks in {store}")


if __name__ == "__main__":
    main()
