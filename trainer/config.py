"""One frozen dataclass per command. A field is a flag and a YAML key; names are those of TRL and
Transformers. A loss's own hyperparameters are not here: they are flags read off its signature."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal

from .errors import UserError


def flag(*, help: str, default: Any = MISSING) -> Any:
    """A field that is a flag of the command line; without a default it is required."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """What every training command takes."""

    model_name_or_path: str = flag(help="A local folder or a hub id.")
    dataset_name: str = flag(
        help="A .jsonl, .json, .csv or .parquet file (also .gz), a folder of them, or a hub id."
    )
    output_dir: str = flag(help="Where the run's files go; must be new, empty or resumed.")

    dataset_config: str | None = flag(default=None, help="Configuration of a hub dataset.")
    dataset_train_split: str = flag(default="train", help="Split of a hub dataset.")
    eval_dataset_name: str | None = flag(default=None, help="Held-out data, as dataset_name.")
    eval_fraction: float = flag(
        default=0.0, help="Share of the rows held out when eval_dataset_name is not given."
    )
    max_length: int | None = flag(
        default=1024, help="Longest row in tokens; longer ones are truncated and counted."
    )
    trust_remote_code: bool = flag(default=False, help="Run code that comes with the model.")

    per_device_train_batch_size: int = flag(default=8, help="Rows per rank and micro-step.")
    gradient_accumulation_steps: int = flag(default=1, help="Micro-steps per optimizer step.")
    per_device_eval_batch_size: int = flag(default=8, help="Rows per rank when evaluating.")
    max_tokens_per_micro_batch: int | None = flag(
        default=None,
        help="Repack the rows of an optimizer step into micro-batches of at most so many tokens. "
        "Changes speed and memory, never the gradient.",
    )
    num_train_epochs: float = flag(default=3.0, help="Passes over the data.")
    max_steps: int = flag(default=-1, help="Optimizer steps; overrides num_train_epochs.")
    learning_rate: float = flag(default=2e-5, help="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = flag(
        default="linear", help="Shape of the learning rate after the warm-up."
    )
    warmup_steps: float = flag(
        default=0, help="Steps of linear warm-up; below 1, a share of all, rounded up."
    )
    optim: Literal["adamw_torch", "sgd"] = flag(default="adamw_torch", help="Optimizer.")
    weight_decay: float = flag(default=0.0, help="Decoupled; not applied to vectors.")
    adam_beta1: float = flag(default=0.9, help="AdamW's first-moment decay.")
    adam_beta2: float = flag(default=0.999, help="AdamW's second-moment decay.")
    adam_epsilon: float = flag(default=1e-8, help="AdamW's epsilon.")
    max_grad_norm: float = flag(default=1.0, help="Clip the gradient's norm; 0 for no clipping.")
    seed: int = flag(default=42, help="Orders the data.")
    shuffle_dataset: bool = flag(default=True, help="A new order every epoch.")

    bf16: bool | None = flag(
        default=None,
        help="bfloat16 compute over float32 master weights. Unset: on where the GPU has it.",
    )
    dtype: Literal["float32", "bfloat16"] = flag(
        default="float32", help="Of the weights and the optimizer; bfloat16 is pure bfloat16."
    )
    gradient_checkpointing: bool = flag(default=False, help="Recompute activations backward.")
    gradient_checkpointing_policy: Literal["full", "selective"] = flag(
        default="full",
        help="full: layers keep their inputs alone; selective: what matrix products and attention "
        "made as well, so that only cheap operations are done again.",
    )
    activation_offloading: bool = flag(
        default=False, help="What the backward pass needs waits in the host's memory."
    )
    activation_memory_budget: float | None = flag(
        default=None,
        help="With torch_compile: the share of its activations that a compiled layer may keep.",
    )
    torch_compile: bool = flag(default=False, help="Compile each decoder layer.")
    layout: Literal["shared", "packed", "padded"] = flag(
        default="shared",
        help="shared: packed, common prefixes once; packed: without sharing; padded: a rectangle, "
        "for models whose attention is not plain.",
    )
    head_budget_mb: int | None = flag(
        default=None,
        help="Memory for the head's stash; what does not fit is recomputed. "
        "Unset: 4096 on a GPU, 1024 on a CPU.",
    )

    use_peft: bool = flag(
        default=False, help="Train adapters of low rank (LoRA) and leave the weights as they are."
    )
    lora_r: int = flag(default=16, help="Rank of the adapters.")
    lora_alpha: int = flag(default=32, help="An adapter counts lora_alpha / lora_r times.")
    lora_dropout: float = flag(default=0.0, help="Of what an adapter reads.")
    lora_target_modules: list[str] | None = flag(
        default=None,
        help="Names of the modules with adapters, or all-linear. Unset: those that peft knows.",
    )
    lora_modules_to_save: list[str] | None = flag(
        default=None, help="Names of modules that are trained whole, and saved with the adapters."
    )
    merge_on_export: bool = flag(
        default=False, help="Leave the whole model with the adapters merged in, not adapters."
    )

    fsdp: Literal["full", "hsdp", "none"] = flag(
        default="full",
        help="Of several ranks: weights in shards over all; in groups that each have all shards; "
        "whole on every rank.",
    )
    fsdp_group_size: int | None = flag(
        default=None, help="Ranks of an hsdp group. Unset: those of a node, as torchrun says."
    )
    fsdp_reshard_after_forward: bool = flag(
        default=True, help="Gather layers again for the backward pass; false costs their memory."
    )
    fsdp_param_dtype: Literal["float32", "bfloat16"] | None = flag(
        default=None,
        help="In which gathered weights are computed with. Unset: bfloat16 on GPUs with bf16.",
    )
    fsdp_cpu_offload: bool = flag(
        default=False, help="Shards and the optimizer's state stay in the host's memory."
    )
    shard_head: bool = flag(
        default=True,
        help="With fsdp full: the head, and an embedding tied to it, stay in shards; hidden states "
        "travel in their place.",
    )

    ddp_timeout: int = flag(
        default=1800, help="Seconds that a rank waits for the others before it gives up."
    )

    logging_steps: int = flag(default=10, help="Steps between log lines.")
    logging_first_step: bool = flag(default=True, help="Log the first step, too.")
    eval_strategy: Literal["no", "steps", "epoch"] = flag(default="no", help="When to evaluate.")
    eval_steps: int = flag(default=500, help="Steps between evaluations.")
    eval_on_start: bool = flag(default=False, help="Evaluate before the first step, too.")
    save_steps: int = flag(default=500, help="Steps between checkpoints; 0 for none.")
    save_async: bool = flag(
        default=False, help="Train on while a checkpoint is written, from a copy in memory."
    )
    save_total_limit: int | None = flag(default=None, help="Checkpoints to keep.")
    resume_from_checkpoint: str | None = flag(
        default=None, help="A checkpoint folder, or true for the newest in output_dir."
    )
    overwrite_output_dir: bool = flag(default=False, help="Write over another run's files.")
    report_to: Literal["none", "tensorboard"] = flag(
        default="none", help="Besides metrics.jsonl, which is always written."
    )
    disable_tqdm: bool = flag(default=False, help="No progress bar.")

    def __post_init__(self):
        for name in COUNTS:
            value = getattr(self, name)
            require(value is None or value >= 1, name, "a positive number", value)
        for name in ("learning_rate", "warmup_steps", "max_grad_norm", "save_steps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "a number from 0", value)
        if self.max_steps <= 0:
            value = self.num_train_epochs
            require(0 < value < math.inf, "num_train_epochs", "a positive number", value)
        require(0 <= self.eval_fraction < 1, "eval_fraction", "[0, 1)", self.eval_fraction)
        longest = self.max_length
        require(longest is None or longest >= 2, "max_length", "2 or more", longest)
        held_out = self.eval_dataset_name is not None or self.eval_fraction > 0
        for name in ("lora_r", "lora_alpha"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        require(0 <= self.lora_dropout < 1, "lora_dropout", "[0, 1)", self.lora_dropout)
        for name in ADAPTERS:
            given = getattr(self, name) != getattr(TrainConfig, name)
            require(self.use_peft or not given, name, "--use_peft beside it", "none")
        share = self.activation_memory_budget
        fits = share is None or self.torch_compile and 0 <= share <= 1
        wanted = "a number in [0, 1], with torch_compile"
        require(fits, "activation_memory_budget", wanted, share)
        grouped = self.fsdp_group_size is None or self.fsdp == "hsdp"
        require(grouped, "fsdp_group_size", "unset, or fsdp hsdp", self.fsdp_group_size)
        require(
            self.eval_strategy == "no" or held_out,
            "eval_strategy",
            "held-out rows: eval_dataset_name or eval_fraction",
            "neither",
        )


ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
ADAPTERS += ("merge_on_export",)
COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_micro_batch",
    "logging_steps",
    "eval_steps",
    "save_total_limit",
    "fsdp_group_size",
    "ddp_timeout",
)


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on `text`, `messages`, or `prompt` + `completion` rows."""

    completion_only_loss: bool | None = flag(
        default=None, help="Score the completion alone. Unset: yes where there is a prompt."
    )
    assistant_only_loss: bool = flag(
        default=False, help="Score assistant turns alone; needs {%% generation %%} in the template."
    )


