"""Which loss a method trains, as a function of a scorer and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefuse.kernels.linear_logp import TokenStats
from prefuse.kernels.objective import Objective, Unit
from prefuse.kernels.preference import LOSSES, inputs, preference_loss
from prefuse.kernels.segments import segment_sum

from .batch import PackedBatch
from .errors import UserError
from .scores import Scorer, Unadapted

# what `dpo` gives a loss of a pair, from scores and from columns of the data
PROVIDED = {"chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len"}
JUDGED = ("margin", "preference")
EXPLORED = "explored"  # of an online pair: 1 where the reference sampled the chosen completion

Reference = Callable[[PackedBatch], Tensor]


def _nothing(*_) -> None:
    pass


class Method(NamedTuple):
    """What is minimised, and the unit it is counted in.

    objective: of what is trained (a Scorer; PPO's ActorCritic) and a batch.
    after_step: called with the number of optimizer steps done.
    modules: what changes besides the policy, by a name under which checkpoints hold it.
    before_step: called with the scorer and this rank's micro-batches of the step, for numbers of
        the whole step that the loss reads; every rank calls it.
    """

    objective: Callable[[Any, PackedBatch], Objective]
    unit: Unit
    after_step: Callable[[int], None] = _nothing
    modules: Mapping[str, nn.Module] = MappingProxyType({})
    before_step: Callable[[Any, list[PackedBatch]], None] = _nothing


def sft() -> Method:
    """Negative log-likelihood per token."""
    return Method(_sft, "token")


def _sft(scorer: Scorer, batch: PackedBatch) -> Objective:
    loss, stats = scorer(batch, ("logp", "entropy", "top1"), token_loss=_nll)
    metrics = {"entropy": stats.entropy, "mean_token_accuracy": stats.top1.float()}
    return Objective(loss, "token", metrics)


def _nll(stats: TokenStats) -> Tensor:
    return -stats.logp


def sequence_logps(scorer: Scorer | Unadapted, batch: PackedBatch) -> Tensor:
    """log pi of every scored sequence [Q]: float32 sums over its tokens."""
    return segment_sum(scorer(batch).logp, batch.score_cu_seqlens)


def judged_columns(loss_type: str) -> tuple[str, ...]:
    """The columns of the data, besides its texts, that a pair loss reads."""
    needed = inputs(LOSSES[loss_type])
    return tuple(name for name in (*JUDGED, EXPLORED) if name in needed)


def needs_reference(loss_type: str) -> bool:
    return "ref_chosen" in inputs(LOSSES[loss_type])


def learns_from_identical(loss_type: str, hyperparameters: dict[str, Any]) -> bool:
    """Whether a pair of equal completions has a gradient: by a likelihood term, say."""
    two = torch.ones(2, dtype=torch.float64)
    reference = torch.tensor([-2.5, -1.5], dtype=torch.float64)  # below and above the policy's
    given = dict(ref_chosen=reference, ref_rejected=reference, margin=two, preference=0.75 * two)
    given |= dict(chosen_len=2 * two, rejected_len=2 * two)
    others = {k: given[k] for k in inputs(LOSSES[loss_type]) if k in given}
    logp = (-2 * two).requires_grad_()
    loss = preference_loss(logp, logp, loss_type=loss_type, **others, **hyperparameters).loss
    return bool((torch.autograd.grad(loss.sum(), logp)[0].abs() > 1e-12).any())


def dpo(
    reference: Reference | None,
    loss_type: str,
    hyperparameters: dict[str, Any],
    previous: Reference | None = None,
) -> Method:
    """A preference loss on pairs packed as chosen, rejected, chosen, rejected, ...

    previous: the policy of the round before, for a loss that reads it.
    """
    columns = judged_columns(loss_type)

    def objective(scorer: Scorer, batch: PackedBatch) -> Objective:
        chosen, rejected = _halves(sequence_logps(scorer, batch))
        chosen_len, rejected_len = _halves(batch.score_cu_seqlens.diff())
        ref_chosen = ref_rejected = None
        if reference is not None:
            ref_chosen, ref_rejected = _halves(reference(batch))
        table = batch.judged.reshape(len(batch.examples), len(columns))
        given = dict(zip(columns, table.unbind(1), strict=True))
        if EXPLORED in given:
            given[EXPLORED] = torch.where(given[EXPLORED] > 0.5, chosen, rejected)
        if previous is not None:
            given["prev_chosen"], given["prev_rejected"] = _halves(previous(batch))
        loss = preference_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss_type=loss_type,
            chosen_len=chosen_len,
            rejected_len=rejected_len,
            **given,
            **hyperparameters,
        )
        logps = {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}
        return loss._replace(metrics={**loss.metrics, **logps})

    return Method(objective, "pair")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[0::2], x[1::2]


def live_reference(scorer: Scorer | Unadapted) -> Reference:
    """Reference log-probs by a frozen model, as they are needed."""

    @torch.no_grad()
    def score(batch: PackedBatch) -> Tensor:
        return sequence_logps(scorer, batch)

    return score


def following(
    method: Method, scorer: Scorer, reference: Scorer, alpha: float, every: int
) -> Method:
    """TR-DPO, arXiv:2404.09656: ref <- alpha policy + (1 - alpha) ref, every `every` steps."""
    wanted, got = ({k: p.shape for k, p in s.named_parameters()} for s in (scorer, reference))
    if wanted != got:
        raise UserError(
            "--sync_ref_model: wanted a reference of the policy's architecture; got "
            f"{type(reference.model).__name__} of other shapes than {type(scorer.model).__name__}"
        )

    @torch.no_grad()
    def after_step(done: int) -> None:
        method.after_step(done)
        if done % every == 0:
            for old, new in zip(reference.parameters(), scorer.parameters(), strict=True):
                old.lerp_(new, alpha)

    modules = {**method.modules, "reference": reference}
    return method._replace(after_step=after_step, modules=modules)


def column_reference(name: str) -> Reference:
    """Log-probs of sequences from those of their tokens that travel with the examples."""

    def score(batch: PackedBatch) -> Tensor:
        nothing = torch.zeros(len(batch.targets), device=batch.targets.device)
        return segment_sum(batch.columns.get(name, nothing), batch.score_cu_seqlens)

    return score


def cached_reference(table: Tensor) -> Reference:
    """Reference log-probs [E, sequences] computed beforehand, looked up by example."""
    return lambda batch: table[batch.examples].flatten()
