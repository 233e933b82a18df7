"""vLLM in the trainer's own process, on the same GPU.

Written against the public API of vLLM 0.22 (LLM, SamplingParams, LLM.apply_model) and tested with
a stand-in that keeps to it; it has never been exercised with vLLM itself.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..lora import merged
from ..rollout import Completion, Sampling, check_request, context_of


class VLLMEngine:
    """One vLLM on each rank's GPU, of which it takes `gpu_memory_utilization`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        # in its default place, a process of its own, vLLM could not be handed our tensors
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"engine vllm: vllm does not import ({error}); pip install 'prefuse[vllm]', or use "
                "the engine 'transformers'"
            ) from error
        self.vllm, self.warn = vllm, warn
        self.context = max_model_len or context_of(model)
        self.counts: Counter[str] = Counter()
        self.llm = vllm.LLM(
            model=model.name_or_path,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            skip_tokenizer_init=True,  # token ids go in and come out
            distributed_executor_backend="external_launcher"
            if torch.distributed.is_initialized()
            else None,
            logprobs_mode="processed_logprobs",  # at the temperature, as the trainer's
        )
        self.update_weights(model)

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        check_request(prompts, n, sampling, seeds, self.context)
        uncut = sampling.top_p == 1 and not sampling.top_k and not sampling.min_p
        known = uncut and sampling.temperature > 0
        if not known:
            if not self.counts["without_logp"]:
                self.warn(
                    "vLLM's log-probs are of the distribution cut by top_p, top_k or min_p, or of "
                    "greedy decoding, not the trainer's; they are taken as unknown"
                )
            self.counts["without_logp"] += n * len(prompts)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
            [self._params(n, sampling, seed) for seed in seeds],
            use_tqdm=False,
        )
        return [[_completion(c, known) for c in output.outputs] for output in outputs]

    def _params(self, n: int, sampling: Sampling, seed: int):
        return self.vllm.SamplingParams(
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,  # 0 is all of them here too
            min_p=sampling.min_p,
            max_tokens=sampling.max_new_tokens,
            seed=seed % 2**63,
            stop_token_ids=list(sampling.eos_token_ids),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    @torch.no_grad()
    def update_weights(self, model: nn.Module) -> None:
        """A tensor at a time, gathered where it is sharded; what was cached is forgotten."""
        for name, whole in merged(model, dict(model.named_parameters())):
            self.llm.apply_model(_loader(name, whole))
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        del self.llm


def _loader(name: str, tensor: torch.Tensor):
    return lambda model: model.load_weights([(name, tensor)])


def _completion(output, known: bool) -> Completion:
    tokens = np.array(output.token_ids, dtype=np.int64)
    logp = np.full(len(tokens), np.nan, dtype=np.float32)
    if known:
        logp[:] = [
            at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)
        ]
    return Completion(tokens, logp, output.finish_reason == "stop")
