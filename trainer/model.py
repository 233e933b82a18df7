"""Models from transformers: loaded, scored through our head, exported as they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from .attention import ATTENTION
from .data import Example
from .errors import UserError
from .lora import base_name, is_adapter, merge_saved
from .weights import Whole, skeleton

disable_progress_bar()  # the run's own report speaks


class HeadOptions(NamedTuple):
    """What a model does to its logits after the projection."""

    logit_scale: float = 1.0
    softcap: float | None = None


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer, with an EOS and a padding token."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"--model_name_or_path {name}: no tokenizer loads from it: {error}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so the model could never learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # truncation is data.py's, and counted
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    layout: str,
    trust_remote_code: bool = False,
    in_shards: bool = False,
) -> PreTrainedModel:
    """A causal language model with dropout off and the attention that `layout` needs; in_shards:
    without its weights if `shard` can read them."""
    try:
        config = config_of(name, trust_remote_code)
        if quantized := getattr(config, "quantization_config", None):
            kind = quantized.get("quant_method", "some method")
            raise ValueError(f"wanted weights in floating point; got them quantized by {kind}")
        model = from_files(
            AutoModelForCausalLM,
            name,
            config,
            in_shards,
            dtype=dtype,
            attn_implementation=None if layout == "padded" else ATTENTION,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise UserError(f"--model_name_or_path {name}: no model loads from it: {error}") from error
    model.config.use_cache = False
    return model


def config_of(name: str, trust_remote_code: bool) -> Any:
    """A model's configuration, with dropout off."""
    config = AutoConfig.from_pretrained(base_name(name), trust_remote_code=trust_remote_code)
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return config


def from_files(
    auto, name: str, config, in_shards: bool, new: tuple[str, ...] = (), **options
) -> Any:
    """`auto.from_pretrained`, with a saved adapter merged; or a skeleton, where there can be one.
    A model that could not be one says why in its attribute `whole_because`."""
    why = None
    if in_shards:
        try:
            if is_adapter(name):
                raise Whole("an adapter is merged into it")
            return skeleton(auto, name, config, new, **options)
        except Whole as reason:
            why = str(reason)
    model = auto.from_pretrained(base_name(name), config=config, **options)
    model = merge_saved(model, name)
    model.whole_because = why
    return model


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The projection to the vocabulary."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"{type(model).__name__}: wanted a linear output head; got {type(head)}")
    return head


def check_vocabulary(model: PreTrainedModel, tokenizer, examples: list[Example], name: str) -> None:
    """Every id the tokenizer can give, or gave, must have a row in the model's embeddings."""
    embeddings: Any = model.get_input_embeddings()
    rows, ids = embeddings.weight.shape[0], len(tokenizer)
    last = learned_positions(model)
    if ids > rows:
        raise UserError(
            f"{name}: the tokenizer has {ids} tokens but the model's vocabulary {rows}; use the "
            "model's own tokenizer, or resize the model's embeddings to it"
        )
    for example in examples:
        largest = max(int(s.tokens.max()) for s in example.sequences)
        if largest >= rows:
            raise UserError(
                f"{example.where}: wanted tokens below {rows}, the model's vocabulary; got "
                f"{largest}. {name}: use the model's own tokenizer, or resize its embeddings"
            )
        longest = max(len(s.tokens) for s in example.sequences)
        if last is not None and longest > last:
            raise UserError(
                f"{example.where}: wanted {last} tokens at most, for each of which {name} has "
                f"learned a position; got {longest}. Pass --max_length {last}"
            )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many there are, in a table like GPT-2's; None for positions that are computed."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings():
            if context is not None and 0 <= module.num_embeddings - context <= 2:  # OPT's has two
                return context
    return None


def head_options(model: PreTrainedModel) -> HeadOptions:
    """Logit scale and softcap from the model's configuration; the probe checks the result."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(config, name, None) or 1.0
    factor = getattr(config, "logits_scaling", None) or 1.0
    # Granite and MiniCPM3 divide by what HyperCLOVA X multiplies by
    scale = scale * factor if config.model_type == "hyperclovax" else scale / factor
    return HeadOptions(scale, getattr(config, "final_logit_softcapping", None))


def can_share_prefixes(model: PreTrainedModel, longest: int) -> str | None:
    """Why `model`'s attention cannot be packed with shared prefixes, or None if it can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        return f"layers of kind {sorted(kinds - {'full_attention'})}"
    slides = "sliding_attention" in kinds or (window and not kinds)
    if slides and window and window < longest:
        return f"a sliding window of {window} tokens, shorter than the longest row ({longest})"
    if getattr(config, "attn_logit_softcapping", None):
        return "a softcap on its attention scores"
    return None


@torch.no_grad()
def export(
    model: PreTrainedModel, state: dict[str, Tensor] | None, tokenizer, folder: Path
) -> None:
    """Writes what `from_pretrained` loads: safetensors, configuration, tokenizer; of a model with
    adapters those alone. It would load both of them together, so what was there goes. state: None
    if its weights will be written beside the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = ("config.json", "model*.safetensors*", "adapter_*")
    for path in (path for pattern in weights for path in folder.glob(pattern)):
        path.unlink()
    # published models carry generation settings that some transformers refuse to save again
    settings = getattr(model, "generation_config", None)  # a model with a head of scores has none
    if settings is not None:
        model.generation_config = GenerationConfig()
    model.config.use_cache = True
    if state is None:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)
    model.config.use_cache = False
    if settings is not None:
        model.generation_config = settings
        settings.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
