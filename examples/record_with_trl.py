"""Record a TRL fine-tune: one callback, and the run becomes a trajectory.

python examples/record_with_trl.py
"""

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import ltdi_peft

TASK = ltdi_peft.Task(
    "plural",
    prompts=["Give the plural of the noun.", "Write the noun as more than one of it."],
    train=[("cat", "cats"), ("box", "boxes"), ("city", "cities"), ("leaf", "leaves"), ("mouse", "mice")],
)


def as_rows(task: ltdi_peft.Task) -> list[dict[str, str]]:
    """The task prompt in the model's context, paraphrases in turn: the text that `ltdi collect` trains on."""
    prompts = [task.prompts[i % len(task.prompts)] for i in range(len(task.train))]
    pairs = zip(prompts, task.train, strict=True)
    return [{"prompt": f"{p}\nInput: {e.input}\nOutput:", "completion": f" {e.answer}"} for p, e in pairs]


def main(
    task: ltdi_peft.Task = TASK,
    *,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",  # Hub id or folder
    store: str = "runs/mine/trajectories",
    output: str = "runs/mine/trl",
    steps: int = 24,
    rank: int = 4,
    seed: int = 0,
    **more: object,  # any other field of SFTConfig
) -> None:
    """One LoRA on one task, with a snapshot at the end of every sixth of its steps."""
    recorder = ltdi_peft.TrajectoryRecorder(store, task=task, schedule=ltdi_peft.Schedule.equal_parts(6))
    trainer = SFTTrainer(
        model,
        args=SFTConfig(output, max_steps=steps, seed=seed, save_strategy="no", report_to="none", **more),
        train_dataset=Dataset.from_list(as_rows(task)),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]),
        callbacks=[recorder],
    )
    trainer.train()
    for row in ltdi_peft.TrajectoryStore(store).describe():
        print(row)


if __name__ == "__main__":
    main()
