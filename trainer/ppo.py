"""PPO: a critic beside the policy, trained together, and advantages by GAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefuse.kernels.advantage import shaped_gae
from prefuse.kernels.credit import at_ends
from prefuse.kernels.objective import Objective
from prefuse.kernels.value_losses import value_clipped
from prefuse.kernels.whitening import Reduce, whiten

from .advantages import Judged
from .attention import ATTENTION
from .batch import PackedBatch
from .data import Example
from .errors import UserError
from .experience import Window
from .learners import Learner, policy_method
from .model import load_tokenizer
from .objectives import Method
from .online_config import PPOConfig
from .scores import Scorer, hidden_states


class Critic(nn.Module):
    """A value of the state before every scored token: a transformer with a head of one number."""

    def __init__(self, model, layout: str):
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, batch: PackedBatch) -> Tensor:
        """[M], float32; float64 of a float64 model."""
        rows = hidden_states(self.model, self.layout, batch)[batch.score_rows]
        values = self.model.score(rows).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


class ActorCritic(nn.Module):
    """What PPO's optimizer steps."""

    def __init__(self, actor: Scorer, critic: Critic):
        super().__init__()
        self.actor, self.critic = actor, critic


def load_critic(config: PPOConfig, tokenizer) -> Critic:
    """A saved critic or reward model; or the policy's body, whose head of zeros says 0 at first."""
    name = config.critic_model_name_or_path or config.model_name_or_path
    if config.critic_model_name_or_path is not None:
        theirs = load_tokenizer(name, config.trust_remote_code)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--critic_model_name_or_path {name}: wanted the policy's tokenizer, because the "
                "critic reads the same tokens; got another vocabulary"
            )
    shape = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    saved = any("SequenceClassification" in a for a in shape.architectures or ())
    if saved and shape.num_labels != 1:
        raise UserError(f"{name}: wanted a critic of one number; got {shape.num_labels} labels")
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=1,
        dtype=getattr(torch, config.dtype),
        attn_implementation="sdpa" if config.layout == "padded" else ATTENTION,
        trust_remote_code=config.trust_remote_code,
    )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"{name}: wanted a model with a linear head `score`; {type(model)} has none"
        )
    if not saved:
        nn.init.zeros_(model.score.weight)
    model.config.use_cache = False
    return Critic(model, config.layout)


def ppo(config: PPOConfig, policy: Method, reduce: Reduce) -> Learner:
    """GAE of rewards at the last token less the KL at every token, whitened over the window."""
    scores = ("old_logp", "values") + (("ref_logp",) if config.beta else ())

    def batches(window: Window, judged: Judged) -> list[list[Example]]:
        column: Callable[[str], Tensor] = lambda name: torch.from_numpy(window.columns[name])  # noqa: E731
        logps = (column("old_logp"), column("ref_logp")) if config.beta else ()
        values = column("values")
        rewards = judged.rewards.to(values.dtype).nan_to_num(nan=0.0)
        found = shaped_gae(
            at_ends(rewards, judged.cu_seqlens, judged.tokens),
            values,
            judged.cu_seqlens,
            *logps,
            kl_coef=config.beta,
            gamma=config.gamma,
            lam=config.lam,
            impl="reference" if values.dtype == torch.float64 else "auto",  # which keeps float64
        )
        white = whiten(found.advantages, reduce(found.statistics))
        warm = window.number >= config.critic_warmup_windows
        window.set("advantages", white if warm else torch.zeros_like(white))
        window.set("returns", found.returns)
        return window.micro_batches()

    def objective(both: ActorCritic, batch: PackedBatch) -> Objective:
        result = policy.objective(both.actor, batch)
        values = both.critic(batch)
        given = batch.columns or {"returns": values.detach(), "values": values.detach()}
        value = value_clipped(
            values, given["returns"], given["values"], cliprange=config.cliprange_value
        )
        metrics = {**result.metrics, **value.metrics, "value_loss": value.loss.detach()}
        return result._replace(loss=result.loss + config.vf_coef * value.loss, metrics=metrics)

    return Learner(policy._replace(objective=objective), scores, batches)


def ppo_method(config: PPOConfig) -> Method:
    """The policy's part; the critic's is counted in tokens too."""
    method = policy_method(config)
    if method.unit != "token":
        raise UserError(
            f"--loss_type {config.loss_type}: it averages over sequences, and the critic's loss "
            "over tokens; pass one that averages over tokens, such as ppo"
        )
    return method
