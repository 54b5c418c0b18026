"""Seconds and operations: of generating an adapter, of fine-tuning one, and what preparation costs in these.

In: a generator, scored tasks, the seconds of the stages.  Out: a result's section `cost`.
Idea: measured by the same program that scores, so a result needs no number from elsewhere. The speed-up is
EVALUATION's: seconds to 95 % of the oracle's gain over seconds for condition, chain and decode.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ltdi_peft.baselines import seconds_to_fine_tune
from ltdi_peft.collect import Bench
from ltdi_peft.generator import Generator
from ltdi_peft.spec import Adapter
from ltdi_peft.summary import TaskScores


def seconds_to_generate(
    generator: Generator, bench: Bench, repeats: int = 10, batch: int = 32
) -> dict[str, float]:
    """Median seconds an adapter for condition, chain and decode: one prompt at a time, `batch` together."""
    prompts = [prompt for task in bench.suite.tasks.values() for prompt in task.held_out_prompts]
    many = [prompts[i % len(prompts)] for i in range(batch)]

    def seconds(wanted: list[str]) -> float:
        began = time.perf_counter()
        generator.generate(wanted, base=bench.base)
        return (time.perf_counter() - began) / len(wanted)

    seconds(many)  # a warm-up: the encoder is loaded, buffers are made
    return {
        "batch_1": statistics.median(seconds([many[i % batch]]) for i in range(repeats)),
        f"batch_{batch}": statistics.median(seconds(many) for _ in range(3)),
    }


def fine_tunes(
    bench: Bench, start: Adapter, scores: Sequence[TaskScores], count: int = 5
) -> list[dict[str, Any]]:
    """Fine-tunes from `start` of tasks on which there is a gain to reach, spread over all such tasks."""
    gains = [one for one in scores if one.mean("prompt", "oracle") > one.mean("prompt", "base")]
    found = []
    for one in gains[:: max(1, len(gains) // count)][:count]:
        base, oracle = one.mean("prompt", "base"), one.mean("prompt", "oracle")
        task = bench.suite[one.task]
        run = seconds_to_fine_tune(bench, task, start, base=base, oracle=oracle, examples=one.examples)
        found.append(asdict(run))
    return found


def costs(measured: dict[str, Any], stages: dict[str, float]) -> dict[str, Any]:
    """Stages, generation, fine-tuning, speed-up, operations, and how many tasks it takes to break even."""
    generate = {key: value for key, value in measured.items() if key not in ("runs", "flops")}
    runs = measured["runs"]
    tune = statistics.median(run["seconds"] for run in runs) if runs else None
    saved = tune - generate["batch_1"] if tune is not None else 0.0
    return {
        "stages": stages,
        "generate": {"seconds": generate["batch_1"], **generate},
        "fine_tune": {
            "seconds": tune,
            "steps": statistics.median(run["steps"] for run in runs) if runs else None,
            "all_reached": all(run["reached"] for run in runs),
            "runs": runs,
        },
        "speed_up": {key: tune / value for key, value in generate.items()} if tune is not None else {},
        "break_even_tasks": sum(stages.values()) / saved if stages and saved > 0 else None,
        "flops": measured["flops"],
    }
