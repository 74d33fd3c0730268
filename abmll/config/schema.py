"""The typed sections of a run's configuration. Defaults are the paper's where the paper states one.

Unknown keys and wrong types are errors; `abmll.config.load` turns them into one message that lists them all.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from .checks import sections_disagree
from .native import resolved_dtype


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which language model is adapted."""

    name: str = Field(
        description="Hub id; local folder; path of a .gguf file; `package:NAME/FILE`, a file inside an installed "
        "package; or `random:ARCHITECTURE` (tiny, llama3-8b, llama3-70b, qwen2-7b), random weights."
    )
    revision: str | None = Field(None, description="Revision of a hub model.")
    # no float16: gradients through an fp16 model underflow without loss scaling
    dtype: Annotated[Literal["bfloat16", "float32", "auto"], AfterValidator(resolved_dtype)] = Field(
        "bfloat16",
        description="Of the frozen base weights; auto: bfloat16 on a GPU or a CPU with instructions for it, else "
        "float32. A run writes down which it was.",
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: frozen layers in 4 bits, by bitsandbytes; products and the rest in dtype."
    )
    sharding: Literal["none", "full"] = Field(
        "none", description="full: every rank holds a part of the frozen weights, and gathers them layer by layer."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="transformers' implementation; auto: flash-attn on a GPU where it is installed, else sdpa."
    )


class AdapterConfig(Section):
    """The low-rank pairs and where they go."""

    rank: int = Field(8, ge=1, le=64, description="r, of every low-rank pair.")
    alpha: float = Field(16.0, gt=0, description="The low-rank product is scaled by alpha / rank.")
    modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj", "o_proj"), min_length=1, description="Endings of the names of the linear layers adapted."
    )
    posterior: Literal["activation", "weight"] = Field(
        "activation", description="What is drawn: each token's activations, or one weight matrix a forward pass."
    )
    log_variance_alpha: float | None = Field(
        None, gt=0, description="alpha of the log-variance's pairs; null: alpha. Less slows it down (`docs/method.md`)."
    )
    log_variance_offset: float = Field(-20.0, ge=-80, le=80, description="c, added to every log-variance.")
    backend: Literal["auto", "triton", "torch"] = Field(
        "auto", description="Fused kernels or plain PyTorch; auto: the kernels on a GPU that can run them."
    )


AdamBeta = Annotated[float, Field(ge=0, lt=1)]


