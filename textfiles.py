"""Local files -> documents: text, jsonl (both also packed with gzip or zstandard) and parquet.

    for name, path in find_files(["notes/", "books.jsonl.zst"]):  # or stdlib_files(): Python's own library
        for chunks in read_documents(path, column="text"):
            document = "".join(chunks)

A text file is one document; a jsonl or parquet file has one in `column` of each row. An unreadable file is a UserError
that names the file and the byte, line or row. Own code, because no kept library streams all of these and names them.
"""

import codecs
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from pathlib import Path

import zstandard

from lab.common import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")  # of all but parquet, which is read from its end
BLOCK = 1 << 20  # bytes read at once


def stdlib_files():
    """(name, path) of the standard library's UTF-8 modules and tests, sorted. (A few tests are in other encodings.)"""
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
    """(name, path) of every file to read: files in the order given, folders sorted. A file given twice is refused."""
    found, names = [], {}
    for root in map(Path, roots):
        for path in files_of(root):
            name, real = path.as_posix(), path.resolve()
            if real in names:
                also = "" if names[real] == name else f" (also as {names[real]})"
                raise UserError(f"--files gives {name} twice{also}: give it once")
            names[real] = name
            found.append((name, path))
    return found


def files_of(root):
    """The file `root`, or the files below the folder `root`."""
    if root.is_dir():
        paths = walk(root, SUFFIXES)
        if not paths:
            raise UserError(f"--files {root}: no {' '.join(SUFFIXES)} file in this folder")
        return paths
    if not root.exists():
        raise UserError(f"--files {root}: no such file or folder")
    if text_suffix(root) not in SUFFIXES:
        raise UserError(f"--files {root}: not one of {' '.join(SUFFIXES)} (or .gz, .zst of all but .parquet)")
    return [root]


def walk(root, suffixes):
    """Files below `root` with one of `suffixes`, sorted; hidden files and folders are left out."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if text_suffix(path) in suffixes and path.is_file())


def text_suffix(path):
    """`.jsonl` of both `a.jsonl` and `a.jsonl.gz`."""
    inner = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return path.suffix if path.suffix in PACKED and inner == ".parquet" else inner


def read_documents(path, column):
    """Documents of one file, each an iterable of chunks. A text file is one document and may be larger than memory."""
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


def read_blocks(path):
    """Bytes of a file, unpacked, block by block; no block is empty."""
    with open(path, "rb") as raw:
        if path.suffix in PACKED and not os.fstat(raw.fileno()).st_size:
            raise EOFError(f"the file is empty, which no whole {path.suffix} file is")
        if path.suffix == ".zst":
            yield from unpack_zstd(raw)
            return
        with gzip.open(raw) if path.suffix == ".gz" else raw as f:
            while block := f.read(BLOCK):
                yield block


def unpack_zstd(raw, step=1024):
    """Blocks of a zstd file. `zstandard`'s own reader takes a truncated file for a shorter one; this raises EOFError.

    A few bytes can unpack to 128 KB. The input goes in by `step` bytes, so that a block stays below 34 MB.
    """
    frame, out = None, bytearray()
    while packed := raw.read(step):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            out += frame.decompress(packed)
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        if len(out) >= BLOCK:
            yield bytes(out)
            out.clear()
    if frame is not None:
        raise EOFError("the zstd stream is truncated")
    if out:
        yield bytes(out)


def read_lines(path):
    """Lines of a file as bytes, without their ends."""
    parts = []  # of a line that spans blocks: joined once, so that a long line takes linear time
    for block in read_blocks(path):
        first, *rest = block.split(b"\n")
        parts.append(first)
        if rest:
            yield b"".join(parts)
            *lines, last = rest
            yield from lines
            parts = [last]
    if any(parts):
        yield b"".join(parts)


def read_jsonl(path, column):
    before = 0  # bytes before this line
    for number, line in enumerate(read_lines(path), start=1):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, before = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
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

    row = 0
    try:
        with open(path, "rb") as raw:
            f = pyarrow.parquet.ParquetFile(raw)
            if column not in f.schema_arrow.names:
                raise UserError(missing_column(column, f.schema_arrow.names, path))
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


def checked_text(row, column, where):
    """The text of one row; None (a null of parquet or JSON) counts as no document."""
    if column not in row:
        raise UserError(missing_column(column, row, where))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text: choose another --column")
    return text


def missing_column(column, names, where):
    return f"{where}: no column {column!r}; --column is one of: {', '.join(map(str, names)) or '(none)'}"
