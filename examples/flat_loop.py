"""Record a plain PyTorch loop, without a trainer: what `record` needs is one call after every optimiser step.

python examples/flat_loop.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ltdi_peft

TASK = ltdi_peft.Task(
    "plural",
    prompts=["Give the plural of the noun.", "Write the noun as more than one of it."],
    train=[("cat", "cats"), ("box", "boxes"), ("city", "cities"), ("leaf", "leaves"), ("mouse", "mice")],
)


def main(
    task: ltdi_peft.Task = TASK,
    *,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",  # Hub id or folder
    store: str = "runs/mine/trajectories",
    steps: int = 24,
    learning_rate: float = 4e-3,
    rank: int = 4,
    seed: int = 0,  # of the order of examples
) -> None:
    """One LoRA on one task, one example a step."""
    # Setup
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)  # not `seed`: A is drawn here, and all runs had best start from one A
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    optimizer = torch.optim.AdamW([w for w in network.parameters() if w.requires_grad], lr=learning_rate)
    rng = torch.Generator().manual_seed(seed)

    # Train
    with ltdi_peft.record(network, store, task, total_steps=steps, seed=seed) as run:
        for step in range(steps):
            example = task.train[int(torch.randint(len(task.train), (1,), generator=rng))]
            prompt = task.prompts[step % len(task.prompts)]
            question = tokenizer(f"{prompt}\nInput: {example.input}\nOutput:")["input_ids"]
            answer = [*tokenizer(f" {example.answer}")["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([question + answer])
            labels = torch.tensor([[-100] * len(question) + answer])  # -100: no loss on the question
            loss = network(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss, learning_rate=learning_rate)
    print(f"{run.run_id}: {run.steps} steps, last loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
