"""EGPO's two steps, arXiv:2503.08942: one ahead, to see whom the policy will meet, and the real one
from where the first began."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim import Optimizer


class Extragradient:
    """Called with a window's number when opponents are sampled and the policy's own are not.

    Before an even window parameters and optimizer are remembered; before an odd one, whose
    opponents came from the step ahead, they are put back. The own completions, the log-probs and
    the gradient of both steps are those of the remembered policy.
    """

    def __init__(self, policy: nn.Module, optimizer: Optimizer):
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.kept: list[torch.Tensor] = []
        self.state: dict = {}

    @torch.no_grad()
    def __call__(self, number: int) -> None:
        if number % 2 == 0:
            self.kept = [p.detach().clone() for p in self.parameters]
            self.state = copy.deepcopy(self.optimizer.state_dict())
            return
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)
        self.optimizer.load_state_dict(self.state)
        self.kept, self.state = [], {}
