"""Seconds and memory of collect, train and evaluate.

In: the shapes of a recipe, the speed of this machine.  Out: seconds and bytes a stage.
Idea: each stage is counted in tokens through lower layers, training and scoring, as its code walks through
them; what is not such a token (codec, conditions, generating) is counted in products and bytes read.
Source of the constants: runs on two cores (Xeon with AMX, PyTorch 2.13), said at each. recipes/demo.yaml took
238 s to collect, 62 to train, 253 to evaluate; recipes/ci.yaml 56, 22 and 100; recipes/smollm2_builtin.yaml
10 minutes to train, of which 5 were a slowness in encoding that is gone.
"""

import math
from dataclasses import dataclass, replace

from ltdi_peft.collect import HELD_OUT
from ltdi_peft.config import FitConfig, TaskLossConfig
from ltdi_peft.evaluate import MULTI_TASK, chosen_methods
from ltdi_peft.few_shot import ORIGINS, RATES
from ltdi_peft.guidance import GUIDANCE, MEAN_SHARES, SCALE_EXAMPLES
from ltdi_peft.multi_task import EVERY, VALIDATION_EXAMPLES, WIDER, start_steps
from ltdi_peft.shapes import Shapes
from ltdi_peft.speed import Line, Speed
from ltdi_peft.summary import UNSEEN
from ltdi_peft.t2l import FOLDERS
from ltdi_peft.task import Task
from ltdi_peft.variants import TASK_LOSS, VARIANTS

# Share of the work that more threads take part in: demo's collect takes 1.7 times as long on one as on two.
PARALLEL = 0.82
LOADING = 6.0  # seconds to load the base model and what goes with it; 540 MB of float32 here
FILE_RATE = 3e8  # bytes a second of many small files, written or read, checked for NaN on the way
MEMORY_RATE = 1e10  # bytes a second that a product with one vector reads, on one core
ENCODER_LAYERS = 6  # of MiniLM
ENCODER_FLOP = 2 * 10.6e6  # MiniLM a token: its layers without the embeddings
SITE_SECONDS = 2e-4  # one site of one adapter into the codec's coordinates, beside the products
GATE_EXAMPLES = 48  # prepare.round_trip_gate


