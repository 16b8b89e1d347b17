"""A fast Hugging Face tokenizer that travels as text: tasks need no model files."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from renee_ray.data.models import read_settings, resolve_model
from renee_ray.errors import ReneeError, reason

CHUNK = 1024
"""Texts tokenised together, so few that their encodings, far larger than ids, fit the cache."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what a dataset must remember of it."""

    name: str
    serialised: str
    """Content of tokenizer.json, as `encode` takes it."""
    hash: str
    """`vocabulary_hash` of the tokenizer."""
    pad_id: int


def load(name: str, *, fetch: bool = True) -> Vocabulary:
    """Loads the tokenizer of model `name`, a directory or a hub name.

    Args:
        fetch: whether to ask the hub itself; False for a name that comes from a file.

    Raises:
        ReneeError: it is nowhere to be had, or has no fast version.
    """
    directory = Path(resolve_model(name, fetch=fetch))
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            tokenizer = _converted(directory)
    except Exception as error:  # the libraries raise a dozen kinds for files that do not fit
        raise ReneeError(
            f"no fast tokenizer can be loaded from {directory} ({type(error).__name__}: "
            f"{reason(error):.200}); give a model that has a tokenizer.json"
        ) from error
    return Vocabulary(
        name, tokenizer.to_str(), vocabulary_hash(tokenizer), _pad_id(tokenizer, directory)
    )


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of the tokens in the order of their ids."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


def encode(serialised: str, texts: list[str], max_length: int) -> pa.Array:
    """Tokenises: list<int32> [len(texts)], unpadded, with special tokens, cut to `max_length`."""
    made = _tokenizer(serialised, max_length)
    sizes: list[int] = []
    flat = [np.zeros(0, dtype=np.int32)]
    for start in range(0, len(texts), CHUNK):
        rows = [encoding.ids for encoding in made.encode_batch_fast(texts[start : start + CHUNK])]
        sizes += map(len, rows)
        flat.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(sizes[start:])))
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(flat)))


def split_special(serialised: str, text: str) -> tuple[list[int], int]:
    """Returns the tokens of a text without special ones; how many of these come before them."""
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding = tokenizer.encode(text)
    special = encoding.special_tokens_mask
    tokens = [token for token, kind in zip(encoding.ids, special, strict=True) if not kind]
    return tokens, [*special, 0].index(0)


def decode(serialised: str, rows: list[list[int]]) -> list[str]:
    """Returns the texts of rows of token ids, without special tokens."""
    return Tokenizer.from_str(serialised).decode_batch(rows)


@lru_cache(maxsize=2)
def size(serialised: str) -> int:
    """Returns the number of tokens of the vocabulary, added ones included."""
    return Tokenizer.from_str(serialised).get_vocab_size()


@lru_cache(maxsize=2)
def _tokenizer(serialised: str, max_length: int) -> Tokenizer:
    # Several tasks share a machine, and threads of one would only take the cores of another.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _converted(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(
        str(directory), use_fast=True, trust_remote_code=False, local_files_only=True
    )
    return found.backend_tokenizer


def _pad_id(tokenizer: Tokenizer, directory: Path) -> int:
    """Returns the padding token's id; 0 where a model has none, since padding is masked anyway."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    token = read_settings(directory / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) and token else None
    return 0 if found is None else found
