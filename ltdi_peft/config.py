"""A recipe: frozen dataclasses, read from strict YAML.

In: a YAML file and overrides `--section.field=value`.  Out: `Recipe`.
Idea: every choice of a run is a named field with a default and a unit. Names of choices are listed here and
again, as tables of functions, in the rooms that make them; a test holds the two equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltdi_peft.evaluate_config import EvaluateConfig as EvaluateConfig
from ltdi_peft.evaluate_config import FewShotConfig as FewShotConfig
from ltdi_peft.evaluate_config import T2LConfig as T2LConfig
from ltdi_peft.evaluate_config import T2LTraining as T2LTraining
from ltdi_peft.strict import apply_override as apply_override
from ltdi_peft.strict import at_least, one_of, positive, read_table, share
from ltdi_peft.strict import build as build
from ltdi_peft.strict import to_dict as to_dict

GAUGES = ("shared_a", "shared_start", "canonical")
STARTS = ("multi_task", "fresh", "recorded")
ENCODERS = ("minilm", "minilm_words", "base")
LOSSES = ("vanilla", "naive", "local_consistency")
LAWS = ("cosine", "vp")
WEIGHTS = ("published", "uniform", "min_snr", "epsilon")
SAMPLERS = ("mean_only", "ddim", "stochastic")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
STORED_DTYPES = ("float32", "float16")
CENTRES = ("ridge", "mean")
METHODS = ("plain", "reptile")
WORDINGS = ("few", "many")
LEARNING_RATES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base model."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    dtype: str = "auto"  # float32, bfloat16, float16, or the fastest that the hardware multiplies natively
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class SuiteConfig:
    """The tasks, and how many of each split are used (None: all)."""

    source: str = "builtin"  # "builtin", "bigbench", a .jsonl file, or a folder of task.json files
    split_file: str | None = None
    domains: tuple[str, ...] = ()  # only tasks of these; empty: all
    match: tuple[str, ...] = ()  # only task names like one of these, e.g. "*/*/brackets"; empty: all
    fold: int | None = None  # the fold whose domains are the unseen ones; None: as the split file has it
    train: int | None = None
    validation: int | None = None
    unseen_tasks: int | None = None
    unseen_domains: int | None = None
    wordings: str = "few"  # of the built-in tasks: few, or many training prompts a task

    def __post_init__(self) -> None:
        one_of("wordings", self.wordings, WORDINGS)


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA that every run trains; not read where collect.start is `recorded`: there the runs have it."""

    rank: int = 4
    alpha: float = 8.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    layers: int | None = None  # adapt the top so many layers; None: the top third

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        positive("alpha", self.alpha)
        at_least("number of target_modules", len(self.target_modules), 1)
        if self.layers is not None:
            at_least("layers", self.layers, 1)


@dataclass(frozen=True)
class FitConfig:
    """Gradient steps on adapters: AdamW, gradient norm clipped per adapter."""

    steps: int = 24
    batch_size: int = 8  # examples a task and step
    learning_rate: float = 4e-3  # peak
    schedule: str = "linear"  # constant, linear (to 0), cosine (to 0)
    warmup: float = 0.05  # share of the steps
    max_grad_norm: float = 1.0
    sam_rho: float = 0.0  # > 0: sharpness-aware minimisation, METHOD: gradient at θ + ρ g/‖g‖
    prompt_in_context: float = 0.5  # share of examples that carry the task prompt in the model's context

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, LEARNING_RATES)
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("sam_rho", self.sam_rho, 0)
        positive("learning_rate", self.learning_rate)
        positive("max_grad_norm", self.max_grad_norm)
        share("warmup", self.warmup)
        share("prompt_in_context", self.prompt_in_context)


