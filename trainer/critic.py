"""A critic beside the policy: its model, and the two as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import lora
from .batch import PackedBatch
from .config import TrainConfig
from .dist import Ranks
from .errors import UserError
from .model import load_tokenizer
from .reward_model import load_scores
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
    """What the optimizer steps; cost_critic: of a run with costs."""

    def __init__(self, actor: Scorer, critic: Critic, cost_critic: Critic | None = None):
        super().__init__()
        self.actor, self.critic, self.cost_critic = actor, critic, cost_critic


def load_critic(
    config: TrainConfig, tokenizer, ranks: Ranks, flag: str = "critic_model_name_or_path"
) -> Critic:
    """A saved critic or reward model; or the policy's body, whose head of zeros says 0 at first."""
    chosen = getattr(config, flag)
    name = chosen or config.model_name_or_path
    if chosen is not None:
        theirs = load_tokenizer(name, config.trust_remote_code)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--{flag} {name}: wanted the policy's tokenizer, because the "
                "critic reads the same tokens; got another vocabulary"
            )
    model = load_scores(
        name,
        num_labels=1,
        dtype=getattr(torch, config.dtype),
        layout=config.layout,
        trust_remote_code=config.trust_remote_code,
        zeros=True,
        in_shards=ranks.world > 1,
    )
    lora.attach(config, model, base=name)
    return Critic(model, config.layout)
