"""One frozen dataclass per online command; the loss's and the estimator's own numbers are flags
read off their signatures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .config import ReferenceConfig, flag, require


@dataclass(frozen=True)
class OnlineConfig(ReferenceConfig):
    """Reinforcement learning on `prompt` rows, from rewards of sampled completions.

    Batches are counted in completions: an optimizer step sees per_device_train_batch_size x
    gradient_accumulation_steps x ranks of them.
    """

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: built-in names, package.module.function or file.py:function."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward; all 1 if unset."}
    )
    reward_failure: Literal["stop", "skip", "zero"] = flag(
        default="stop", help="What a reward that raises, hangs or is no number leads to."
    )
    reward_timeout: float = flag(default=60.0, help="Seconds for a call of a reward.")
    reward_cache: str | None = flag(
        default=None, help="Remember rewards in this sqlite file, or in one in this folder."
    )
    reward_combination: Literal["sum", "normalized_sum", "min"] = flag(
        default="sum", help="Of several rewards: of their values, of their z-scores, the least."
    )
    missing_eos_penalty: float | None = flag(
        default=None, help="Taken off the reward of a completion cut at max_completion_length."
    )
    preference: Literal["larger", "bradley_terry", "difference"] = flag(
        default="larger",
        help="How likely a completion beats another, from two rewards: 1 for the larger; the "
        "sigmoid of their difference; 1/2 and half their difference, for rewards in [0, 1].",
    )
    preference_func: str | None = flag(
        default=None,
        help="What says how likely a completion beats another, in place of two rewards: judge, "
        "package.module.name, file.py:function or a reward model's folder.",
    )
    win_rates: bool = flag(
        default=False, help="Learn from win rates among a prompt's completions, not from rewards."
    )

    num_generations: int = flag(default=8, help="Completions of a prompt.")
    num_generations_eval: int = flag(default=1, help="Completions of a held-out prompt.")
    max_prompt_length: int | None = flag(
        default=512, help="Longest prompt in tokens; longer ones are skipped and counted."
    )
    max_completion_length: int = flag(default=256, help="Longest completion in tokens.")
    temperature: float = flag(default=1.0, help="Of sampling, and of every log-prob.")
    top_p: float = flag(default=1.0, help="Sample from the smallest set with this probability.")
    top_k: int = flag(default=0, help="Sample from so many tokens; 0 for all.")
    min_p: float = flag(default=0.0, help="Sample from tokens this likely beside the likeliest.")
    engine: Literal["auto", "transformers", "generate", "vllm", "openai"] = flag(
        default="auto",
        help="What samples. auto: transformers, which is continuous batching, on a GPU; generate "
        "on a CPU, to the same samples.",
    )

    environment: str | None = flag(
        default=None,
        help="What the policy talks to: package.module.name or file.py:name, with options after ?.",
    )
    max_turns: int = flag(default=8, help="Turns of an episode with an environment.")
    max_episode_length: int | None = flag(
        default=None, help="Its tokens, with the prompt. Unset: the model's context."
    )

    num_iterations: int = flag(default=1, help="Passes over the completions sampled together.")
    num_mini_batches: int = flag(
        default=1, help="Optimizer steps of a pass, so many steps' completions sampled together."
    )
    mask_truncated_completions: bool = flag(
        default=False, help="Do not train on completions cut at max_completion_length."
    )
    log_completions: int = flag(default=4, help="Completions written to samples.jsonl a log line.")

    def __post_init__(self):
        super().__post_init__()
        counts = ("num_generations", "num_generations_eval", "max_completion_length")
        for name in (*counts, "num_iterations"):
            require(getattr(self, name) >= 1, name, "a positive number", getattr(self, name))
        size = self.max_tokens_per_micro_batch
        require(size is None, "max_tokens_per_micro_batch", "a command on given rows", size)
        wanted = "a reward: a built-in name, package.module.function or file.py:function"
        judged = [*self.reward_funcs, *filter(None, (self.environment, self.preference_func))]
        require(bool(judged), "reward_funcs", wanted, "none, no --preference_func or --environment")
        require(self.max_turns >= 1, "max_turns", "1 or more", self.max_turns)
        require(self.num_mini_batches >= 1, "num_mini_batches", "1 or more", self.num_mini_batches)
        require(self.temperature > 0, "temperature", "a positive number", self.temperature)
        weights = self.reward_weights
        wanted = f"a number for each of the {len(self.reward_funcs)} rewards"
        fits = weights is None or len(weights) == len(self.reward_funcs)
        require(fits, "reward_weights", wanted, weights)
        completions = self.per_device_train_batch_size * self.gradient_accumulation_steps
        require(
            completions * self.num_mini_batches % self.num_generations == 0,
            "per_device_train_batch_size",
            "with gradient_accumulation_steps and num_mini_batches, a multiple of num_generations "
            f"({self.num_generations}) completions",
            completions * self.num_mini_batches,
        )


@dataclass(frozen=True)
class PolicyConfig(OnlineConfig):
    """Policy gradients."""

    loss_type: str = flag(default="dapo", help="Which policy loss; see `prefuse methods`.")
    hyperparameters: dict[str, Any] = field(init=False, default_factory=dict)  # by their own flags
    advantage: str = flag(default="grpo", help="Which advantage estimator; see `prefuse methods`.")
    scale_rewards: Literal["group", "batch", "none"] = flag(
        default="group", help="Whose standard deviation the grpo estimator divides by."
    )
    beta: float = flag(default=0.0, help="Coefficient of the KL to the reference model.")
    kl: Literal["k1", "k2", "k3", "ratio_k3"] = flag(
        default="k3", help="Its estimator, where the KL is in the loss."
    )
    kl_in_reward: bool = flag(
        default=False, help="Take the KL off the reward instead of adding it to the loss."
    )
    entropy_coef: float = flag(default=0.0, help="Of an entropy bonus.")
    pass_k: int = flag(default=2, help="k of the pass_at_k estimator.")
    filter_zero_std: bool = flag(
        default=False, help="Do not train on groups whose rewards are all equal (DAPO)."
    )
    refill: int = flag(
        default=0,
        help="With filter_zero_std: how often to sample more prompts in place of such groups.",
    )
    replay_success: float | None = flag(
        default=None,
        help="A prompt none of whose completions has this reward replays its last one that had.",
    )
    select: Literal["all", "best", "best_random", "best_worst"] = flag(
        default="all", help="Which of a prompt's completions are trained on (PF-PPO)."
    )
    keep: int = flag(default=2, help="How many of them.")
    kl_target: float | None = flag(
        default=None, help="Adapt beta to this mean KL of a sequence, in nats."
    )
    kl_horizon: float = flag(default=10000.0, help="Over about so many completions.")
    cost_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Costs, given as rewards are; their sum is held at cost_limit."},
    )
    cost_limit: float = flag(default=0.0, help="The mean cost that a completion may have.")
    cost_decay: float = flag(default=0.9, help="Of the moving average of the cost.")
    multiplier_init: float = flag(default=1.0, help="The cost's first weight, lambda.")
    multiplier_rate: float = flag(default=0.1, help="How fast ln lambda follows the cost.")
    multiplier_max: float = flag(default=5.0, help="The most that lambda becomes.")
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = flag(default="none", help="Weigh by pi_old / pi_rollout, as the engine reported it.")
    importance_sampling_clip_max: float = flag(default=2.0, help="The most that weight may be.")

    def __post_init__(self):
        super().__post_init__()
        filters = self.refill == 0 or self.filter_zero_std
        require(filters and self.refill >= 0, "refill", "0, or filter_zero_std true", self.refill)
        require(self.keep >= 1, "keep", "1 or more", self.keep)
        target, horizon = self.kl_target, self.kl_horizon
        positive = target is None or target > 0 and self.beta > 0
        require(positive, "kl_target", "a positive number, with a positive beta", target)
        require(horizon > 0, "kl_horizon", "a positive number", horizon)
        require(0 <= self.cost_decay < 1, "cost_decay", "a number in [0, 1)", self.cost_decay)
        for name in ("multiplier_init", "multiplier_rate", "multiplier_max"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """GRPO and its kin: advantages from groups of completions, a clipped ratio."""


@dataclass(frozen=True)
class RLOOConfig(PolicyConfig):
    """RLOO: leave-one-out advantages of whole sequences, the KL in the reward."""

    loss_type: str = flag(default="rloo", help="Which policy loss; see `prefuse methods`.")
    advantage: str = flag(default="rloo", help="Which advantage estimator; see `prefuse methods`.")
    num_generations: int = flag(default=2, help="Completions of a prompt.")
    beta: float = flag(default=0.05, help="Coefficient of the KL to the reference model.")
    kl_in_reward: bool = flag(
        default=True, help="Take the KL off the reward instead of adding it to the loss."
    )


@dataclass(frozen=True)
class ReinforceConfig(PolicyConfig):
    """REINFORCE and REINFORCE++: no clip and no group needed, the KL in the reward."""

    loss_type: str = flag(default="ppo", help="Which policy loss; see `prefuse methods`.")
    advantage: str = flag(
        default="reinforce_plus_plus", help="Which advantage estimator; see `prefuse methods`."
    )
    num_generations: int = flag(default=1, help="Completions of a prompt.")
    beta: float = flag(default=0.01, help="Coefficient of the KL to the reference model.")
    kl_in_reward: bool = flag(
        default=True, help="Take the KL off the reward instead of adding it to the loss."
    )


@dataclass(frozen=True)
class NashMDConfig(PolicyConfig):
    """Nash-MD: against samples of a geometric mixture of the policy and the reference."""

    loss_type: str = flag(default="reinforce", help="Which policy loss; see `prefuse methods`.")
    advantage: Literal["nash"] = flag(default="nash", help="How likely the mixture is beaten.")
    num_generations: int = flag(default=1, help="Completions of a prompt, and of the mixture.")
    beta: float = flag(default=0.1, help="Coefficient of the KL to the reference model.")
    kl_in_reward: bool = flag(default=True, help="The KL is always in the reward of Nash-MD.")
    mixture_coef: float = flag(default=0.5, help="The reference's share in the mixture.")
    engine: Literal["auto", "generate"] = flag(
        default="auto", help="What samples from the policy; from the mixture, always generate."
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.kl_in_reward, "kl_in_reward", "true for Nash-MD", self.kl_in_reward)
        require(self.beta > 0, "beta", "a positive number", self.beta)
        share = self.mixture_coef
        require(0 < share < 1, "mixture_coef", "a number between 0 and 1", share)


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """PPO: a critic beside the policy, GAE, the KL in the reward of every token."""

    loss_type: str = flag(default="ppo", help="Which policy loss; see `prefuse methods`.")
    advantage: Literal["gae"] = flag(default="gae", help="Of tokens, by the critic.")
    num_generations: int = flag(default=1, help="Completions of a prompt.")
    num_iterations: int = flag(default=4, help="Passes over the completions sampled together.")
    beta: float = flag(default=0.05, help="Coefficient of the KL to the reference model.")
    kl_in_reward: bool = flag(default=True, help="The KL is always in the reward of PPO.")
    gamma: float = flag(default=1.0, help="Discount of a token's reward.")
    lam: float = flag(default=0.95, help="Lambda of GAE.")
    critic_lam: float | None = flag(default=None, help="Of the critic's returns; lam if unset.")
    lam_alpha: float | None = flag(
        default=None, help="VAPO's lambda instead: 1 - 1 / (lam_alpha x completion length)."
    )
    turn_values: bool = flag(
        default=False, help="Values and advantages of turns with an environment, not of tokens."
    )
    macro_actions: Literal["none", "ngram", "perplexity"] = flag(
        default="none",
        help="Values and advantages of several tokens together (MA-RLHF): macro_size of them, or "
        "those up to one that the reference finds less likely than the one before.",
    )
    macro_size: int = flag(default=5, help="Tokens of a macro action, with ngram.")
    macro_value: Literal["mean", "first", "last", "position"] = flag(
        default="mean", help="The value of a macro action, from its tokens' values."
    )
    vf_coef: float = flag(default=0.1, help="Coefficient of the critic's loss.")
    cliprange_value: float = flag(default=0.2, help="How far a value moves before it is clipped.")
    critic_model_name_or_path: str | None = flag(
        default=None,
        help="A critic or reward model with the policy's tokenizer. Unset: the "
        "policy's body with a head of zeros.",
    )
    cost_critic_model_name_or_path: str | None = flag(
        default=None, help="The critic of the costs, likewise."
    )
    critic_warmup_windows: int = flag(default=0, help="Samplings in which the critic learns alone.")

    def __post_init__(self):
        super().__post_init__()
        require(self.kl_in_reward, "kl_in_reward", "true for PPO", self.kl_in_reward)
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, "a number in [0, 1]", value)
        talks = self.environment is not None or not self.turn_values
        require(talks, "turn_values", "false without --environment", True)
        alone = self.macro_actions == "none" or not self.turn_values
        require(alone, "macro_actions", "none with turn_values", self.macro_actions)
        require(self.macro_size >= 1, "macro_size", "1 or more", self.macro_size)
        require(self.vf_coef >= 0, "vf_coef", "a number from 0", self.vf_coef)
        for name in ("lam_alpha", "critic_lam"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "a positive number", value)


@dataclass(frozen=True)
class PickingConfig(OnlineConfig):
    """What trains on some of a prompt's completions, which stay together in a micro-batch."""

    num_generations: int = flag(default=2, help="Completions of a prompt.")

    def __post_init__(self):
        super().__post_init__()
        rows, each = self.per_device_train_batch_size, self.num_generations
        wanted = f"a multiple of num_generations ({each})"
        require(rows % each == 0, "per_device_train_batch_size", wanted, rows)


