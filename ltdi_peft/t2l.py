"""The T2L rival: a hypernetwork from prompt to adapter, trained on stored adapters or through the base model.

In: a bench with collected runs, conditions of the training tasks.  Out: a `T2LRival` and how it was made.
Idea: `reconstruction` learns the final adapters of the runs; `sft` knows only the size of their numbers and
takes the gradient of its tasks' own examples through the frozen base model. Either stands at its best on the
validation tasks and has the guidance trials that ours and ridge have. Made once, in `<output>/t2l_recon` and
`<output>/t2l_sft`.
Source: Text-to-LoRA, arXiv:2506.06105, from its description; our own code.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ltdi_peft.baselines import adapter_digest, tensor_digest
from ltdi_peft.batched import unstack_adapter
from ltdi_peft.collect import Bench
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.config import to_dict
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.guidance import SCALE_EXAMPLES, Accuracies, Guidance, guidance_accuracies
from ltdi_peft.hypernetwork import (
    Hypernetwork,
    MeanDifference,
    guided,
    mean_difference,
    parameter_count,
)
from ltdi_peft.multi_task import require_same_plan, validation_tasks
from ltdi_peft.prepare import TrainingSet
from ltdi_peft.spec import Adapter, require_same_spec
from ltdi_peft.store import Trajectory
from ltdi_peft.strict import one_of
from ltdi_peft.t2l_fit import fit_t2l, kept_state

FOLDERS = {"reconstruction": "t2l_recon", "sft": "t2l_sft"}  # mode → folder in `output`, and method
WEIGHTS_FILE, REPORT_FILE = "model.safetensors", "report.json"


@dataclass(frozen=True)
class T2LRival:
    """A trained hypernetwork, guided as a generator is: `mean` is what it adds for the mean training task."""

    network: Hypernetwork
    mean: MeanDifference
    guidance: Guidance = field(default_factory=Guidance)

    @torch.no_grad()
    def adapters(self, conditions: Float[Tensor, "prompt condition"]) -> list[Adapter]:
        """One a prompt, float32 on the CPU: start + mean_share · mean + scale · (predicted − mean)."""
        found = self.network(conditions.to(self.network.scale))
        stacked = self.network.factors(guided(found, self.mean, **vars(self.guidance)))
        return [unstack_adapter(stacked, index) for index in range(len(conditions))]

    def digest(self) -> str:
        """16 hex digits of all that its adapters depend on, but for spec and start."""
        weights = tensor_digest([*self.network.state_dict().values(), *self.mean.values()])
        return hashlib.sha256(f"{weights}{vars(self.guidance)}".encode()).hexdigest()[:16]


def train_t2l(
    bench: Bench,
    data: TrainingSet,
    runs: Sequence[Trajectory],
    encoder: PromptEncoder,
    *,
    mode: str,
    progress: bool = True,
) -> tuple[T2LRival, dict[str, Any]]:
    """The rival at its best validation accuracy and guidance, and the trials behind both; made once.

    mode: "reconstruction" or "sft". Raises ValueError for another mode, for runs that do not share one start,
    and when the folder holds a rival that was made by another plan.
    """
    one_of("mode of T2L", mode, tuple(FOLDERS))
    require_one_start(runs)
    require_same_spec(bench.spec, runs[0].spec, str(runs[0].path))
    folder, plan = bench.recipe.folder / FOLDERS[mode], t2l_plan(bench, data, runs, mode)
    network = make_network(bench, data, runs[0].start())
    if not (folder / REPORT_FILE).is_file():
        report = fit_t2l(bench, network, data, runs, encoder, mode=mode, progress=progress)
        rival, tried = with_best_guidance(
            T2LRival(network, mean_difference(network, data.conditions)), bench, encoder
        )
        report |= {"guidance": dict(vars(rival.guidance)), "validation_accuracy": tried}
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS_FILE, save(kept_state(network)))
        # Last: a folder with a report is whole.
        replace_file(folder / REPORT_FILE, json_bytes({"plan": plan, **report}))
    report = read_json(folder / REPORT_FILE)
    require_same_plan(folder, report["plan"], plan)
    load_weights(network, folder / WEIGHTS_FILE)
    rival = T2LRival(network, mean_difference(network, data.conditions), Guidance(**report["guidance"]))
    steps = {"steps": vars(bench.recipe.evaluate.t2l)[mode].steps, "parameters": parameter_count(network)}
    about = vars(rival.guidance) | steps | plan["seen"]
    return rival, about | {key: report[key] for key in ("curve", "losses", "validation_accuracy")}


# ---- what it is made of


def require_one_start(runs: Sequence[Trajectory]) -> None:
    """ValueError that names the odd run: a difference from the start needs one start, in any gauge."""
    for run in runs[1:]:
        if run.start_path.name != runs[0].start_path.name:
            raise ValueError(
                f"{run.path} starts from {run.start_path.name}, {runs[0].path} from "
                f"{runs[0].start_path.name}: T2L needs runs of one start. Leave it out of evaluate.methods."
            )


def t2l_plan(bench: Bench, data: TrainingSet, runs: Sequence[Trajectory], mode: str) -> dict[str, Any]:
    """All that the rival depends on, as JSON. `seen` counts the examples of sft; reconstruction sees none.

    `rule` is the number of steps after which sft has seen as many as all single runs together.
    """
    recipe, config, single = bench.recipe, bench.recipe.evaluate.t2l, bench.recipe.collect.single
    # The losses, all their digits, tell two runs of one name apart.
    made = [(run.run_id, [(s.step, s.loss) for s in run.snapshots]) for run in runs]
    plan = {
        "mode": mode,
        "seed": recipe.seed,
        "gauge": recipe.collect.gauge,
        "start": adapter_digest(runs[0].start()),
        "runs": hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16],
        "conditions": tensor_digest([data.conditions]),
        "tasks": list(data.names),
        "validation": [task.name for task in validation_tasks(bench)],
    }
    table = to_dict(config)
    if mode == "reconstruction":
        return plan | {"config": without(table, "sft", "examples"), "seen": {}}
    step = min(config.sft.tasks, len(data.names)) * config.examples
    rule = math.ceil(len(data.names) * recipe.collect.seeds * single.steps * single.batch_size / step)
    seen = {"examples": config.sft.steps * step, "rule": rule, "shortened": config.sft.steps < rule}
    rows = {"rows": recipe.collect.rows, "prompt_in_context": single.prompt_in_context}
    return plan | {"config": without(table, "reconstruction"), "seen": seen} | rows


def without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy that lacks these keys."""
    return {key: value for key, value in table.items() if key not in keys}


