"""The evaluation's part of a recipe: what is scored, on how much, and how the rivals are trained.

In: a recipe's section `evaluate`.  Out: `EvaluateConfig`.
"""

from dataclasses import dataclass

from ltdi_peft.strict import at_least, positive, share


@dataclass(frozen=True)
class T2LTraining:
    """Training of the T2L hypernetwork in one of its modes."""

    steps: int = 2000
    tasks: int = 16  # a step, each with one of its paraphrases
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to 0
    validate_every: int = 200  # steps between two scores on the validation tasks

    def __post_init__(self) -> None:
        for key in ("steps", "tasks", "validate_every"):
            at_least(key, vars(self)[key], 1)
        positive("learning_rate", self.learning_rate)


@dataclass(frozen=True)
class T2LConfig:
    """The T2L rival, an MLP hypernetwork (arXiv 2506.06105), trained both ways."""

    hidden: int = 256
    layers: int = 3  # residual blocks
    examples: int = 4  # sft: examples a task and step
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    reconstruction: T2LTraining = T2LTraining()
    sft: T2LTraining = T2LTraining(steps=800, tasks=8, validate_every=100)

    def __post_init__(self) -> None:
        for key in ("hidden", "layers", "examples"):
            at_least(key, vars(self)[key], 1)
        share("warmup", self.warmup)
        at_least("weight_decay", self.weight_decay, 0)
        positive("max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class FewShotConfig:
    """What a few examples of an unseen task are worth (EVALUATION, "Few-shot"). tasks = 0 leaves it out."""

    tasks: int = 0  # the first so many unseen tasks
    validation: int = 8  # validation tasks that the learning rates are chosen on
    counts: tuple[int, ...] = (4, 16, 64)  # N, examples of the task
    steps: int = 24  # gradient steps of every method that takes any
    in_context: bool = False  # the start with the examples in its context, solved, too: long rows, slow
    curve_steps: int = 0  # length of the accuracy curve over gradient steps; 0 leaves it out

    def __post_init__(self) -> None:
        for key in ("tasks", "curve_steps"):
            at_least(key, vars(self)[key], 0)
        for key in ("validation", "steps"):
            at_least(key, vars(self)[key], 1)
        at_least("number of counts", len(self.counts), 1)
        at_least("least of counts", min(self.counts), 1)


@dataclass(frozen=True)
class EvaluateConfig:
    """The protocol (EVALUATION)."""

    examples: int = 100  # evaluation examples a task
    seeds: int = 3  # generator seeds
    wrong_prompts: int = 5  # other tasks whose prompt is given in the wrong-prompt control
    bootstrap: int = 2000  # resamples of the tasks
    multi_task_steps: int | None = None  # of the rival; None: as many examples as start and runs together
    task_loss_steps: int = 150  # of ours+task_loss and task_loss; the rest is that of train.task_loss
    # Two sweeps on the validation tasks, left out when empty: numbers of sampling steps (of them, those that
    # a generator's chain has), and of training tasks that the linear prediction is fitted on.
    sampling_steps: tuple[int, ...] = ()
    training_tasks: tuple[int, ...] = ()
    # More are in protocol.METHODS (docs/formats.md).
    methods: tuple[str, ...] = (
        "base", "multi_task_lora", "mean", "nearest", "ridge", "vanilla", "local_consistency", "ours",
        "ours_wrong_prompt", "oracle_codec", "oracle",
    )  # fmt: skip
    t2l: T2LConfig = T2LConfig()
    few_shot: FewShotConfig = FewShotConfig()

    def __post_init__(self) -> None:
        at_least("task_loss_steps", self.task_loss_steps, 1)
        for key, least in (("sampling_steps", 1), ("training_tasks", 2)):
            at_least(f"least of {key}", min(vars(self)[key], default=least), least)
