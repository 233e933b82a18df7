"""Sampling that depends on a seed and nothing else: Gumbel noise from a counter-based hash.

argmax(logits / T + G) with G = -log(-log U) is an exact sample of softmax(logits / T). U is a hash
of (seed, sample, position, vocabulary id), so a completion is the same whatever else is sampled
beside it, in whatever order, by whichever engine or rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..rollout import Sampling

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64, Steele et al. 2014


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(seed: int, sample: int) -> int:
    """The 64-bit name of one completion's noise."""
    words = np.array([seed % 2**64, sample + 1], dtype=np.uint64)
    first = _splitmix64(words[:1] + np.uint64(_GOLDEN))
    return int(_splitmix64(first ^ (words[1:] * np.uint64(_GOLDEN)))[0])


class Request(NamedTuple):
    """One completion to sample."""

    prompt: np.ndarray
    stream: int  # names its noise


def requests_of(prompts: Sequence[np.ndarray], n: int, seeds: Sequence[int]) -> list[Request]:
    return [Request(p, stream(s, k)) for p, s in zip(prompts, seeds, strict=True) for k in range(n)]


def row_keys(streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """streams [R] uint64, positions [R] of the tokens to come -> keys [2, R] int32."""
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    mixed = _splitmix64(streams.astype(np.uint64) + steps)
    halves = np.stack([mixed >> np.uint64(32), mixed & np.uint64(0xFFFFFFFF)])
    return halves.astype(np.uint32).view(np.int32)


def _scramble(x: Tensor) -> Tensor:
    """A bijection of int32 (lowbias32, Wellons 2018); in place."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # int32 shifts keep the sign: mask it off
        x *= factor
    return x


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """keys [2, R] int32 -> Gumbel noise [R, vocab] float32, a function of key and id alone."""
    ids = torch.arange(vocab, dtype=torch.int32, device=keys.device) * (0x9E3779B9 - 2**32)
    x = _scramble(keys[1][:, None] + ids)
    x = _scramble(x ^ keys[0][:, None])
    # u in (0, 1): small u, the large noise that decides, keeps float32's relative precision
    u = ((x & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def choose(logits: Tensor, keys: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [R, V], keys [2, R] -> tokens [R] int64 and their log-probs [R] float32.

    The log-probs are of the whole softmax at the temperature, as the trainer computes them: what
    top-k, top-p and min-p cut off, and the noise, choose the token and nothing else.
    """
    logits = logits.float()
    if sampling.temperature > 0:
        scaled = logits / sampling.temperature if sampling.temperature != 1 else logits
        assert keys is not None
        noise = gumbel(keys, logits.shape[-1])
        tokens = noise.add_(truncated(scaled, sampling)).argmax(-1)
    else:
        scaled, tokens = logits, logits.argmax(-1)
    return tokens, log_prob(scaled, tokens)


def truncated(scaled: Tensor, sampling: Sampling) -> Tensor:
    """-inf where top-k, top-p or min-p forbid, in the order of `generate`."""
    ids = torch.empty(0, dtype=torch.long)  # these warpers do not look at what came before
    if sampling.top_k:
        scaled = TopKLogitsWarper(sampling.top_k)(ids, scaled)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        scaled = TopPLogitsWarper(sampling.top_p)(ids, scaled)  # type: ignore[arg-type]
    if sampling.min_p:
        scaled = MinPLogitsWarper(sampling.min_p)(ids, scaled)  # type: ignore[arg-type]
    return scaled


def log_prob(scaled: Tensor, tokens: Tensor) -> Tensor:
    """Logits [R, V], tokens [R] -> log-probs [R]."""
    return scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.logsumexp(-1)
