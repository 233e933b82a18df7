"""transformers' continuous batching: `generate_batch`'s own machinery, with our choice of tokens.

Written for transformers 5.17 to 5.23: the manager's public methods, and the place where it keeps
its logits processors.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ..rollout import Completion, Sampling, check_request, context_of, ended, grouped
from .generate import GenerateEngine, cache_tokens
from .noise import Request, choose, log_prob, requests_of, row_keys
from .twin import Twin

PAGE = 32  # tokens of a page of the cache: short enough that completions share their prompt's


class ContinuousEngine:
    """transformers' continuous batching: rows leave and enter as they end and begin.

    Falls back to `GenerateEngine`, with one warning, where continuous batching refuses the model or
    computes something else than the model does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        max_rows: int | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.twin = Twin(model, attention_of(model, dtype or model.dtype), dtype)
        self.context = context_of(model)
        self.tokenizer, self.warn = tokenizer, warn
        self.max_rows = max_rows or (256 if model.device.type == "cuda" else 16)
        self.cache_bytes = cache_bytes
        self.plain: GenerateEngine | None = None
        self.proven = False

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        check_request(prompts, n, sampling, seeds, self.context)
        if len(prompts) == 0:
            return []
        if not self.proven:
            self._prove(max(prompts, key=len))
        if self.plain is not None:
            return self.plain.generate(prompts, n, sampling, seeds)
        return grouped(self._sample(requests_of(prompts, n, seeds), sampling, n), n)

    def _prove(self, prompt: np.ndarray) -> None:
        """Whether continuous batching runs this model and gives its own log-probs."""
        self.proven = True
        prompt = prompt[-min(PAGE + 8, (self.context or 2 * PAGE) - 2) :]
        if self.twin.model.device.type == "cpu" and importlib.util.find_spec("psutil") is None:
            self._fall_back("on a CPU it needs psutil: pip install psutil")
            return
        pair = [Request(prompt, 0), Request(prompt[len(prompt) // 2 :], 1)]
        try:
            got = self._sample(pair, Sampling(max_new_tokens=2, temperature=0.0))
            gap = max(_gap(self.twin.model, r.prompt, c) for r, c in zip(pair, got, strict=True))
            allowed = 1e-3 if self.twin.model.dtype == torch.float32 else 0.3
            refusal = "" if gap <= allowed else f"its log-probs are off by {gap:.2g} nats"
        except Exception as error:  # whatever it is, plain generate may still work
            refusal = f"{type(error).__name__}: {error}"
        if refusal:
            self._fall_back(refusal)

    def _fall_back(self, why: str) -> None:
        self.warn(
            f"{type(self.twin.model).__name__} cannot be sampled by continuous batching ({why}); "
            "sampling by plain generate"
        )
        self.plain = GenerateEngine(self.twin.model, self.tokenizer, cache_bytes=self.cache_bytes)

    def _sample(self, requests: list[Request], sampling: Sampling, n: int = 1) -> list[Completion]:
        device = self.twin.model.device
        # continuous batching seeds torch for itself
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._run(requests, sampling, n)

    def _run(self, requests: list[Request], sampling: Sampling, n: int) -> list[Completion]:
        model: Any = self.twin.model
        longest = max(len(r.prompt) for r in requests) + sampling.max_new_tokens
        rows = min(self.max_rows, len(requests))
        eos = list(sampling.eos_token_ids)
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=eos or -1
            ),
            continuous_batching_config=cache_plan(model, rows, longest, self.cache_bytes),
        )
        chooser = RequestChooser(requests, sampling)
        manager.logit_processor = chooser
        manager.start()
        try:
            for index in in_waves(len(requests), n, rows):
                manager.add_request(
                    requests[index].prompt.tolist(),
                    request_id=str(index),
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=eos or -1,
                )
            outputs = collect(manager, len(requests))
        except BaseException:
            for index in range(len(requests)):
                manager.cancel_request(str(index))
            raise
        finally:
            manager.stop(block=True)
        logp = chooser.logp()
        return [
            ended(np.array(tokens), logp[i, : len(tokens)], sampling.eos_token_ids)
            for i, tokens in enumerate(outputs)
        ]

    def update_weights(self, model: nn.Module) -> None:
        self.twin.follow(model)  # type: ignore[arg-type]
        if self.plain is not None:
            self.plain.update_weights(self.twin.model)

    def close(self) -> None:
        del self.twin, self.plain


def in_waves(count: int, n: int, rows: int) -> list[int]:
    """Prompts that run together, the first completion of each before the second of any: the
    second then finds its prompt in the cache."""
    wave = max(rows // n, 1)
    return sorted(range(count), key=lambda i: (i // n // wave, i % n, i))


def collect(manager, count: int) -> list[list[int]]:
    """The tokens of every request, keyed by its name; a request that failed raises."""
    found: dict[int, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        if result is not None and result.is_finished():
            found[int(result.request_id)] = result.generated_tokens
        if result is None and not manager.is_running():
            raise RuntimeError("continuous batching stopped; its own log says why")
    return [found[i] for i in range(count)]


class RequestChooser:
    """In the place of continuous batching's list of logits processors: chooses the next token of
    every request in the batch, and keeps its log-prob."""

    tensors_required = 2  # int32 rows of arguments, written by `prepare_tensor_args`
    do_processing = True
    logits_processor = ()

    def __init__(self, requests: list[Request], sampling: Sampling):
        self.sampling = sampling
        self.prompt_lengths = np.array([len(r.prompt) for r in requests])
        self.streams = np.array([r.stream for r in requests], dtype=np.uint64)
        self.rows: list[np.ndarray] = []  # a step: which requests
        self.positions: list[np.ndarray] = []  # and which of their tokens
        self.found: list[Tensor] = []  # and the log-probs of these

    def check_kwargs(self, kwargs: dict) -> None:
        pass

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list, arg_storage: Tensor) -> Tensor:
        states = [r.state for r in requests_in_batch if r.has_new_token]
        rows = np.array([int(s.request_id) for s in states], dtype=np.int64)
        seen = np.array([s.position_offset for s in states], dtype=np.int64)
        positions = seen - self.prompt_lengths[rows]
        keys = torch.from_numpy(row_keys(self.streams[rows], positions))
        arg_storage[:, : len(rows)] = keys.to(arg_storage.device)
        self.rows.append(rows)
        self.positions.append(positions)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
        tokens, logp = choose(scores, keys, self.sampling)
        self.found.append(logp)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def logp(self) -> np.ndarray:
        """[requests, tokens], NaN past each one's end."""
        table = np.full((len(self.streams), self.sampling.max_new_tokens + 2), np.nan, np.float32)
        for rows, positions, found in zip(self.rows, self.positions, self.found, strict=True):
            table[rows, positions] = found[: len(rows)].cpu().numpy()
        return table


def attention_of(model: PreTrainedModel, dtype: torch.dtype) -> str:
    if model.device.type == "cuda" and model._supports_flash_attn:
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available() and dtype != torch.float32:
            return "flash_attention_2"
    return "sdpa"


def cache_plan(
    model: PreTrainedModel, rows: int, longest: int, cache_bytes: int | None
) -> ContinuousBatchingConfig:
    """A cache for `rows` sequences of `longest` tokens, or for what fits in `cache_bytes`."""
    pages_a_row = -(-longest // PAGE) + 1
    pages = min(rows * pages_a_row, max(cache_tokens(model, cache_bytes) // PAGE, pages_a_row))
    wanted: dict[str, Any] = dict(
        num_blocks=pages,
        max_batch_tokens=max(rows, 4096 if model.device.type == "cuda" else 256),
        max_requests_per_batch=rows,
        use_cuda_graph=False,  # the chooser keeps log-probs in Python, at every step
        auto_switch_to_flash=False,  # it may fetch kernels from the network
        disable_nccl_graph_mixing=False,  # no graphs, so the environment stays as it is
    )
    known = {f.name for f in fields(ContinuousBatchingConfig)}
    wanted["page_size" if "page_size" in known else "block_size"] = PAGE  # by version
    return ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in known})


@torch.no_grad()
def _gap(model: PreTrainedModel, prompt: np.ndarray, completion: Completion) -> float:
    """The largest difference to the model's own log-probs, from one forward over the whole."""
    tokens = torch.from_numpy(np.concatenate([prompt, completion.tokens])).to(model.device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logp = log_prob(logits.float(), tokens[len(prompt) :])
    return float((logp.cpu() - torch.from_numpy(completion.logp)).abs().max())