@dataclass(frozen=True)
class CollectConfig:
    """Preparation: the shared start, then one recorded LoRA per task and seed."""

    # multi_task: one LoRA on all training tasks first; fresh: B = 0; recorded: nothing is collected, the runs
    # were recorded elsewhere, with a LoRA of their own; or the folder of an adapter, as a path with a "/"
    start: str = "multi_task"
    gauge: str = "shared_a"  # shared_a: A stays the start's; shared_start: A and B trained
    seeds: int = 2
    together: int = 8  # tasks trained in one forward pass
    rows: int = 160  # examples of a task kept for training (cached activations)
    keep_lower: bool = False  # keep these activations on disk too: GBs, which later stages then read
    equal_parts: int = 6  # snapshots a run, at equal distances
    snapshot_dtype: str = "float32"
    multi_task: FitConfig = FitConfig(steps=400, batch_size=32, learning_rate=2e-3, prompt_in_context=0.8)
    single: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        if self.start_folder is None:
            one_of("start", self.start, STARTS, ', or a folder with an adapter, as a path with a "/"')
        one_of("gauge", self.gauge, GAUGES)
        one_of("snapshot_dtype", self.snapshot_dtype, STORED_DTYPES)
        for key in ("seeds", "together", "rows", "equal_parts"):
            at_least(key, vars(self)[key], 1)

    @property
    def start_folder(self) -> Path | None:
        """Where the shared start lies, if it is an adapter that is there."""
        return Path(self.start) if "/" in self.start else None


@dataclass(frozen=True)
class CodecConfig:
    """Adapter ⇄ tokens."""

    width: int | None = 128  # numbers a token; None: full width, exact
    dtype: str = "float16"  # of the stored bases: its rounding is far below what the width drops
    gate: float = 0.95  # least share of validation adapters' gain that decode(encode(·)) keeps; 0: no gate

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, STORED_DTYPES)
        if self.width is not None:
            at_least("width", self.width, 1)
        share("gate", self.gate)


@dataclass(frozen=True)
class TuningConfig:
    """The sentence encoder, tuned on the training tasks' prompts (tuning.py). steps = 0: as it is."""

    steps: int = 0
    layers: int = 3  # its last ones
    rank: int = 8
    tasks: int = 256  # a step, a wording of each
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 0)
        for key in ("layers", "rank"):
            at_least(key, vars(self)[key], 1)
        at_least("tasks", self.tasks, 3)  # one is predicted from the others
        positive("learning_rate", self.learning_rate)