@dataclass(frozen=True)
class Forecast:
    """What the stages are counted with."""

    shapes: Shapes
    speed: Speed
    threads: int
    weights: int  # numbers of the generator's network
    bases: int  # numbers of the codec's bases
    width: int  # numbers a token

    @property
    def cut(self) -> int:
        """Frozen lower layers that run once a row."""
        return self.shapes.cut if self.speed.cut else 0

    def through(self, line: Line, tokens: int | float) -> float:
        """Seconds of tokens through the layers that are not kept."""
        return line.seconds(tokens, self.shapes.layers - self.cut)

    def pool(self, task: Task, rows: int, plain: bool = True) -> float:
        """Tokens of a task's training rows, every second also without the prompt."""
        count, lengths = min(rows, len(task.train)), self.shapes.rows
        return count * lengths.prompted + (math.ceil(count / 2) * lengths.plain if plain else 0)

    def lower(self, tokens: int | float) -> float:
        """Seconds of tokens through the frozen layers; the first adapted one runs with them."""
        return self.speed.lower.seconds(tokens, self.cut + 1) if self.cut else 0.0

    def fit(self, config: FitConfig, adapters: int | float = 1, steps: int | None = None) -> float:
        """Seconds of gradient steps on so many adapters."""
        rows = (config.steps if steps is None else steps) * config.batch_size * adapters
        tokens = rows * self.shapes.rows.mean(config.prompt_in_context)
        return self.through(self.speed.train, tokens) * (2 if config.sam_rho else 1)

    def scored(self, examples: int | float, adapters: int | float, share: int | float = 1.0) -> float:
        """Seconds of examples through the lower layers once, and through the upper ones once an adapter."""
        tokens = examples * self.shapes.rows.mean(share)
        return self.lower(tokens) + self.through(self.speed.score, tokens * adapters)

    @property
    def generated(self) -> float:
        """Seconds to generate one adapter: the chain, each step with and without the condition; decoding."""
        return 2 * self.shapes.recipe.diffusion.steps * self.speed.network + 4 * self.bases / MEMORY_RATE

    def guided(self, tasks: int, generate: int | float) -> float:
        """Seconds to choose guidance on so many validation tasks."""
        trials = len(GUIDANCE) * (1 if self.shapes.recipe.collect.gauge == "canonical" else len(MEAN_SHARES))
        return tasks * (trials * generate + self.scored(SCALE_EXAMPLES, trials))

    def conditions(self) -> float:
        """Seconds to encode all paraphrases of the training tasks."""
        tasks = self.shapes.tasks("train")
        tokens = sum(len(task.prompts) for task in tasks) * self.shapes.prompt_tokens
        if self.shapes.recipe.condition.encoder == "base":
            return self.speed.lower.seconds(tokens, self.shapes.layers)
        return tokens * ENCODER_FLOP / self.speed.float32

    def tuning(self) -> float:
        """Seconds to tune the sentence encoder: through all of it, and twice back through its last layers."""
        about = self.shapes.recipe.condition.tuning
        prompts = about.steps * min(about.tasks, len(self.shapes.tasks("train")))
        passes = 1 + 2 * min(about.layers, ENCODER_LAYERS) / ENCODER_LAYERS
        return prompts * self.shapes.prompt_tokens * passes * ENCODER_FLOP / self.speed.float32

    def codec(self, snapshots: int) -> float:
        """Seconds to fit the codec on so many snapshots and to encode the local targets."""
        sites, recipe = self.shapes.spec.sites, self.shapes.recipe
        rows = min(
            snapshots, 2 * self.width + self.width // 2
        )  # of a full buffer: subspace.StreamingSubspace
        dims = self.bases / self.width
        merges = 1 + max(0, snapshots - rows) / max(self.width, 1)
        flop = merges * (4 * rows**2 * dims + 10 * rows**3 * len(sites)) + 4 * self.width * self.bases
        encoded = self.shapes.training_runs * recipe.diffusion.k
        flop_32 = 2 * encoded * self.bases
        overhead = (2 * snapshots + encoded) * len(sites) * SITE_SECONDS
        return flop / self.speed.float64 + flop_32 / self.speed.float32 + overhead

    # ---- the stages, on one thread

    def collect(self, snapshot_bytes: int | float) -> float:
        """Rows, the shared start, all runs."""
        about = self.shapes.recipe.collect
        rows = sum(self.pool(task, about.rows) for task in self.shapes.tasks("train", *HELD_OUT))
        start = self.fit(about.multi_task) if about.start == "multi_task" else 0.0
        runs = self.fit(about.single, self.shapes.training_runs + self.shapes.held_out_runs)
        return self.lower(rows) + start + runs + snapshot_bytes / FILE_RATE

    def train(self, snapshots: int) -> float:
        """Codec, encoder and conditions, gate, steps, guidance."""
        recipe, validation = self.shapes.recipe, len(self.shapes.tasks("validation"))
        gate = validation * self.scored(GATE_EXAMPLES, 4) if recipe.codec.gate > 0 else 0.0
        trainings = recipe.train.task_loss.trainings()
        steps = sum(recipe.train.steps * self.speed.step + self.task_loss(about) for about in trainings)
        guidance = self.guided(validation, self.generated)
        origin = self.multi_task("origin") if recipe.train.origin_steps else 0.0
        read = self.tuning() + self.conditions()
        return self.codec(snapshots) + read + gate + origin + steps + guidance

    def task_loss(self, about: TaskLossConfig) -> float:
        """The second stage."""
        tokens = about.steps * about.tasks * about.examples * self.shapes.rows.mean(0.5)
        generated = about.steps * (self.generated * about.tasks + self.speed.step)
        return self.through(self.speed.train, tokens) + generated

    def evaluate(self) -> float:
        """Rivals, then every unseen task with every adapter, in both contexts."""
        recipe, unseen = self.shapes.recipe, self.shapes.tasks(*UNSEEN)
        about, methods = recipe.evaluate, chosen_methods(recipe)
        validation = len(self.shapes.tasks("validation"))
        seeds, generators = about.seeds, [name for name in methods if name in VARIANTS]
        made = seeds * (1 + len(generators)) + about.wrong_prompts * ("ours_wrong_prompt" in methods)
        several = {"nearest", "ridge", "ours", "mean_noise", "t2l_recon", "t2l_sft", *VARIANTS}
        adapters = sum(seeds if name in several else 1 for name in methods)
        adapters += (about.wrong_prompts - 1) * ("ours_wrong_prompt" in methods)
        scores = sum(
            self.scored(min(about.examples, len(task.evaluation)), adapters, share)
            for task in unseen
            for share in (0.0, 1.0)
        )
        variants = len(generators) * (
            recipe.train.steps * self.speed.step + self.guided(validation, self.generated)
        )
        tuned = replace(recipe.train.task_loss, steps=about.task_loss_steps)
        variants += len(set(TASK_LOSS) & set(methods)) * self.task_loss(tuned)
        decode = 4 * self.bases / MEMORY_RATE
        ridge = self.guided(validation, decode) if "ridge" in methods else 0.0
        rivals = sum(self.multi_task(name) for name in MULTI_TASK if name in methods)
        rivals += sum(self.hypernetwork(mode) for mode, name in FOLDERS.items() if name in methods)
        once = 5 * (self.fit(recipe.collect.single) + self.scored(about.examples, 8)) + 110 * self.generated
        generate = len(unseen) * (made * self.generated + decode)
        few = self.few_shot() if about.few_shot.tasks else 0.0
        return self.conditions() + scores + variants + ridge + rivals + once + generate + few

    def multi_task(self, name: str) -> float:
        """A LoRA for all tasks: its rows, its steps, and its scores on validation tasks."""
        recipe, tasks = self.shapes.recipe, self.shapes.tasks("train")
        config = recipe.collect.multi_task
        steps = multi_task_steps(self.shapes)
        if name == "format_only":
            steps = config.steps
        elif name == "origin":
            steps = recipe.train.origin_steps
        elif name == "multi_task_lora_4x":
            steps += start_steps(recipe)
        rows = min(recipe.collect.rows, math.ceil(steps * config.batch_size / len(tasks)))
        plain = name == "format_only" and config.prompt_in_context < 1
        lower = self.lower(sum(self.pool(task, rows, plain) for task in tasks))
        validation = len(self.shapes.tasks("validation")) * VALIDATION_EXAMPLES
        curve = self.through(self.speed.score, (2 + steps // EVERY) * validation * self.shapes.rows.prompted)
        thicker = WIDER**0.5 if name == "multi_task_lora_4x" else 1.0  # only the two thin products grow
        return lower + thicker * self.fit(config, steps=steps) + curve

    def hypernetwork(self, mode: str) -> float:
        """T2L in one of its modes: its network, the rows behind it, its scores on validation tasks."""
        recipe = self.shapes.recipe
        about, training = recipe.evaluate.t2l, vars(recipe.evaluate.t2l)[mode]
        numbers = sum(map(self.shapes.coordinates, self.shapes.spec.sites))
        # Forward and back through the heads, by far the largest part.
        network = 6 * training.tasks * about.hidden * numbers / self.speed.float32
        seconds = training.steps * network
        if mode == "sft":
            rows = replace(recipe.collect.single, batch_size=about.examples)
            seconds += self.fit(rows, min(training.tasks, len(self.shapes.tasks("train"))), training.steps)
            seconds += self.lower(sum(self.pool(t, recipe.collect.rows) for t in self.shapes.tasks("train")))
        validation = len(self.shapes.tasks("validation"))
        tokens = validation * VALIDATION_EXAMPLES * len(MEAN_SHARES) * self.shapes.rows.prompted
        scores = (2 + training.steps // training.validate_every) * self.through(self.speed.score, tokens)
        return seconds + scores + self.guided(validation, 0.0)

    def few_shot(self) -> float:
        """Learning rates tried on validation tasks, then every road on every task."""
        about = self.shapes.recipe.evaluate.few_shot
        tried = about.validation * len(about.counts) * sum(map(len, RATES.values()))
        roads = about.tasks * len(about.counts) * len(ORIGINS)
        config = FitConfig(steps=about.steps)
        scored = self.scored(SCALE_EXAMPLES, tried) + self.scored(
            self.shapes.recipe.evaluate.examples, 2 * roads
        )
        return self.fit(config, tried + roads) + scored

    def elapsed(self, seconds: int | float) -> float:
        """Of work that takes so long on one thread, and loading."""
        return LOADING + seconds * (1 - PARALLEL + PARALLEL / self.threads)


def multi_task_steps(shapes: Shapes) -> int:
    """Of the multi-task rival: the recipe's, or as many examples as all single runs (multi_task.py)."""
    recipe = shapes.recipe
    single, multi = recipe.collect.single, recipe.collect.multi_task
    rule = math.ceil(shapes.training_runs * single.steps * single.batch_size / multi.batch_size)
    rule += recipe.train.origin_steps
    return recipe.evaluate.multi_task_steps or rule