class MethodConfig(Section):
    """What is learned and how (`docs/method.md`)."""

    name: Literal[
        "abmll", "reptile", "fomaml", "maml", "structured_lora", "lora", "blob", "pretrained", "frequencies"
    ] = Field("abmll", description="The training algorithm (`docs/comparisons.md`).")
    inner_steps: int = Field(5, ge=1, description="K, gradient steps on one task.")
    inner_lr: float = Field(1e-5, gt=0, description="Learning rate of phi in training.")
    outer_lr: float = Field(5e-5, gt=0, description="Learning rate of theta; a step towards phi has reptile_step.")
    outer_optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="Of theta; sgd keeps the gradient's size, and so beta's. Not of steps towards phi."
    )
    test_lr: float = Field(1e-5, gt=0, description="Learning rate of the adaptation to an unseen task.")
    test_steps: int | None = Field(None, ge=1, description="Adaptation steps on an unseen task; null: inner_steps.")
    inner_optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Of phi, in training and on unseen tasks.")
    beta: float = Field(1e-8, ge=0, description="Weight of the KL and of the prior.")
    kl_estimate: Literal["closed_form", "sample"] = Field(
        "closed_form", description="sample: log q(z) - log p(z) of the drawn z, as the authors' code has it."
    )
    test_kl: bool = Field(True, description="Whether the objective on an unseen task has the KL too.")
    prior_shape: float = Field(1.0, gt=0, description="a0 of the Gamma prior on the precision.")
    prior_rate: float = Field(0.01, gt=0, description="b0 of the Gamma prior on the precision.")
    nll_reduction: Literal["sum", "mean"] = Field(
        "sum", description="Over a batch's examples; the paper's beta goes with the sum."
    )
    meta_gradient: Literal["kl", "first_order", "reptile"] = Field(
        "kl",
        description="abmll: theta's gradient of KL and prior; first_order adds the NLL's at the adapted phi; reptile "
        "goes reptile_step of the way to phi instead, where the KL is 0.",
    )
    outer_batch: Literal["reuse", "query"] = Field(
        "reuse",
        description="Of theta's step: the last inner batch again, or a fresh one of the same task (where it "
        "has fewer rows than an episode takes, shared with the inner ones).",
    )
    reset_inner_optimizer: bool = Field(True, description="Forget phi's AdamW moments between episodes.")
    adam_betas: tuple[AdamBeta, AdamBeta] = Field((0.9, 0.999), description="AdamW's decay rates, inner and outer.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon, inner and outer.")
    weight_decay: float = Field(0.0, ge=0, description="Of both optimizers, but for steps towards phi.")
    reptile_step: float = Field(
        0.5, gt=0, le=1, description="Epsilon: the share of the way to phi of a step towards it."
    )
    reptile_schedule: Literal["annealed", "constant"] = Field("annealed", description="Annealed: linearly to 0.")
    blob_prior_std: float = Field(0.2, gt=0, description="BLoB: standard deviation of the prior on A.")
    blob_initial_std: float = Field(0.05, gt=0, lt=1, description="BLoB: where the roots of A's deviations start.")

    @property
    def adaptation_steps(self) -> int:
        return self.test_steps or self.inner_steps

    def summed_examples(self, batch_size: int) -> int:
        """How many examples' NLL the objective of a step sums: a batch's, or one where it takes their mean."""
        return batch_size if self.nll_reduction == "sum" else 1

    @property
    def interpolates(self) -> bool:
        """Whether theta's step is a share of the way to phi, as Reptile's."""
        return self.name == "reptile" or (self.name == "abmll" and self.meta_gradient == "reptile")


