"""What every rank of tests/test_sharded_head.py runs: a head in shards against the whole one."""

from itertools import product

import conftest  # noqa: F401  finds prefuse in a clone that was never installed
import torch
import torch.distributed as dist
from torch.testing import assert_close

from prefuse.kernels.linear_logp import VocabShard, linear_logp, linear_token_loss, reference
from prefuse.kernels.token_stats import OUTPUTS

FORMS = {
    "plain": dict(),
    "all": dict(bias=True, softcap=3.0, logit_scale=1.5, temperature=0.7),
    "far": dict(bias=True, spread=10.0),  # targets far from the largest logit: anchors are raised
}
H = 16


def inputs(vocab: int, tokens: int, form: dict, dtype: torch.dtype):
    """The same on every rank; some targets in each shard."""
    generator = torch.Generator().manual_seed(vocab + tokens)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, weight = draw(tokens, H), draw(vocab, H, scale=form.get("spread", 1.0) / H**0.5)
    bias = draw(vocab) if form.get("bias") else None
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator), bias, draw(tokens)


def options(form: dict) -> dict:
    return {k: v for k, v in form.items() if k not in ("bias", "spread")}


def loss_of(stats, coef):
    """Reads what has a gradient, differently for each token."""
    return (coef * stats.logp).sum() + (0.3 * coef * stats.entropy + 0.1 * stats.lse).sum()


def whole(vocab, tokens, form, outputs):
    """Values and gradients in float64 on one process; and the most that two logits of a token
    differ, to whose rounding its entropy is known."""
    hidden, weight, targets, bias, coef = inputs(vocab, tokens, form, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    stats = reference(hidden, weight, targets, bias, **options(form), outputs=outputs)
    loss = loss_of(stats, coef) if "entropy" in outputs else (coef * stats.logp).sum()
    logits = hidden @ weight.t() * form.get("logit_scale", 1.0) / form.get("temperature", 1.0)
    apart = float((logits.amax(1) - logits.amin(1)).max()) if tokens else 1.0
    return stats, torch.autograd.grad(loss, leaves), apart


def close(found, wanted, name, scale: float = 1.0):
    """To 1e-6 of the largest number, or of `scale` if that is larger."""
    wanted = wanted.to(found.dtype)
    if wanted.dtype == torch.bool:
        assert torch.equal(found, wanted), name
        return
    scale = max(scale, float(wanted.abs().max()) if wanted.numel() else 0.0)
    limit = scale * (1e-12 if found.dtype == torch.float64 else 1e-6)
    assert_close(found, wanted, atol=limit, rtol=0, msg=lambda m: f"{name}: {m}")


def cut(x, rank: int, world: int):
    """As torch shards a tensor: equal pieces but the last, of which some may be empty."""
    size = -(-len(x) // world)
    return x[rank * size : (rank + 1) * size].clone()


def check(rank, world, vocab, tokens, form, own, mode, dtype, impl="auto"):
    name = f"{vocab} {tokens} {form} own={own} {mode} {dtype}"
    given = FORMS[form]
    outputs = OUTPUTS if mode != "stash" or not given.get("softcap") else ("logp", "lse")
    wanted, gradients, apart = whole(vocab, tokens, given, outputs)
    hidden, weight, targets, bias, coef = inputs(vocab, tokens, given, dtype)
    pieces = [cut(x, rank, world).requires_grad_() for x in (weight, bias) if x is not None]
    mine = slice(0, tokens)
    if own:  # the last rank has none
        size = -(-tokens // max(world - 1, 1))
        mine = slice(min(rank * size, tokens), min((rank + 1) * size, tokens))
    hidden = hidden[mine].clone().requires_grad_()
    shard = VocabShard.of(dist.group.WORLD, len(pieces[0]), "cpu", own_tokens=own)
    assert shard.total == vocab
    stats = linear_logp(
        hidden,
        pieces[0],
        targets[mine],
        pieces[1] if bias is not None else None,
        **options(given),
        outputs=outputs,
        mode=mode,
        impl=impl,
        group=shard if own else dist.group.WORLD,
    )
    for field, one, other in zip(stats._fields, stats, wanted, strict=True):
        assert (one is None) == (other is None), f"{name}: {field}"
        if one is not None:
            close(one, other[mine], f"{name}: {field}", apart)
    entropies = "entropy" in outputs
    loss = loss_of(stats, coef[mine]) if entropies else (coef[mine] * stats.logp).sum()
    found = torch.autograd.grad(loss, [hidden, *pieces])
    expected = [gradients[0][mine], *(cut(g, rank, world) for g in gradients[1:])]
    for label, one, other, full in zip("hwb", found, expected, gradients, strict=False):
        largest = float(full.abs().max()) if full.numel() else 1.0
        close(one, other, f"{name}: d {label}", largest)


def check_token_loss(rank, world, vocab, own):
    """The inline gradients, with an extra that is sliced along."""
    hidden, weight, targets, bias, coef = inputs(vocab, 11, FORMS["all"], torch.float64)
    given = options(FORMS["all"])

    def token_loss(stats, c):
        return c * stats.logp + 0.5 * stats.logp.exp()

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    stats = reference(hidden, weight, targets, bias, **given)
    wanted = token_loss(stats, coef)
    gradients = torch.autograd.grad(wanted.sum() / 3, leaves)
    size = -(-11 // world)
    mine = slice(rank * size, (rank + 1) * size) if own else slice(0, 11)
    ours = hidden.detach().float()[mine].requires_grad_()
    pieces = [cut(x.detach().float(), rank, world).requires_grad_() for x in (weight, bias)]
    shard = VocabShard.of(dist.group.WORLD, len(pieces[0]), "cpu", own_tokens=own)
    loss, told = linear_token_loss(
        ours, pieces[0], targets[mine], token_loss, coef.float()[mine], bias=pieces[1],
        budget_bytes=4 * vocab, group=shard, **given,
    )  # fmt: skip
    close(loss, wanted.detach()[mine], "token loss")
    close(told.logp, stats.logp.detach()[mine], "token loss: logp")
    found = torch.autograd.grad(loss.sum() / 3, [ours, *pieces])
    expected = [gradients[0][mine], *(cut(g, rank, world) for g in gradients[1:])]
    for one, other in zip(found, expected, strict=True):
        close(one, other, f"token loss {own}")


def main(rank: int, world: int) -> None:
    for vocab, own, mode, form in product(
        (50, 7, 5), (False, True), ("stash", "recompute", "auto"), FORMS
    ):
        check(rank, world, vocab, 11, form, own, mode, torch.float32)
    for own, form in product((False, True), FORMS):
        check(rank, world, 50, 11, form, own, "auto", torch.float64)
        check(rank, world, 50, 0, form, own, "auto", torch.float32)
    check(rank, world, 50, 11, "far", True, "stash", torch.float32, impl="torch")
    for vocab, own in product((50, 5), (False, True)):
        check_token_loss(rank, world, vocab, own)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