@dataclass(frozen=True)
class ConditionConfig:
    """Prompt → condition."""

    # minilm: sentence embedding; minilm_words: with hashed words beside it; base: hidden states of the base
    # model
    encoder: str = "minilm"
    # Every prompt is read twice in training, the second time beside 1 to so many of the task's examples, so
    # that the generator reads either; 0: prompts alone.
    examples: int = 0
    tuning: TuningConfig = TuningConfig()
    # Conditions are what a classifier, fitted on the training tasks' attributes, makes of a prompt
    # (attributes.py).
    attributes: bool = False

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, ENCODERS)
        at_least("examples", self.examples, 0)
        if self.attributes and self.examples:
            raise ValueError(
                f"condition.attributes reads prompts alone, but condition.examples is {self.examples}. Set "
                f"condition.examples: 0, or attributes: false."
            )
        if self.tuning.steps and self.encoder == "base":
            raise ValueError(
                "condition.tuning tunes a sentence encoder, but condition.encoder is 'base', which is the "
                "frozen base model. Use minilm or minilm_words, or set condition.tuning.steps: 0."
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """The trajectory diffusion (METHOD §3)."""

    loss: str = "local_consistency"
    k: int = 3  # local targets
    steps: int = 20  # T, chain length
    law: str = "cosine"
    weight: str = "uniform"
    sampler: str = "mean_only"
    noise_floor: float = 1.0  # < 1: the training noise is lowered by a random factor from [noise_floor, 1]
    condition_dropout: float = 0.1
    mixing: float = 0.5  # share of training rows that are random linear combinations of tasks
    centre: str = "ridge"  # what the chain is centred on: cross-fitted ridge prediction, or the mean adapter
    ridge: float | None = None  # ridge strength; None: chosen on leave-one-task-out error

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        one_of("centre", self.centre, CENTRES)
        one_of("law", self.law, LAWS)
        one_of("weight", self.weight, WEIGHTS)
        one_of("sampler", self.sampler, SAMPLERS)
        at_least("k", self.k, 1)
        at_least("steps", self.steps, self.k)
        for key in ("noise_floor", "condition_dropout", "mixing"):
            share(key, vars(self)[key])
        if self.ridge is not None:
            positive("ridge", self.ridge)


@dataclass(frozen=True)
class DenoiserSection:
    """The network."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    nonlinear: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class MetaConfig:
    """Plain training, or REPTILE (METHOD §4)."""

    method: str = "plain"
    inner_steps: int = 3
    inner_learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        at_least("inner_steps", self.inner_steps, 1)
        positive("inner_learning_rate", self.inner_learning_rate)


@dataclass(frozen=True)
class TaskLossConfig:
    """Second stage: task loss through the frozen base model (METHOD §7). steps = 0 leaves it out."""

    steps: int = 0
    tasks: int = 4  # tasks a step, one forward pass
    examples: int = 8  # examples a task
    learning_rate: float = 3e-4
    weight_space: float = 0.1  # weight of the weight-space loss kept as a regulariser
    # Share of the examples with the task prompt in the model's context; None: as they lie, two of three. At 0
    # rows are a third as long, and what is learnt is for adapters that work without the prompt.
    prompt_in_context: float | None = None
    # Steps of a second training from the first stage, without any prompt in context, whose network makes the
    # adapters that work alone; `steps` may then be spent on those beside their prompt. 0: one network.
    alone_steps: int = 0

    def __post_init__(self) -> None:
        if self.prompt_in_context is not None:
            share("prompt_in_context", self.prompt_in_context)
        at_least("alone_steps", self.alone_steps, 0)
        if self.alone_steps and not self.steps:
            raise ValueError(
                f"train.task_loss.alone_steps is {self.alone_steps} without any task_loss.steps. Set both, "
                f"or steps with prompt_in_context: 0 for one network."
            )

    def trainings(self) -> tuple["TaskLossConfig", ...]:
        """The stage as the network is trained, and with `alone_steps` as that of adapters alone is."""
        own = replace(self, alone_steps=0)
        alone = replace(own, steps=self.alone_steps, prompt_in_context=0.0)
        return (own, alone) if self.alone_steps else (own,)


@dataclass(frozen=True)
class TrainConfig:
    """Training of the generator on Accelerate."""

    steps: int = 1500
    batch_size: int = 64  # rows a step, all processes together
    units: int = 2  # parts of a step (batches, or REPTILE inner loops), shared out over the processes
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema: float = 0.995
    mixed_precision: str = "no"  # "no" or "bf16"
    validate_every: int = 250
    checkpoint_every: int = 500
    log_every: int = 25
    log_with: str | None = "tensorboard"
    # Generated differences are added to the origin: the adapter in a folder, trained from the shared start
    # before; None: the shared start. Either is trained for so many further steps on all tasks first.
    origin: str | None = None
    origin_steps: int = 0
    origin_learning_rate: float | None = None  # peak; None: as collect.multi_task
    encoded: str | None = None  # a file of `ltdi encode` to train from, without store, codec fit and gate
    task_loss: TaskLossConfig = TaskLossConfig()

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, LEARNING_RATES)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16"))
        at_least("units", self.units, 1)
        at_least("batch_size", self.batch_size, self.units)
        for key in ("validate_every", "checkpoint_every", "log_every"):
            at_least(key, vars(self)[key], 1)
        at_least("origin_steps", self.origin_steps, 0)
        if self.origin_learning_rate is not None:
            positive("origin_learning_rate", self.origin_learning_rate)
        positive("learning_rate", self.learning_rate)
        share("ema", self.ema)
        share("warmup", self.warmup)


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs. `output` holds store, generator and results."""

    name: str = "recipe"
    output: str = "runs/recipe"
    seed: int = 0
    base: BaseConfig = BaseConfig()
    suite: SuiteConfig = SuiteConfig()
    adapter: AdapterConfig = AdapterConfig()
    collect: CollectConfig = CollectConfig()
    codec: CodecConfig = CodecConfig()
    condition: ConditionConfig = ConditionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    denoiser: DenoiserSection = DenoiserSection()
    meta: MetaConfig = MetaConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()  # noqa: RUF009 (frozen, as the others are)

    @property
    def folder(self) -> Path:
        """Where the run's files are."""
        return Path(self.output)

    @property
    def store_folder(self) -> Path:
        """Trajectories of training tasks."""
        return self.folder / "trajectories"

    @property
    def held_out_folder(self) -> Path:
        """Oracles of validation and unseen tasks: out of every codec, mean and training set."""
        return self.folder / "held_out"

    @property
    def generator_folder(self) -> Path:
        """The trained generator."""
        return self.folder / "generator"


def as_recipe(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe itself, or read from its file. ValueError for overrides of one that is no file."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise ValueError(f"overrides {list(overrides)} are for a recipe file; dataclasses.replace a Recipe.")
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides `--section.field=value` (or `section.field=value`), in order."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist. The project's own are in recipes/*.yaml.")
    table = read_table(path)
    for override in overrides:
        apply_override(table, override)
    return build(Recipe, table, str(path))
