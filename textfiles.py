"""Local files -> documents: text, jsonl and parquet, also packed with gzip or zstandard.

    for name, path in find_files(["notes/", "books.jsonl.zst"]):  # or stdlib_files(): Python's own library
        for chunks in read_documents(path, column="text"):
            document = "".join(chunks)

A text file is one document; a jsonl or parquet file has one in `column` of each row. What cannot be read is a UserError
that names the file and the byte, line or row.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import os
import sysconfig
import tempfile
import zlib
from pathlib import Path

import zstandard

from common import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")


def stdlib_files():
    """(name, path) of the standard library's modules and their tests, sorted; a few tests are not UTF-8, on purpose."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in walk(root, (".py",)) if not {"site-packages", "dist-packages"} & set(path.parts)]
    paths = [(path.relative_to(root).as_posix(), path) for path in paths if is_utf8(path)]
    if not paths:
        raise UserError(f"this Python has no standard library in source ({root}): use --files")
    return paths


def is_utf8(path):
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def find_files(roots):
    """(name, path) of every file to read: files in the order given, folders sorted."""
    found = []
    for root in map(Path, roots):
        if root.is_dir():
            inside = walk(root, SUFFIXES)
            if not inside:
                raise UserError(f"no {' '.join(SUFFIXES)} files (or .gz, .zst of them) in the folder {root}")
            found += [(path.as_posix(), path) for path in inside]
        elif not root.exists():
            raise UserError(f"--files {root}: no such file or folder")
        elif text_suffix(root) not in SUFFIXES:
            raise UserError(f"--files {root}: not one of {' '.join(SUFFIXES)} (or .gz, .zst of them)")
        else:
            found.append((root.as_posix(), root))
    return found


def walk(root, suffixes):
    """Files below `root` with one of `suffixes`, sorted; hidden files and folders are left out."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if text_suffix(path) in suffixes and path.is_file())


def text_suffix(path):
    """`.jsonl` of both `a.jsonl` and `a.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def read_documents(path, column):
    """Documents of one file, each an iterable of chunks: a text file is one document and may be larger than memory."""
    suffix = text_suffix(path)
    try:
        if suffix == ".jsonl":
            yield from read_jsonl(path, column)
        elif suffix == ".parquet":
            yield from read_parquet(path, column)
        else:
            yield read_text(path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(path, error) from error


def unreadable(path, error):
    return UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def read_text(path):
    """Chunks of a text file."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for block in itertools.chain(read_blocks(path), [b""]):
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: byte {before - pending + error.start}") from error
            before += len(block)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(path, error) from error


def read_blocks(path, size=1 << 20):
    """Bytes of a file, unpacked, block by block; none of them empty."""
    with open(path, "rb") as raw:
        if path.suffix == ".zst":
            yield from filter(None, unpack_zstd(raw, size))
            return
        with gzip.open(raw) if path.suffix == ".gz" else raw as f:
            while block := f.read(size):
                yield block


def unpack_zstd(raw, size):
    """`zstandard`'s own reader takes a file that breaks off for a shorter one, so the end is checked here."""
    frame = None
    while block := raw.read(size):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the zstd stream breaks off")


def read_lines(path):
    tail = b""
    for block in read_blocks(path):
        *lines, tail = (tail + block).split(b"\n")
        yield from lines
    if tail:
        yield tail


def read_jsonl(path, column):
    before = 0  # bytes
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = json.loads(line.decode()) if line.strip() else {column: None}
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: byte {before + error.start} (line {number})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        text = checked_text(row, column, f"{path} line {number}")
        before += len(line) + 1
        if text:
            yield [text]


def read_parquet(path, column):
    import pyarrow  # here, not above: every worker of fineweb.py imports this file
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        try:
            f = pyarrow.parquet.ParquetFile(stack.enter_context(open_seekable(path)))
            if column not in f.schema_arrow.names:
                raise UserError(missing_column(column, f.schema_arrow.names, path))
            row = 0
            for batch in f.iter_batches(batch_size=64, columns=[column], use_threads=False):
                for value in batch.column(0):
                    text = checked_text({column: value.as_py()}, column, f"{path} row {row}")
                    row += 1
                    if text:
                        yield [text]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: byte {error.start} of row {row}") from error
        except pyarrow.ArrowException as error:
            raise unreadable(path, error) from error


@contextlib.contextmanager
def open_seekable(path):
    """A parquet file is read from its end, so a packed one is unpacked into a temporary file first."""
    if path.suffix == ".parquet":
        with open(path, "rb") as f:
            yield f
        return
    with tempfile.TemporaryFile() as f:
        for block in read_blocks(path):
            f.write(block)
        f.seek(0)
        yield f


def checked_text(row, column, where):
    """The text of one row; None, which parquet and JSON allow, counts as no document."""
    if column not in row:
        raise UserError(missing_column(column, row, where))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text: choose another --column")
    return text


def missing_column(column, names, where):
    return f"{where}: no column {column!r}; --column is one of: {', '.join(map(str, names)) or '(none)'}"
