"""Packed and shared-prefix attention: against a dense reference in float64, and inside models."""

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels import attention, attention_merge
from prefuse.kernels.attention import (
    KERNELS,
    Flash,
    packed_attention,
    prefix_table,
    reference,
)
from prefuse.kernels.launch import HAS_TRITON, INTERPRETED

# name: (segment lengths, parent of each)
LAYOUTS = {
    "plain": ([3, 1, 17, 40], [-1] * 4),
    "one segment": ([7], [-1]),
    "a pair": ([5, 3, 9], [-1, 0, 0]),
    "one child": ([1, 1], [-1, 0]),
    "1, 2 and 5 children": (
        [33, 7, 1, 2, 3, 35, 1, 1, 6, 64, 5],
        [-1, -1, -1, *[0], 1, 1, *[2] * 5],
    ),
    "loners everywhere": (
        [4, 5, 6, 3, 8, 2, 3, 4, 5, 7, 1],
        [-1, -1, -1, -1, -1, 1, 1, -1, 3, 3, -1],
    ),
    "empty segments": ([0, 4, 0, 3, 0, 5, 2], [-1, -1, -1, 0, 1, 1, 2]),
    "one token each": ([1, 0, 1, 1, 0, 1], [-1, -1, -1, 0, 1, 2]),
    "nothing shared after all": ([3, 0, 0, 2], [-1, -1, 0, 1]),
    "no tokens": ([0, 0], [-1, 0]),
    "no segments": ([], []),
}
HEADS = [(4, 4, 16), (4, 2, 8), (6, 1, 5)]


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(tokens, heads, kv_heads, head_size, dtype=torch.float64, device="cpu"):
    shapes = [(tokens, h, head_size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def with_grads(fn, leaves, upstream):
    """[value, *gradients]"""
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def visible(lengths: list[int], parent: list[int]) -> torch.Tensor:
    """[T, T] bool: the contract, token by token."""
    of_token = [s for s, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(
        [
            [
                key <= row if of_token[key] == s else of_token[key] == parent[s]
                for key in range(len(of_token))
            ]
            for row, s in enumerate(of_token)
        ],
        dtype=torch.bool,
    ).reshape(len(of_token), len(of_token))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_the_masked_softmax(layout):
    lengths, parent = LAYOUTS[layout]
    q, k, v = inputs(sum(lengths), 4, 2, 8)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    weights = scores.masked_fill(~visible(lengths, parent), float("-inf")).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))
    cu = bounds_of(lengths)
    got = reference(q, k, v, cu, prefix_table(cu, parent), scale=0.3)
    assert_close(got, wanted, rtol=0, atol=1e-13)


def test_reference_gradcheck():
    cu = bounds_of([2, 1, 1])
    table = prefix_table(cu, [-1, 0, 0])
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference(q, k, v, cu, table), inputs(4, 2, 1, 2)
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_equals_reference_in_float64(layout, heads):
    lengths, parent = LAYOUTS[layout]
    leaves, cu = inputs(sum(lengths), *heads), bounds_of(lengths)
    table = prefix_table(cu, parent)
    upstream = torch.randn_like(leaves[0])
    got = with_grads(lambda *x: packed_attention(*x, cu, table, impl="cpu"), leaves, upstream)
    wanted = with_grads(lambda *x: reference(*x, cu, table), leaves, upstream)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_cpu_in_narrow_dtypes(dtype, tolerance):
    lengths, parent = LAYOUTS["1, 2 and 5 children"]
    exact, cu = inputs(sum(lengths), 4, 2, 32), bounds_of(lengths)
    table = prefix_table(cu, parent)
    narrow = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    upstream = torch.randn_like(narrow[0])
    got = with_grads(lambda *x: packed_attention(*x, cu, table), narrow, upstream)
    wanted = with_grads(lambda *x: reference(*x, cu, table), exact, upstream.double())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_strided_inputs_and_gradient():
    """As a model passes them: heads before tokens, and the head size not innermost."""
    cu = bounds_of([9, 4])
    table = prefix_table(cu, [-1, 0])
    leaves = inputs(13, 4, 2, 8)
    upstream = torch.randn(8, 4, 13, dtype=torch.float64).permute(2, 1, 0)
    views = [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    wanted = with_grads(lambda *x: reference(*x, cu, table), leaves, upstream)
    for view in views:
        got = with_grads(lambda *x: packed_attention(*map(view, x), cu, table), leaves, upstream)  # noqa: B023
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, rtol=0, atol=1e-12)


def test_without_a_table():
    lengths = [5, 1, 8]
    leaves, cu = inputs(14, 4, 2, 8), bounds_of(lengths)
    for longest in (None, 8):
        got = packed_attention(*leaves, cu, max_seqlen=longest)
        assert_close(got, reference(*leaves, cu), rtol=0, atol=1e-13)


def test_a_shared_prefix_is_the_prefix_repeated():
    prefix, children = 6, [3, 1, 5]
    q, k, v = inputs(prefix + sum(children), 4, 2, 8)
    cu = bounds_of([prefix, *children])
    shared = packed_attention(q, k, v, cu, prefix_table(cu, [-1, 0, 0, 0]))
    start = prefix
    for n in children:
        rows = torch.tensor([*range(prefix), *range(start, start + n)])
        alone = packed_attention(q[rows], k[rows], v[rows], bounds_of([prefix + n]))
        assert_close(shared[:prefix], alone[:prefix], rtol=0, atol=1e-13)
        assert_close(shared[start : start + n], alone[prefix:], rtol=0, atol=1e-13)
        start += n


@pytest.mark.parametrize("unmerged", ["lse", "out"])
def test_the_backward_needs_the_merged_out_and_lse(unmerged):
    """Given its own part's out or lse instead, a flash backward is wrong, and this would show."""
    lengths, parent = LAYOUTS["a pair"]
    leaves, cu = inputs(sum(lengths), 4, 2, 8), bounds_of(lengths)
    table = prefix_table(cu, parent)
    cpu = KERNELS["cpu"]

    def backward(dout, q, k, v, out, lse, segments):
        own_out, own_lse = cpu.forward(q, k, v, segments)
        out, lse = (out, own_lse) if unmerged == "lse" else (own_out, lse)
        return cpu.backward(dout, q, k, v, out, lse, segments)

    def run(flash):
        return lambda *x: attention._PackedAttention.apply(*x, table, 8**-0.5, flash)

    upstream = torch.randn_like(leaves[0])
    right = with_grads(run(cpu), leaves, upstream)
    wrong = with_grads(run(Flash(cpu.forward, backward)), leaves, upstream)
    assert torch.equal(right[0], wrong[0])
    for a, b in zip(right[1:3], wrong[1:3], strict=True):  # dq and dk; dv knows no out
        assert (a - b).abs().max() > 1e-2
    assert ((right[3] - wrong[3]).abs().max() > 1e-2) == (unmerged == "lse")


def test_rows_without_keys_may_come_back_as_anything():
    """GPU kernels differ on a query segment that has no keys: lse inf or -inf, out untouched."""
    lengths, parent = LAYOUTS["loners everywhere"]
    leaves, cu = inputs(sum(lengths), 4, 2, 8), bounds_of(lengths)
    table, cpu = prefix_table(cu, parent), KERNELS["cpu"]
    assert table.has_prefix is not None and not table.has_prefix.all()

    def forward(q, k, v, segments):
        out, lse = cpu.forward(q, k, v, segments)
        if not segments.causal:
            out[~table.has_prefix] = float("nan")
            lse[:, ~table.has_prefix] = float("inf")
        return out, lse

    def backward(dout, q, k, v, out, lse, segments):
        dq, dk, dv = cpu.backward(dout, q, k, v, out, lse, segments)
        if not segments.causal:
            dq[~table.has_prefix] = float("nan")
        return dq, dk, dv

    def run(flash):
        return lambda *x: attention._PackedAttention.apply(*x, table, 1.0, flash)

    upstream = torch.randn_like(leaves[0])
    got = with_grads(run(Flash(forward, backward)), leaves, upstream)
    for a, b in zip(got, with_grads(run(cpu), leaves, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["loners everywhere", "1, 2 and 5 children"])
def test_isolation_is_bitwise(layout):
    lengths, parent = LAYOUTS[layout]
    cu = bounds_of(lengths)
    table = prefix_table(cu, parent)
    leaves = inputs(sum(lengths), 4, 2, 8, torch.float32)
    before = packed_attention(*leaves, cu, table).detach()
    for changed in range(len(lengths)):
        own = slice(int(cu[changed]), int(cu[changed + 1]))
        perturbed = [x.detach().clone() for x in leaves]
        for x in perturbed:
            x[own] += 1
        differs = (packed_attention(*perturbed, cu, table) != before).flatten(1).any(1)
        for s in range(len(lengths)):
            reached = s == changed or parent[s] == changed
            assert bool(differs[cu[s] : cu[s + 1]].any()) == (reached and lengths[s] > 0)


def test_table():
    lengths, parent = LAYOUTS["loners everywhere"]
    table = prefix_table(bounds_of(lengths).tolist(), torch.tensor(parent))
    # Prefixes are segments 1 and 3; segment 2 lies between them, segment 7 between their children.
    assert table.queries == (26, 47) and table.keys == (4, 18)
    assert table.cu_q.tolist() == [0, 5, 9, 9, 21] and table.cu_k.tolist() == [0, 5, 5, 11, 14]
    assert (table.max_q, table.max_k) == (12, 6)
    assert (table.tokens, table.max_segment, table.longest_row) == (48, 8, 10)
    assert table.has_prefix.tolist() == [True] * 5 + [False] * 4 + [True] * 12
    assert {x.dtype for x in (table.cu_seqlens, table.cu_q, table.cu_k)} == {torch.int32}
    moved = table.to("meta")
    assert moved.cu_q.is_meta and moved.has_prefix.is_meta and moved.max_q == 12
    assert prefix_table([0, 4, 6], [-1, -1]).queries == (0, 0)


@pytest.mark.parametrize(
    "lengths, parent, message",
    [
        ([2, 2], [-1], r"parent: wanted one entry per segment \(2\)"),
        ([2, 2], [-1, 1], r"parent\[1\]: wanted -1 or the index of an earlier segment"),
        ([2, 2], [-1, -2], r"parent\[1\]"),
        ([2, 2, 2], [-1, 0, 1], "One level of sharing"),
        ([2] * 4, [-1, -1, 1, 0], "Sort the children by parent"),
        ([2] * 5, [-1, 0, -1, 2, 2], "Put the prefixes first in the pack"),
        ([2] * 4, [-1, 0, -1, 0], "children of segment 0 adjacent"),
        ([2, -1], [-1, -1], "cu_seqlens: wanted segment bounds that start at 0"),
    ],
)
def test_layouts_that_are_refused(lengths, parent, message):
    with pytest.raises(ValueError, match=message):
        prefix_table(bounds_of(lengths), parent)


def test_errors_name_the_tensor():
    cu = bounds_of([3, 3])
    q, k, v = inputs(6, 4, 2, 8)
    table = prefix_table(cu, [-1, 0])
    cases = [
        ((q[0], k, v, cu), {}, "q: wanted"),
        ((q, k[:5], v, cu), {}, "k: wanted"),
        ((q, k, v[:5], cu), {}, "v: wanted"),
        ((q[:, :3], k, v, cu), {}, "a multiple of the 2 key heads"),
        ((q.float(), k, v, cu), {}, "one floating-point dtype"),
        ((q, k, v, cu.long()), {}, "Pass cu_seqlens.int()"),
        ((q, k, v, cu[:2]), {}, "to end at the 6 tokens"),
        ((q, k, v, cu.to("meta")), {}, "one device"),
        ((q, k, v, bounds_of([6]), table), {}, "Build it with prefix_table"),
        ((q, k, v, bounds_of([2, 4]), table), {}, "a table of these cu_seqlens"),
        ((q, k, v, cu, table.to("meta")), {}, "prefix.to"),
        ((q, k, v, cu), {"impl": "triton"}, "impl: wanted one of auto, reference, cpu"),
        ((q, k, v, cu), {"impl": "torch"}, "it takes CUDA tensors, not cpu"),
        ((q, k, v[..., :4], cu), {"impl": "cpu"}, "value heads must have the queries' size"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            packed_attention(*args, **options)
    assert packed_attention(q, k, v[..., :4], cu).shape == (6, 4, 4)  # auto: the reference can


def test_autocast_casts_as_torch_does():
    q, k, v = inputs(6, 4, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(q, k, v.bfloat16(), bounds_of([6])).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["a pair", "loners everywhere"])
def test_torch_kernels_take_our_calls(layout):
    """No GPU needed: shapes and argument binding of the CUDA operators, on meta tensors."""
    lengths, parent = LAYOUTS[layout]
    table = prefix_table(bounds_of(lengths), parent).to("meta")
    leaves = inputs(sum(lengths), 4, 2, 8, torch.bfloat16, "meta")
    flash = KERNELS["torch"]
    run = with_grads(
        lambda *x: attention._PackedAttention.apply(*x, table, 1.0, flash),
        leaves,
        torch.empty_like(leaves[0]),
    )
    assert [x.shape for x in run] == [x.shape for x in (leaves[0], *leaves)]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("orphans", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_merge_is_the_plain_one(dtype, orphans, device):
    """Views of larger tensors, as attention has them; a share of 0, of 1 and in between."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("Triton runs on a GPU or with TRITON_INTERPRET=1")
    tokens, heads, size = 37, 3, 24
    whole = torch.randn(50, heads, size, device=device).to(dtype)
    lse = 3 * torch.randn(heads, 50, device=device)
    other = torch.randn(heads, tokens, size, device=device).to(dtype).transpose(0, 1)
    other_lse = 3 * torch.randn(heads, tokens, device=device)
    other_lse[:, 3], other_lse[:, 5] = 1000.0, -1000.0
    has_prefix = torch.rand(tokens, device=device) < 0.7 if orphans else None
    if has_prefix is not None:
        other[~has_prefix], other_lse[:, ~has_prefix] = float("nan"), float("inf")
    out, sums = whole.clone(), lse.clone()
    attention_merge.launch(out[13:], sums[:, 13:], other, other_lse, has_prefix)
    wanted, wanted_lse = whole.double(), lse.double()
    exact = other.double(), other_lse.double()
    attention_merge.reference(wanted[13:], wanted_lse[:, 13:], *exact, has_prefix)
    narrow = 2**-8 if device == "cuda" else 2**-7  # the interpreter truncates to bfloat16
    one_rounding = narrow if dtype == torch.bfloat16 else 1e-6
    assert_close(out.double(), wanted, rtol=one_rounding, atol=1e-6)
    assert_close(sums.double(), wanted_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:13], whole[:13]) and torch.equal(sums[:, :13], lse[:, :13])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "flash_attn"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_kernels(layout, dtype, tolerance, impl):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if impl == "flash_attn":
        pytest.importorskip("flash_attn")
    lengths, parent = LAYOUTS[layout]
    cu = bounds_of(lengths).cuda()
    table = prefix_table(cu, parent)
    narrow = inputs(sum(lengths), 4, 2, 64, dtype, "cuda")
    exact = [x.detach().double().requires_grad_() for x in narrow]
    upstream = torch.randn_like(narrow[0])
    got = with_grads(lambda *x: packed_attention(*x, cu, table, impl=impl), narrow, upstream)
    wanted = with_grads(lambda *x: reference(*x, cu, table), exact, upstream.double())
    for a, b in zip(got, wanted, strict=True):
        assert not b.numel() or (a.double() - b).abs().max() <= tolerance * b.abs().max()


# Inside models.
