"""A second model object on the policy's own weights, with the attention that generation needs."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..lora import has_adapters
from ..sharding import is_sharded
from ..weights import copied, copy_weights


class Twin:
    """`model`, fit for generation: in evaluation mode, no settings of its own, its own attention.

    In one process it *shares* the policy's tensors, so that it follows training at no cost. Sharded
    weights are gathered into a copy, anew at every `follow`: a collective call. So is a twin of
    another dtype a copy.
    """

    def __init__(self, model: PreTrainedModel, attention: str, dtype: torch.dtype | None = None):
        self.attention, self.dtype = attention, dtype or model.dtype
        self.model = self._made_from(model)

    def follow(self, model: PreTrainedModel) -> None:
        if self._copies(model) and not has_adapters(self.model):
            copy_weights(model, self.model)
        elif self._copies(model) or not _shares(model, self.model):
            self.model = self._made_from(model)

    def _copies(self, model: PreTrainedModel) -> bool:
        return is_sharded(model) or model.dtype != self.dtype

    def _made_from(self, model: PreTrainedModel) -> PreTrainedModel:
        twin = copied(model, self.dtype) if self._copies(model) else _sharing(model)
        twin.set_attn_implementation(self.attention if twin._supports_sdpa else "eager")
        twin.config.use_cache = True
        twin.generation_config = GenerationConfig()  # a model's own would change the sampling
        return twin.eval()


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(chain(model.parameters(), model.buffers()))


def _shares(model: nn.Module, twin: nn.Module) -> bool:
    mine, its = _tensors(model), _tensors(twin)
    return len(mine) == len(its) and all(a is b for a, b in zip(mine, its, strict=True))


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy of everything but the tensors: ties and non-persistent buffers come along."""
    return copy.deepcopy(model, {id(t): t for t in _tensors(model)})
