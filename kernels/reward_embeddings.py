"""Contrastive losses on hidden states, added with a weight to a reward model's own loss.

h(z) = -log sigmoid(z); cos is the cosine, 0 for a vector of zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect
from .objective import Objective
from .preference_parts import logistic
from .reward_parts import check_shape, full, unit_vectors


def goal_contrastive(
    state: Tensor, goal: Tensor, other_goal: Tensor, *, cosine: bool = True, scale: float = 1.0
) -> Objective:
    """Goal-conditioned, arXiv:2407.13887: h(f(x, g)) + h(-f(x, g')), f = scale cos or scale dot.

    state: x [P, H], a hidden state of a preferred answer. goal: g [P, H], a later state of the same
    answer. other_goal: g' [P, H], a state of a rejected answer. cosine=False takes the dot product.
    Unit: pair.
    """
    expect(state.dim() == 2, "state", "[P, H], one state per row", tuple(state.shape))
    expect(scale > 0, "scale", "a positive number", scale)
    check_shape("goal", goal, state.shape)
    check_shape("other_goal", other_goal, state.shape)
    x, g, other = (unit_vectors(full(v)) if cosine else full(v) for v in (state, goal, other_goal))
    near, far = scale * (x * g).sum(1), scale * (x * other).sum(1)
    return Objective(
        logistic(near) + logistic(-far),
        "pair",
        {"similarities/goal": near.detach(), "similarities/other_goal": far.detach()},
    )


def info_nce(
    anchors: Tensor, candidates: Tensor, targets: Tensor | None = None, *, temperature: float = 0.05
) -> Objective:
    """InfoNCE (SimCSE), arXiv:2104.08821: -log softmax_j(cos(a_i, c_j) / temperature) at c_i.

    anchors: [N, H], pooled states. candidates: [C, H], the positives and the negatives of all
    anchors. targets: int64 [N], the row of each anchor's positive; row i for anchor i if None.

    Candidates are given apart so that anchors may be split: pass those of the whole step, gathered
    over ranks with their gradient. Secrets of RLHF II (arXiv:2401.06080) pools the last state, or
    takes the difference of the chosen and the rejected one; positives are a second dropout of the
    same text. Unit: sequence.
    """
    expect(anchors.dim() == 2, "anchors", "[N, H], one state per row", tuple(anchors.shape))
    expect(temperature > 0, "temperature", "a positive number", temperature)
    good = candidates.dim() == 2 and candidates.shape[1:] == anchors.shape[1:]
    expect(good, "candidates", f"[C, {anchors.shape[1]}]", tuple(candidates.shape))
    if targets is None:
        enough = len(candidates) >= len(anchors)
        remedy = "Pass targets, or a positive for each anchor"
        expect(enough, "candidates", f"at least {len(anchors)} rows", len(candidates), remedy)
        targets = torch.arange(len(anchors), device=anchors.device)
    expect(targets.dtype == torch.int64, "targets", "int64 rows of candidates", targets.dtype)
    check_shape("targets", targets, anchors.shape[:1])
    logits = unit_vectors(full(anchors)) @ unit_vectors(full(candidates)).T / temperature
    loss = -logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    right = (logits.argmax(1) == targets).float()
    return Objective(loss, "sequence", {"similarities/accuracies": right})


_ALL = (goal_contrastive, info_nce)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