@dataclass(frozen=True)
class OnlineDPOConfig(PickingConfig):
    """Online preference optimisation: a prompt's best completion against its worst."""

    loss_type: str = flag(default="sigmoid", help="Which preference loss; see `prefuse methods`.")
    hyperparameters: dict[str, Any] = field(init=False, default_factory=dict)  # by their own flags
    pairs: Literal["best_worst", "best_random", "random"] = flag(
        default="best_worst", help="Which two of a prompt's completions, the better one chosen."
    )
    min_margin: float = flag(default=0.0, help="Least difference of a pair's rewards.")
    rso_eta: float | None = flag(
        default=None,
        help="Keep completions with probability exp((r - r_max) / rso_eta) before they are paired.",
    )
    reanchor: bool = flag(
        default=False, help="The reference is the policy that sampled, anew at every sampling."
    )
    extragradient: bool = flag(
        default=False,
        help="Of egpo: every second step starts where the one before did, against opponents "
        "sampled at its end.",
    )

    def __post_init__(self):
        super().__post_init__()
        each = self.num_generations
        require(each >= 2, "num_generations", "2 or more, to prefer one to another", each)
        require(self.rso_eta is None or self.rso_eta > 0, "rso_eta", "above 0", self.rso_eta)
        anchored = self.reanchor and self.sync_ref_model
        require(not anchored, "reanchor", "without sync_ref_model, which moves a model", True)


@dataclass(frozen=True)
class RAFTConfig(PickingConfig):
    """RAFT, rejection sampling: supervised fine-tuning on a prompt's best completions."""

    learning_rate: float = flag(default=1e-5, help="Peak learning rate.")
    num_generations: int = flag(default=8, help="Completions of a prompt.")
    keep_best: int = flag(default=1, help="How many of a prompt's completions are trained on.")
    min_reward: list[float] | None = field(
        default=None,
        metadata={"help": "Least reward of what is trained on; several are for ReST's passes."},
    )

    def __post_init__(self):
        super().__post_init__()
        each = self.num_generations
        require(1 <= self.keep_best <= each, "keep_best", f"1 to {each}", self.keep_best)
        passes, least = self.num_iterations, self.min_reward
        wanted = f"one number, or one for each of num_iterations {passes}"
        require(least is None or len(least) in (1, passes), "min_reward", wanted, least)
