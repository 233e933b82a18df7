"""Reference log-probs on disk: of every scored token, by the sequence and by what scored it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.utils.hub import cached_file

from .data import Sequence
from .errors import UserError
from .lora import base_name, is_adapter

PART = 4096  # sequences of a file: what an interruption costs at most
IDENTITY = "identity.json"


class ReferenceCache:
    """Log-probs [scored tokens] of sequences, in files that are whole or not there. Each rank
    writes its own; all read them all.

    identity: of the reference's weights, the tokenizer and the arithmetic; another's is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, str]):
        self.folder = folder
        self.known: dict[bytes, np.ndarray] = {}
        self.new: list[tuple[bytes, np.ndarray]] = []
        file = folder / IDENTITY
        if file.exists():
            _check(folder, json.loads(file.read_text()), identity)
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"--ref_log_probs_cache {folder}: wanted a cache of reference log-probs or a new "
                f"folder; got one with other files and no {IDENTITY}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _replace(file, lambda part: part.write_text(json.dumps(identity, indent=1)))
        for part in sorted(folder.glob("part-*.safetensors")):
            self._read(part)

    def __contains__(self, sequence: Sequence) -> bool:
        return key_of(sequence) in self.known

    def total(self, sequence: Sequence) -> float:
        """log pi_ref of the scored tokens, summed in float64."""
        return float(self.known[key_of(sequence)].sum(dtype=np.float64))

    def add(self, sequence: Sequence, logp: np.ndarray) -> None:
        key = key_of(sequence)
        self.known[key] = logp.astype(np.float32)
        self.new.append((key, self.known[key]))
        if len(self.new) >= PART:
            self.flush()

    def flush(self) -> None:
        """Writes what is new to a file of its own, named by what it holds."""
        if not self.new:
            return
        keys, values = zip(*self.new, strict=True)
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        tensors = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1),
            "lengths": np.array([len(v) for v in values], dtype=np.int64),
            "logp": np.concatenate(values),
        }
        file = self.folder / f"part-{name}.safetensors"
        _replace(file, lambda part: save_file(tensors, part))
        self.new = []

    def _read(self, part: Path) -> None:
        try:
            found = load_file(part)
            ends = found["lengths"].cumsum()
            values = np.split(found["logp"], ends[:-1])
            keys = [key.tobytes() for key in found["keys"]]
            self.known |= dict(zip(keys, values, strict=True))
        except Exception as error:
            raise UserError(f"{part}: no part of a cache; remove it: {error}") from error


def key_of(sequence: Sequence) -> bytes:
    """A hash of its tokens and of which are scored, so of tokenizer and template too."""
    tokens = np.ascontiguousarray(sequence.tokens, dtype=np.int64).tobytes()
    scored = np.packbits(sequence.scored).tobytes()
    return hashlib.sha256(len(tokens).to_bytes(8, "little") + tokens + scored).digest()


def identity_of(name: str, tokenizer, compute: str) -> dict[str, str]:
    """Of a reference by its folder or hub id; compute: the arithmetic, in words."""
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.get_vocab())
    template = str(tokenizer.chat_template)
    return {
        "weights": _of_files(_weights(name)),
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "compute": compute,
    }


def _weights(name: str) -> list[Path]:
    """The files that decide what a model says."""
    if is_adapter(name):
        return [*_weights(base_name(name)), *sorted(Path(name).glob("adapter_*"))]
    config = cached_file(name, "config.json")
    assert config is not None  # it raises where there is none
    folder = Path(config).parent
    return [folder / "config.json", *sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))]


def _of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _check(folder: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise UserError(
            f"--ref_log_probs_cache {folder}: wanted a cache of this run's reference; it was made "
            f"with another {' and '.join(other)}. Name another folder, or remove it"
        )


def _replace(file: Path, write) -> None:
    """Under its name only once it is whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file}: could not be written: {error}") from error