@dataclass(frozen=True)
class ReferenceConfig(TrainConfig):
    """Training beside a reference model."""

    learning_rate: float = flag(default=1e-6, help="Peak learning rate.")
    ref_model_name_or_path: str | None = flag(
        default=None, help="The reference model. Unset: the model as it is before training."
    )
    sync_ref_model: bool = flag(
        default=False,
        help="TR-DPO, arXiv:2404.09656: move the reference towards the policy as it trains.",
    )
    ref_model_mixup_alpha: float = flag(
        default=0.6, help="The policy's share in the moved reference; 1 replaces it."
    )
    ref_model_sync_steps: int = flag(default=512, help="Optimizer steps between two moves.")

    def __post_init__(self):
        super().__post_init__()
        share = self.ref_model_mixup_alpha
        require(0 < share <= 1, "ref_model_mixup_alpha", "a number in (0, 1]", share)
        wanted = "false with use_peft, whose reference is the model without its adapters"
        require(not (self.sync_ref_model and self.use_peft), "sync_ref_model", wanted, "true")
        steps = self.ref_model_sync_steps
        require(steps >= 1, "ref_model_sync_steps", "a positive number", steps)


@dataclass(frozen=True)
class OfflineConfig(ReferenceConfig):
    """Offline training against a reference model."""

    precompute_ref_log_probs: bool = flag(
        default=False, help="Score the data once under the reference, then free it."
    )
    ref_log_probs_cache: str | None = flag(
        default=None,
        help="A folder that keeps these scores: a run whose rows it has loads no reference.",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.sync_ref_model and self.precomputes),
            "sync_ref_model",
            "a reference that is kept",
            "precompute_ref_log_probs or ref_log_probs_cache, which free it",
        )

    @property
    def precomputes(self) -> bool:
        """Whether the reference scores the data beforehand."""
        return self.precompute_ref_log_probs or self.ref_log_probs_cache is not None


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """Offline preference optimisation on `chosen` + `rejected` rows, with or without `prompt`."""

    loss_type: str = flag(default="sigmoid", help="Which preference loss; see `prefuse methods`.")
    hyperparameters: dict[str, Any] = field(init=False, default_factory=dict)  # by their own flags