def make_network(bench: Bench, data: TrainingSet, start: Adapter) -> Hypernetwork:
    """Untrained, its weights drawn from the recipe's seed."""
    recipe, config = bench.recipe, bench.recipe.evaluate.t2l
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Hypernetwork(
            bench.spec,
            start,
            condition_width=data.conditions.shape[-1],
            hidden=config.hidden,
            layers=config.layers,
            train_a=recipe.collect.gauge != "shared_a",
        )
    return network.to(bench.adapted.device)


def load_weights(network: Hypernetwork, file: Path) -> None:
    """Weights and units into `network`; ValueError for a damaged file or one of another network."""
    try:
        network.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is missing, truncated or of another network ({error}). Remove its folder to train again."
        ) from error


def with_best_guidance(
    rival: T2LRival, bench: Bench, encoder: PromptEncoder, examples: int = SCALE_EXAMPLES
) -> tuple[T2LRival, Accuracies]:
    """The rival with its best guidance on the validation tasks, by the trials of ours and of ridge."""

    def predicted(prompt: Sequence[str], tried: Guidance) -> Adapter:
        return replace(rival, guidance=tried).adapters(encoder(prompt))[0]

    tasks = validation_tasks(bench)
    found = guidance_accuracies(bench, tasks, predicted, bench.recipe.collect.gauge, examples)
    return replace(rival, guidance=found.best()), found.table()