class HubTask(Section):
    """One task read with `datasets.load_dataset`, and how its rows become questions (`docs/tasks.md`).

    A field is a column, or a part of one: `label`, `choices[text]`, `output[0][answer]`. A template is text with fields
    in braces; a list in it is written with spaces between, and `{options}` is the row's options, `(A) ... (B) ...`.
    """

    path: str = Field(description="Hub id or folder of the data set, or the name of a loader such as json.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="refs/convert/parquet: the hub's copy of a loading script's data.")
    data_files: str | dict[str, str] | None = Field(None, description="File, or a file for each split.")
    train_split: str = Field("train", description="Split that is adapted to and trained on.")
    validation_split: str | None = Field(None, description="Split of the best-so-far tracking; null: training rows.")
    test_split: str | None = Field("test", description="null: a share of the train split is set aside, see holdout.")
    holdout: float | None = Field(None, gt=0, lt=1, description="Share of the train split that serves as test.")
    holdout_by: str | None = Field(
        None,
        description="Template; rows that are alike in it stay on one side of the holdout; null: the input, and options "
        "that the row holds.",
    )
    input: str = Field(description="Template over the columns, such as 'premise: {premise} hypothesis: {hypothesis}'.")
    line_break: str | None = Field(
        None,
        description="What line breaks and tabs in the columns become, and a backslash with an n behind it, which some "
        "data sets write for one; null: they are kept.",
    )
    options: tuple[str, ...] | str = Field(description="The options, each a template, or the field that holds them.")
    options_pattern: str | None = Field(
        None, description="Regular expression whose groups are the options, where the options' field holds text."
    )
    option_names: tuple[str, ...] | None = Field(
        None, description="What the options are called in the answer; null: their text."
    )
    shuffle_options: bool = Field(False, description="For columns that always name the right option at one place.")
    drop_repeated_options: bool = Field(False, description="Leave out rows of which two options read the same.")
    label: str = Field(description="Field of the answer: an index into options, or an option's text.")
    label_is: Literal["one", "votes", "scores"] = Field(
        "one",
        description="votes: a list of labels, the most frequent counts, and ties are left out; scores: options with "
        "their scores (a mapping or its JSON), 1 for the right one, and rows with none or several are left out.",
    )
    labels: tuple[str | int, ...] | None = Field(None, description="The label's values, in the order of the options.")
    label_cuts: tuple[float, float] | None = Field(
        None, description="Of a rating: below the first is the first option, above the second the second one."
    )
    drop_labels: tuple[str | int, ...] = Field((), description="Labels whose rows are left out.")
    evaluation_only: bool = Field(False, description="Never to be trained or validated on: a test task alone.")
    required: tuple[str, ...] = Field((), description="Fields; rows in which one of them is empty are left out.")


class BuiltinTasks(Section):
    """The generator of small text tasks."""

    train_tasks: int = Field(24, ge=1, description="Tasks to train on.")
    test_tasks: int = Field(8, ge=1, description="Unseen tasks.")
    train_examples: int = Field(64, ge=2, description="Training examples of each task.")
    test_examples: int = Field(64, ge=1, description="Test examples of each task.")


class TasksConfig(Section):
    """Which tasks, from where, and how an example becomes tokens."""

    source: Literal["jsonl", "hub", "builtin"] = Field(
        "jsonl", description="Files in a folder, data sets read by `datasets`, or generated tasks."
    )
    folder: str | None = Field(None, description="source jsonl: a folder per task, or MetaICL's own files.")
    lists: str | None = Field(None, description="YAML file with the keys train, test and (optional) validation.")
    train: tuple[str, ...] | None = Field(None, min_length=1, description="Task names; overrides the list file's.")
    test: tuple[str, ...] | None = Field(None, min_length=1, description="Names of the unseen tasks.")
    validation: tuple[str, ...] | None = Field(
        None, min_length=1, description="Tasks of the best-so-far tracking; null: test."
    )
    hub: dict[str, HubTask] = Field(default_factory=dict, description="source hub: a description for each task name.")
    builtin: BuiltinTasks = BuiltinTasks()
    missing: Literal["warn", "error"] = Field("warn", description="What a listed task that is not there means.")
    keep_overlap: bool = Field(False, description="Keep a test task that is also in the training list in training.")
    batch_size: int = Field(2, ge=1, description="Examples a gradient step.")
    max_tokens: int = Field(1024, ge=16, description="Longest prompt.")
    too_long: Literal["drop", "truncate"] = Field(
        "truncate", description="A prompt longer than max_tokens loses the middle of its question, or is left out."
    )
    demonstrations: int = Field(0, ge=0, le=64, description="Answered examples of the support set in a prompt.")
    demonstrate: Literal["test", "adaptation", "always"] = Field(
        "test", description="Before scored questions; also before each example of the support set; also in training."
    )
    max_train_examples: int | None = Field(None, ge=2, description="A task's training examples used; null: all.")


class TrainerConfig(Section):
    """The episodic loop."""

    epochs: int = Field(500, ge=1, description="An epoch is one episode for each training task.")
    episodes: int | None = Field(None, ge=1, description="Total number of episodes; overrides epochs.")
    tasks_per_step: int | None = Field(
        None, ge=1, description="Episodes an outer step, over all ranks; null: as many as go side by side on all ranks."
    )
    parallel_episodes: int = Field(
        1, ge=1, description="Episodes that a rank adapts side by side in one forward pass; also tasks in evaluation."
    )
    activation_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="auto: of no layer, every second or all, the fastest that fits memory.budget_gb."
    )
    max_nonfinite: int = Field(5, ge=1, description="Stop after so many NaN or Inf episodes in a row.")
    deepspeed: str = Field("configs/deepspeed/zero2.json", description="JSON file of the engine's settings.")
    checkpoint_every: int | None = Field(
        100, ge=1, description="Outer steps between checkpoints; null: only at the end."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept, the newest ones.")


class TFBConfig(Section):
    """Training-free Bayesianization of a point estimate: `abmll.evaluation.tfb`."""

    samples: int = Field(0, ge=0, description="S draws of the weights, whose predictions are averaged; 0: none.")
    tolerance: float = Field(0.05, ge=0, description="By what fraction the NLL of the support set may grow.")
    evaluations: int = Field(10, ge=1, description="Of the support set, in the search for the noise that it bears.")


class PruneConfig(Section):
    """The smallest activations of every token set to zero, whenever the model predicts; adaptation is not pruned."""

    fraction: float = Field(0.0, ge=0, lt=1, description="Share of a token's activations set to zero.")
    where: Literal["hidden", "projections"] = Field(
        "hidden", description="Each decoder layer's output (the paper), or each adapted projection's (its code)."
    )


class ActiveConfig(Section):
    """A task is adapted on a few examples chosen among many."""

    labels: int = Field(4, ge=1, description="Examples chosen; the adaptation's batches go round them.")
    candidates: int = Field(50, ge=1, description="Training examples to choose from.")
    by: Literal["random", "entropy", "variance"] = Field(
        "entropy", description="Entropy of the prediction before adaptation, or its variance over samples."
    )


class EvalConfig(Section):
    """Scores on unseen tasks."""

    every: int | None = Field(None, ge=1, description="Outer steps between validations; null: none.")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Examples scored at a time; auto: as many, up to 16, as need no more memory than training."
    )
    max_examples: int | None = Field(None, ge=1, description="Test examples scored a task; null: all.")
    validation_examples: int = Field(50, ge=1, description="Validation examples scored a task.")
    samples: int = Field(0, ge=0, description="0: the posterior mean; S: average of S sampled predictions.")
    tfb: TFBConfig = TFBConfig()
    temperature: Literal["none", "support", "held_out"] = Field(
        "none",
        description="Temperature scaling, fitted to each task's support set: as the adapted model predicts it, or each "
        "batch held out from another adaptation.",
    )
    prune: PruneConfig = PruneConfig()
    support_labels: Literal["given", "shuffled"] = Field("given", description="Shuffled: within the support set.")
    active: ActiveConfig | None = Field(None, description="Choose the support set; null: drawn at random.")
    pretrained: bool = Field(True, description="Also score the pretrained model, at 0 and K steps.")
    select_by: Literal["accuracy", "accuracy_vocabulary", "nll", "ece", "macro_f1"] | None = Field(
        "accuracy",
        description="The validation score by which the best theta is kept; null: the last theta is, and validations "
        "show its way.",
    )


