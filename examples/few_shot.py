"""A sentence and a few examples: of 16 readings of the sentence the best one on the examples is kept.

python examples/few_shot.py
"""

from collections.abc import Sequence

import ltdi_peft
from ltdi_peft.provenance import provenance_of

EXAMPLES = (("cat", "CATS"), ("box", "BOXES"), ("city", "CITIES"), ("leaf", "LEAVES"))


def main(
    prompt: str = "Give the plural of the noun, in capital letters.",
    *,
    examples: Sequence[tuple[str, str]] = EXAMPLES,  # (input, answer)
    candidates: int = 16,
    generator: str | None = None,  # folder or Hub id; the package's own
    out: str = "runs/few_shot_adapter",
    seed: int = 0,
) -> None:
    """The least mean loss on the examples wins; what the sentence was taken for is printed."""
    model = ltdi_peft.generate_adapter(
        prompt, generator=generator, examples=examples, num_candidates=candidates, seed=seed
    )
    model.save_pretrained(out)
    about = provenance_of(model)
    read = f", read as {about.reading}" if about else ""
    print(f"written to {out}: the best of {candidates} by {len(examples)} examples{read}")


if __name__ == "__main__":
    main()
