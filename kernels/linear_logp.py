"""Per-token log-probabilities straight from hidden states: the language-model head and the loss's
log-softmax in one op that never holds an [N, V] tensor of logits.

    logits = logit_scale * (hidden @ weight.T + bias), softcapped, divided by the temperature

Forward, one tile of the vocabulary at a time: logits tile (GEMM 1, float32 accumulators), folded at
once into per-token sums anchored at the target (token_stats.py). With upstream gradient g [N] of
logp and E the exponentials of the fold, the target's replaced by -S:

    d hidden = -(g / (1 + S)) * (E @ weight)           GEMM 2
    d weight = E.T @ (-(g / (1 + S)) * hidden)         GEMM 3, one writer per tile, fixed order

so any loss costs three GEMMs when E is kept ("stash": V elements a token, bfloat16 for 16-bit
inputs) and four when it is made again ("recompute"). A frozen weight or hidden skips its GEMM;
tokens with no upstream gradient skip GEMMs 2 and 3. All sums, and both gradients until they are
written, are float32. GEMMs are PyTorch's and the fold is fold.py's, or GEMM 1 and the fold are one
kernel, gemm_fold.py's.

`linear_token_loss` does the same for a loss that is a function of each token alone: forward and
backward of a run of tokens follow each other, in three GEMMs and constant memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import logp as logits_op
from .head_plan import (
    DEFAULT_BUDGET,
    check_fused,
    check_head,
    head_options,
    needs_gradient,
    plan,
)
from .launch import differentiated_once, expect
from .tiled_head import (
    Head,
    Options,
    Rows,
    aligned_empty,
    anchor_logits,
    for_device,
    head_backward,
    head_forward,
    run_slices,
    stash_targets,
)
from .token_stats import Coefficients, TokenStats, coefficients, finalize, parts_for
from .vocab_shard import VocabShard, as_shard, everyones, weight_moves, whole_head

__all__ = ["TokenStats", "VocabShard", "linear_logp", "linear_token_loss", "reference"]


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
) -> TokenStats:
    """Plain PyTorch with all logits in memory; float64 stays float64."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.nn.functional.linear(
        hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    )
    return logits_op.reference(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        outputs=outputs,
    )


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, inverse_temperature, options, outputs, stash_rows
    ):
        head = Head(weight, bias, options)
        with torch.autocast(hidden.device.type, enabled=False):
            everything = _rows(head, hidden, targets, inverse_temperature)
            sums, kept = [], []
            for run in run_slices(len(targets), stash_rows):
                rows = everything.select(run)
                if run.start < stash_rows:
                    rows = rows._replace(kept=_new_stash(head, hidden, len(rows.targets)))
                    kept.append(rows.kept)
                sums.append(head_forward(head, rows, parts_for(outputs)))
                stash_targets(head, rows, sums[-1])
            sums = torch.cat(sums, 1)
            stats = finalize(sums, everything.anchor, inverse_temperature, head.vocab, outputs)
        ctx.save_for_backward(
            hidden, weight, bias, targets, inverse_temperature, everything.anchor, sums
        )
        ctx.options, ctx.kept, ctx.stash_rows = options, kept, stash_rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in stats[3:] if x is not None))
        return tuple(stats)

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy, grad_lse, *_):
        differentiated_once("linear_logp")
        hidden, weight, bias, targets, inverse_temperature, anchor, sums = ctx.saved_tensors
        head = Head(weight, bias, ctx.options)
        everything = _anchored(head, hidden, targets, anchor, inverse_temperature)
        c = coefficients(sums, grad_logp, grad_entropy, grad_lse)
        live = _live(grad_logp, grad_entropy, grad_lse)
        runs, indices = [], []
        for number, run in enumerate(run_slices(len(targets), ctx.stash_rows)):
            rows = everything.select(run)
            if run.start < ctx.stash_rows:
                rows = rows._replace(kept=ctx.kept[number])
            rows, run_c, alive = _compact(rows, c.select(run), live[run])
            if len(alive):
                runs.append((rows, run_c))
                indices.append(alive + run.start)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = [torch.zeros_like(r.hidden, dtype=torch.float32) for r, _ in runs]
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        plain = grad_entropy is None and grad_lse is None
        head_backward(head, runs, plain, d_hidden if need_hidden else None, d_weight, d_bias)
        if not need_hidden:
            return None, d_weight, d_bias, *[None] * 5
        _sum_over_ranks(head, d_hidden)
        out = torch.zeros_like(hidden)
        for index, values in zip(indices, d_hidden, strict=True):
            out[index] = values.to(hidden.dtype)
        return out, d_weight, d_bias, *[None] * 5


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, inverse_temperature, options, outputs, token_loss,
        run_rows, *extras,
    ):  # fmt: skip
        head = Head(weight, bias, options)
        needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        needs = needs if run_rows else [False] * 3
        d_hidden = torch.zeros_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
        losses, all_stats = [], []
        stashes = options.softcap is None or "entropy" not in outputs
        with torch.autocast(hidden.device.type, enabled=False):
            everything = _rows(head, hidden, targets, inverse_temperature)
            for run in run_slices(len(targets), 0, run_rows):
                rows = everything.select(run)
                if any(needs) and stashes:
                    rows = rows._replace(kept=_new_stash(head, hidden, len(rows.targets)))
                sums = head_forward(head, rows, parts_for(outputs))
                stash_targets(head, rows, sums)
                stats = finalize(sums, rows.anchor, rows.inverse_temperature, head.vocab, outputs)
                loss, grads = _loss_and_gradients(token_loss, stats, [x[run] for x in extras])
                losses.append(loss)
                all_stats.append(stats)
                if not any(needs):
                    continue
                rows, c, alive = _compact(rows, coefficients(sums, *grads), _live(*grads))
                run_hidden = torch.zeros_like(rows.hidden, dtype=torch.float32)
                head_backward(
                    head, [(rows, c)], grads[1] is None and grads[2] is None,
                    None if d_hidden is None else [run_hidden], d_weight, d_bias, accumulate=True,
                )  # fmt: skip
                if d_hidden is not None:
                    _sum_over_ranks(head, [run_hidden])
                    d_hidden[alive + run.start] = run_hidden.to(hidden.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        stats = [None if x[0] is None else torch.cat(x) for x in zip(*all_stats, strict=True)]
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return torch.cat(losses), *stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        differentiated_once("linear_token_loss")
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if d_hidden is not None:
            d_hidden = d_hidden * grad_loss[:, None].to(d_hidden.dtype)
        if len(grad_loss) and (d_weight is not None or d_bias is not None):
            # a sum's gradient is one number expanded; anything else is compared, which waits
            if (
                grad_loss.stride(0) != 0
                and bool((grad_loss != grad_loss[0]).any())
                and bool(
                    grad_loss.isfinite().all()  # not finite is the caller's to find
                )
            ):
                raise RuntimeError(
                    "linear_token_loss: wanted one upstream gradient for all tokens, as of "
                    "loss.sum() * constant; got different ones. Pass per-token weights through "
                    "`extras` and multiply inside `token_loss`, or use linear_logp"
                )
            weight_dtype, bias_dtype = ctx.dtypes
            d_weight = None if d_weight is None else (d_weight * grad_loss[0]).to(weight_dtype)
            d_bias = None if d_bias is None else (d_bias * grad_loss[0]).to(bias_dtype)
        return d_hidden, d_weight, d_bias, *[None] * (len(ctx.needs_input_grad) - 3)


def _rows(head: Head, hidden: Tensor, targets: Tensor, inverse_temperature: Tensor) -> Rows:
    x = hidden.to(head.options.dtype)
    return _anchored(head, x, targets, anchor_logits(head, x, targets), inverse_temperature)


def _anchored(
    head: Head, hidden: Tensor, targets: Tensor, anchor: Tensor, inverse_temperature: Tensor
) -> Rows:
    if head.options.shard is not None:
        targets = targets - head.options.shard.start
    return Rows(hidden.to(head.options.dtype), targets, anchor, inverse_temperature, None)


def _sum_over_ranks(head: Head, d_hidden: list[Tensor]) -> None:
    """Every rank has what its part of the vocabulary says of the hidden states."""
    shard = head.options.shard
    if shard is not None and not shard.partial:
        for part in d_hidden:
            shard.summed(part)


def _new_stash(head: Head, hidden: Tensor, n: int) -> Tensor:
    dtype = torch.float32 if hidden.dtype == head.options.dtype == torch.float32 else torch.bfloat16
    return aligned_empty(n, len(head.weight), dtype, hidden.device)


def _live(*grads: Tensor | None) -> Tensor:
    """Which tokens have any upstream gradient."""
    return torch.stack([g != 0 for g in grads if g is not None]).any(0)


def _compact(rows: Rows, c: Coefficients, live: Tensor) -> tuple[Rows, Coefficients, Tensor]:
    """Only the live tokens, and their indices: the others would multiply zeros."""
    alive = live.nonzero().squeeze(1)
    if len(alive) < len(live):
        rows, c = rows.select(alive), c.select(alive)
    return rows, c, alive


def _loss_and_gradients(token_loss, stats: TokenStats, extras):
    """The loss per token and its gradient in logp, entropy and lse (None where it has none)."""
    with torch.enable_grad():
        logp = stats.logp.detach().requires_grad_()
        others = [None if x is None else x.detach().requires_grad_() for x in stats[1:3]]
        leaves = stats._replace(logp=logp, entropy=others[0], lse=others[1])
        loss = token_loss(leaves, *extras)
        shape = stats.logp.shape
        expect(loss.shape == shape, "token_loss", f"a loss of shape {tuple(shape)}", loss.shape)
        present = [logp, *(x for x in others if x is not None)]
        if not loss.requires_grad:
            return loss.detach(), (torch.zeros_like(logp), None, None)
        found = iter(torch.autograd.grad(loss.sum(), present, allow_unused=True))
    grad_logp = next(found)
    rest = (None if x is None else next(found) for x in others)
    return loss.detach(), (torch.zeros_like(logp) if grad_logp is None else grad_logp, *rest)


def _settle(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature, group, impl,
    *, softcap, logit_scale, outputs,
) -> tuple[Options, Tensor, int]:  # fmt: skip
    """After the checks: the options, 1 / temperature [N], and a rank's entries to plan with."""
    check_head(hidden, weight, bias)
    shard = None if group is None else as_shard(group, weight)
    vocab, most = (len(weight),) * 2 if shard is None else (shard.total, shard.most)
    logits_op.check_softcaps(softcap=softcap)
    inverse_temperature = logits_op.check_common(targets, temperature, outputs, hidden, vocab)
    impls = ("triton", "fused", "cpu", "torch")
    options = head_options(hidden, logit_scale, softcap, impl, shard, impls)
    if options.impl != "reference":
        logits_op.check_narrow("hidden", hidden)
    if options.impl == "fused":
        check_fused(hidden, weight, options)
    return options, inverse_temperature, most


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    mode: str = "auto",
    budget_bytes: int | None = None,
    impl: str = "auto",
    group=None,
) -> TokenStats:
    """log softmax(head(hidden)) at the targets, and what else is asked for, without the logits.

    Args:
        hidden: [N, H] hidden states that predict the targets; float32, bfloat16 or float16 (float64
            runs the reference). Under autocast its dtype is autocast's.
        weight: [V, H] of the language-model head; it may be wider than `hidden` (float32 masters).
        targets: [N] int64 in [0, V). Pass only tokens that count: there is no ignore index.
        bias: [V] or None.
        temperature: a positive number, or [N] for one per token; no gradient flows into it.
        softcap: c in c * tanh(logit / c), applied before the temperature; None for none.
        logit_scale: multiplies the logits before the softcap.
        outputs: any of "logp", "entropy", "lse", "mean_logit", "log_sum_sq", "top1".
        mode: "stash" keeps V elements a token until backward, "recompute" nothing, "auto" as many
            tokens as fit `budget_bytes`; `plan` tells beforehand what will be done.
        budget_bytes: for "auto"; 4 GiB on a GPU and 1 GiB on a CPU unless given.
        impl: "auto", "reference", "torch", "cpu", "triton" (products by cuBLAS, folded a tile at a
            time) or "fused" (GEMM 1 folds what it computes; 16-bit operands on NVIDIA's Hopper).
        group: a process group over whose ranks the vocabulary is split: `weight` and `bias` are
            this rank's entries, in the order of ranks, and get the gradients of these. The ranks
            give the same tokens and upstream gradients; with a VocabShard, which knows where the
            entries begin, each may give tokens of its own: of all ranks' hidden states and the
            weight what is fewer bytes travels. Where the entries begin in a group alone is asked at
            every call, which waits on a GPU.

    Returns:
        TokenStats, float32 [N] each, in nats; None where not asked for. logp, entropy and lse carry
        gradients to hidden, weight and bias.

    Raises:
        ValueError: a shape, dtype or value that does not fit; it names the tensor.
    """
    form: dict[str, Any] = dict(softcap=softcap, logit_scale=logit_scale, outputs=outputs)
    options, inverse_temperature, most = _settle(
        hidden, weight, targets, bias, temperature, group, impl, **form
    )
    if options.shard is not None and options.shard.own_tokens:
        tokens, shared = everyones(options.shard, targets, options.impl)
        rest: dict[str, Any] = dict(mode=mode, budget_bytes=budget_bytes, impl=impl, **form)
        if weight_moves(tokens.total, hidden.dtype, shared.total, weight.dtype):
            weight, bias = whole_head(weight, bias, shared, partial=True)
            return linear_logp(hidden, weight, targets, bias, temperature=temperature, **rest)
        stats = linear_logp(
            tokens.gather(hidden, shared.partial),
            weight,
            tokens.all(targets),
            bias,
            temperature=tokens.all_of(temperature),
            group=shared,
            **rest,
        )
        return tokens.mine(stats)
    if options.impl == "reference":
        if options.shard is not None:
            weight, bias = whole_head(weight, bias, options.shard)
        return reference(hidden, weight, targets, bias, temperature=temperature, **form)
    capped_entropy = softcap is not None and "entropy" in outputs
    if capped_entropy:  # E carries the softcap's slope, so its logarithm is not d
        remedy = "Pass mode='auto' or 'recompute'"
        expect(mode != "stash", "mode", "'recompute' for entropy under a softcap", "stash", remedy)
        mode = "recompute"
    stash_rows = 0
    if needs_gradient(hidden, weight, bias):
        given: dict[str, Any] = dict(mode=mode, budget_bytes=budget_bytes, device=hidden.device)
        stash_rows = plan(len(hidden), most, options.dtype, **given).stash_rows
    targets = targets.contiguous()  # kernels read by address
    return TokenStats(
        *_LinearLogp.apply(
            hidden, weight, bias, targets, inverse_temperature, options, tuple(outputs), stash_rows
        )
    )


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: Callable[..., Tensor],
    *extras: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    budget_bytes: int | None = None,
    impl: str = "auto",
    group=None,
) -> tuple[Tensor, TokenStats]:
    """A loss of each token's own statistics, its gradients made in the forward pass.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, outputs, impl, group: as
            in `linear_logp`.
        token_loss: `token_loss(stats, *extras) -> [n]`, pure and token-local: token i's loss reads
            row i alone. It is called on runs of tokens.
        extras: tensors [N, ...] sliced along with the tokens (advantages, old log-probs, weights);
            no gradient flows into them.
        budget_bytes: for one run's exponentials; 4 GiB on a GPU and 1 GiB on a CPU unless given.

    Returns:
        loss [N] and the detached TokenStats. The upstream gradient of `loss` must be the same for
        every token, as of `loss.sum() * constant`: weigh tokens inside `token_loss`.

    Raises:
        ValueError: a shape, dtype or value that does not fit; it names the tensor.
        RuntimeError: in backward, if tokens have different upstream gradients.
    """
    form: dict[str, Any] = dict(softcap=softcap, logit_scale=logit_scale, outputs=outputs)
    options, inverse_temperature, most = _settle(
        hidden, weight, targets, bias, temperature, group, impl, **form
    )
    for index, extra in enumerate(extras):
        expect(len(extra) == len(targets), f"extras[{index}]", f"{len(targets)} rows", len(extra))
        expect(not extra.requires_grad, f"extras[{index}]", "no gradient", "requires_grad=True")
    if options.shard is not None and options.shard.own_tokens:
        tokens, shared = everyones(options.shard, targets, options.impl)
        rest: dict[str, Any] = dict(budget_bytes=budget_bytes, impl=impl, **form)
        if weight_moves(tokens.total, hidden.dtype, shared.total, weight.dtype):
            weight, bias = whole_head(weight, bias, shared, partial=True)
            given = (hidden, weight, targets, token_loss, *extras)
            return linear_token_loss(*given, bias=bias, temperature=temperature, **rest)
        loss, stats = linear_token_loss(
            tokens.gather(hidden, shared.partial),
            weight,
            tokens.all(targets),
            token_loss,
            *(tokens.all(extra) for extra in extras),
            bias=bias,
            temperature=tokens.all_of(temperature),
            group=shared,
            **rest,
        )
        own = tokens.mine(stats._replace(logp=loss))
        return own.logp, own._replace(logp=stats.logp[tokens.place])
    if options.impl == "reference":
        if options.shard is not None:
            weight, bias = whole_head(weight, bias, options.shard)
        stats = reference(hidden, weight, targets, bias, temperature=temperature, **form)
        return token_loss(stats, *extras), stats.detach()
    run_rows = 0
    if needs_gradient(hidden, weight, bias):
        mode = plan(1, most, options.dtype, mode="stash")
        budget = budget_bytes or for_device(DEFAULT_BUDGET, hidden.device)
        run_rows = max(1, budget // mode.stash_bytes)
    targets = targets.contiguous()  # kernels read by address
    loss, *stats = _LinearTokenLoss.apply(
        hidden, weight, bias, targets, inverse_temperature, options, tuple(outputs), token_loss,
        run_rows, *extras,
    )  # fmt: skip
    return loss, TokenStats(*stats)