class MemoryConfig(Section):
    """What a run may take of each device, in GB (1e9 bytes)."""

    budget_gb: float = Field(40.0, gt=0, description="Of each device; a smaller GPU's own memory bounds it.")
    allowance_gb: float = Field(
        1.5, ge=0, description="Kept free on a GPU for what no plan counts: CUDA's context, libraries, fragments."
    )


class LoggingConfig(Section):
    """What is shown and written while it runs; metrics.jsonl is always written."""

    every: int = Field(1, ge=1, description="Outer steps between step lines.")
    progress_bar: bool = Field(True, description="Shown on a terminal.")
    tensorboard: bool = Field(False, description="Also write TensorBoard's event files.")
    csv: bool = Field(False, description="Also write CSV files.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project.")


class Config(Section):
    """A run."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Of the adapters' start, the order of tasks and examples, and the noise."
    )
    output: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "runs/default", min_length=1, description="The run's folder, from the working directory."
    )
    model: ModelConfig
    adapters: AdapterConfig = AdapterConfig()
    method: MethodConfig = MethodConfig()
    tasks: TasksConfig = TasksConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    memory: MemoryConfig = MemoryConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Config:
        if found := sections_disagree(self, **(info.context or {})):
            text = "; ".join(problem.text for problem in found)
            # the loader reads the problems themselves from the context, to list them one by one
            raise PydanticCustomError("sections_disagree", "{text}", {"text": text, "problems": found})
        return self