@dataclass(frozen=True)
class KTOConfig(OfflineConfig):
    """Offline optimisation on completions judged one at a time: `prompt`, `completion`, `label`."""

    loss_type: str = flag(default="kto", help="Which unpaired loss; see `prefuse methods`.")
    hyperparameters: dict[str, Any] = field(init=False, default_factory=dict)  # by their own flags
    critic_model_name_or_path: str | None = flag(
        default=None,
        help="For dro_v: a critic or reward model with the policy's tokenizer. Unset: the policy's "
        "body with a head of zeros.",
    )
    critic_learning_rate: float | None = flag(
        default=None, help="Of dro_v's critic; learning_rate if unset."
    )

    def __post_init__(self):
        super().__post_init__()
        rate = self.critic_learning_rate
        fits = rate is None or 0 <= rate < math.inf
        require(fits, "critic_learning_rate", "a number from 0", rate)
        for name in ("critic_model_name_or_path", "critic_learning_rate"):
            given = getattr(self, name) is not None and self.loss_type != "dro_v"
            require(not given, name, "--loss_type dro_v, which has a critic", self.loss_type)


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Reward, cost and process models, on rows of pairs, lists, steps or labels."""

    learning_rate: float = flag(default=1e-4, help="Peak learning rate.")
    loss_type: str = flag(
        default="bradley_terry", help="Which loss of a reward model; see `prefuse methods`."
    )
    hyperparameters: dict[str, Any] = field(init=False, default_factory=dict)  # by their own flags
    step_separator: str = flag(default="\n", help="Ends a step, for --loss_type prm.")


def require(holds: bool, flag: str, wanted: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{flag}: wanted {wanted}; got {got}")


def updated(config, **changes):
    """A copy with some fields changed; plain `replace` would forget the hyperparameters."""
    new = replace(config, **changes)
    getattr(new, "hyperparameters", {}).update(getattr(config, "hyperparameters", {}))
    return new
