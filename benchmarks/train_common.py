"""What the whole-step benchmarks share: random models, their FLOPs, the clock, a run and its
outcome."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers: nothing here is from the hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
from common import device, peak_memory_mb, reset_peak_memory
from timing import at_most

CONVENTION = (
    "model FLOPs of real tokens: a forward is 2 x weights of the layers' matrix products a token, "
    "2 x the head's a scored token, 4 x heads x head size x layers a causal pair of tokens; a "
    "policy counts 3 forwards, a reference 1; the same for both systems, which compute padding, "
    "shared prefixes and recomputed activations in other amounts"
)


class Shape(NamedTuple):
    """A Qwen2.5 architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 512, True),
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936, True),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
}

# of weights, gradients and AdamW's moments; whether matrix products are autocast to bfloat16
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "mixed": (torch.float32, True),
    "float32": (torch.float32, False),
}


def random_model(shape: Shape, dtype: torch.dtype, attention: str) -> Any:
    """Made on the device; the same weights every time."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=shape.tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        return Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)


def random_tokens(rng: np.random.Generator, count: int, shape: Shape) -> np.ndarray:
    return rng.integers(3, shape.vocab, count)  # 0 to 2 are the tokenizer's own


def forward_flops(shape: Shape, sequences: Iterable[tuple[int, int]]) -> float:
    """Of sequences given as (tokens, scored tokens), by the convention."""
    size = shape.hidden // shape.heads
    queries, keys = shape.heads * size, shape.kv_heads * size
    attention = shape.hidden * (2 * queries + 2 * keys)
    body = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    total = 0.0
    for tokens, scored in sequences:
        pairs = tokens * (tokens + 1) / 2
        total += 2 * body * tokens + 2 * shape.hidden * shape.vocab * scored
        total += 4 * queries * shape.layers * pairs
    return total


def wait() -> None:
    """For all that the GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Ends of optimizer steps. warmup: steps that are not counted; deadline: no step after it but
    the first that counts; waits: for the GPU, so that an end is one.

    computed: tokens that went through the policy, padding included.
    """

    def __init__(self, warmup: int, steps: int, deadline: float, waits: bool = True):
        self.warmup, self.steps, self.deadline, self.waits = warmup, steps, deadline, waits
        self.ends: list[float] = []
        self.computed = 0

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    def mark(self) -> bool:
        """A step has ended; whether that was enough."""
        if self.waits:
            wait()
        self.ends.append(time.perf_counter())
        late = self.ends[-1] > self.deadline
        return len(self.ends) >= self.total or late and len(self.ends) > self.warmup

    @property
    def seconds(self) -> list[float]:
        """Of the steps that count."""
        after = self.ends[self.warmup - 1 :]
        return [end - start for start, end in zip(after, after[1:], strict=False)]


class Outcome(NamedTuple):
    """Of a run: seconds of its steps; computed tokens over real ones; the first step's gradient
    norm, by which one sees that systems train the same; why there is nothing, if so."""

    setting: Any
    seconds: list[float]
    peak_gb: float
    computed: float
    norm: float
    failed: str = ""


class Task(NamedTuple):
    """What both systems train. tokens: real ones of each step; flops: model FLOPs of each."""

    name: str
    tokens: list[int]
    flops: list[float]


class System(NamedTuple):
    """stages: settings to try, from the best of those before (None if there is none); run: of a
    setting and a clock, returns the gradient norm of the first step."""

    name: str
    stages: Sequence[Callable[[Any], list]]
    run: Callable[[Any, Clock], float]


def free() -> None:
    """Gives back what a run that has ended held."""
    wait()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def hushed():
    """Without what trainers print."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def attempt(system: System, setting: Any, clock: Clock, task: Task, limit: float) -> Outcome:
    """One run of at most `limit` seconds; no memory, or an error of a setting, is an outcome."""
    free()
    reset_peak_memory()
    norm, failed = float("nan"), ""
    try:
        with hushed(), at_most(limit):
            norm = system.run(setting, clock)
    except torch.OutOfMemoryError:
        failed = "out of memory"
    except Exception as error:
        traceback.print_exc()
        if "CUDA error" in str(error):  # nothing that runs after it is to be trusted
            raise
        failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    peak = peak_memory_mb() / 1e3
    free()
    real = sum(task.tokens[: len(clock.ends)])
    computed = clock.computed / real if real else float("nan")
    seconds = [] if failed else clock.seconds
    if not seconds and not failed:
        failed = "no step ended"
    outcome = Outcome(setting, seconds, peak, computed, norm, failed)
    told = failed or f"{speed(outcome, clock.warmup, task):.0f} real tokens/s, {peak:.1f} GB"
    print(f"{task.name}: {system.name}, {setting}: {told}", file=sys.stderr, flush=True)
    return outcome


def speed(outcome: Outcome, warmup: int, task: Task) -> float:
    """Real tokens a second."""
    if not outcome.seconds:
        return 0.0
    tokens = task.tokens[warmup : warmup + len(outcome.seconds)]
    return sum(tokens) / sum(outcome.seconds)
