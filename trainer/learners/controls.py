"""Numbers that an online run adjusts as it goes: the KL's coefficient, the weight of a cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from prefuse.kernels.credit import update_log_multiplier
from prefuse.kernels.kl import adaptive_coefficient
from prefuse.kernels.segments import segment_sum
from prefuse.kernels.whitening import mean_and_variance, moving_mean, whitening_statistics

from ..dist import Ranks
from ..experience import Window
from ..online_config import PolicyConfig


@dataclass
class Controls:
    """The same on every rank; checkpoints hold them.

    beta: the KL's coefficient. log_multiplier: of the Lagrange multiplier of the cost.
    mean_cost: its moving average; None before the first.
    """

    beta: float = 0.0
    log_multiplier: float = 0.0
    mean_cost: float | None = None

    def adjust(self, config: PolicyConfig, window: Window, ranks: Ranks) -> dict[str, Tensor]:
        """After a window is judged and before it is learnt from; what the log tells."""
        told = {}
        if {"old_logp", "ref_logp"} <= window.columns.keys():
            kl = window.column("old_logp").double() - window.column("ref_logp").double()
            statistics = whitening_statistics(segment_sum(kl, window.cu_seqlens))
            statistics = ranks.total(statistics)
            mean = float(mean_and_variance(statistics)[0])
            told["sequence_kl"] = torch.tensor([mean])
            if config.kl_target is not None:
                steer = dict(target=config.kl_target, horizon=config.kl_horizon)
                count = float(statistics[0])
                self.beta = float(adaptive_coefficient(self.beta, mean, **steer, steps=count))
                told["kl_coef"] = torch.tensor([self.beta])
        if window.costs is not None:
            known = window.costs[~window.costs.isnan()]
            statistics = ranks.total(whitening_statistics(known))
            if statistics[0] > 0:
                share = 0.0 if self.mean_cost is None else config.cost_decay
                mean = moving_mean(self.mean_cost or 0.0, statistics, decay=share)
                self.mean_cost = float(mean)
                moved = update_log_multiplier(
                    torch.tensor(self.log_multiplier, dtype=torch.float64),
                    self.mean_cost - config.cost_limit,
                    rate=config.multiplier_rate,
                    largest=config.multiplier_max,
                )
                self.log_multiplier = float(moved)
            told["cost_multiplier"] = torch.tensor([self.log_multiplier]).exp()
        return told

    def state(self) -> dict[str, float | None]:
        return asdict(self)
