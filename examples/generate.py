"""An adapter from a sentence, as an ordinary PEFT adapter; `make demo` trains the generator that this reads.

python examples/generate.py
"""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import ltdi_peft


def answer(model: torch.nn.Module, tokenizer: object, text: str) -> str:
    """Greedy, at most 12 tokens."""
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(
    prompt: str = "Give the plural of the noun, in capital letters.",
    *,
    question: str = "cat",
    generator: str = "runs/demo/generator",  # folder or Hub id
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",  # the generator's own: Hub id or folder
    out: str = "runs/demo/adapter",
    seed: int = 0,
) -> None:
    """Generate, save, load again with peft alone, and answer one question with and without the adapter."""
    model = ltdi_peft.generate_adapter(prompt, generator=generator, base_model=base_model, seed=seed)
    model.save_pretrained(out)

    # From here on nothing needs ltdi_peft.
    base = AutoModelForCausalLM.from_pretrained(base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = PeftModel.from_pretrained(base, out)
    text = f"{prompt}\nInput: {question}\nOutput:"
    print("with the adapter:   ", answer(model, tokenizer, text))
    with model.disable_adapter():
        print("without the adapter:", answer(model, tokenizer, text))


if __name__ == "__main__":
    main()
