"""A sentence and a few examples: of several generated adapters the best one on the examples is kept.

python examples/few_shot.py
"""

from collections.abc import Sequence

import ltdi_peft

EXAMPLES = (("cat", "CATS"), ("box", "BOXES"), ("city", "CITIES"), ("leaf", "LEAVES"))


def main(
    prompt: str = "Give the plural of the noun, in capital letters.",
    *,
    examples: Sequence[tuple[str, str]] = EXAMPLES,  # (input, answer)
    candidates: int = 8,
    generator: str = "runs/demo/generator",  # folder or Hub id
    out: str = "runs/demo/few_shot_adapter",
    seed: int = 0,
) -> None:
    """Candidates are made with seeds `seed`, `seed` + 1, …; the least mean loss on the examples wins."""
    model = ltdi_peft.generate_adapter(
        prompt, generator=generator, examples=examples, num_candidates=candidates, seed=seed
    )
    model.save_pretrained(out)
    print(f"written to {out}: the best of {candidates} by {len(examples)} examples")


if __name__ == "__main__":
    main()
