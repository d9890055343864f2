"""The files that `data` names: found by pattern, unpacked as they are read, refused if they are no text."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from leap_dist.errors import UserError

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

Reader = Callable[..., Any]
COMPRESSED: dict[str, Reader] = {".gz": gzip.open, ".zst": zstd.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings of compressed files; what they hold is said by the ending before. All end in an error where they are cut."""
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstd.ZstdError)
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED |= {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
"""How files begin that are no text."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that a clone without Git LFS has in place of a large one."""
PARQUET = ".parquet"
LINE_END = re.compile(rb"\r\n?|\n")


def files_of(key: str, names: Sequence[str]) -> list[Path]:
    """The files that the setting `key` names, in its order; those of a pattern by name.

    Raises UserError for a pattern that matches none, and for a file that is named twice.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if "\0" in name:
            raise UserError(f"{key}: got {name}; allowed: a name without a zero byte")
        if glob.has_magic(name) and not os.path.exists(path):
            matches = sorted(file for match in glob.glob(str(path), recursive=True) if (file := Path(match)).is_file())
            if not matches:
                raise UserError(f"{key}: got {name}; no file matches it")
            found += matches
        else:
            found.append(path)
    seen: set[str] = set()
    for file in found:
        own = os.path.realpath(file)  # `resolve` fails at a link that leads to itself
        if own in seen:
            raise UserError(f"{key}: {file} is named more than once; allowed: each file once")
        seen.add(own)
    return found


def kind_of(file: Path) -> str:
    """The ending that says what a file holds: ".jsonl" of a.jsonl and of a.jsonl.gz."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def opened(file: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    unpack = COMPRESSED.get(file.suffix.lower())
    return cast("IO[bytes]", unpack(file, "rb")) if unpack else file.open("rb")


def open_text(file: Path, newline: str | None = None) -> IO[str]:
    """The text of a file, unpacked."""
    unpack: Reader = COMPRESSED.get(file.suffix.lower(), open)
    return cast("IO[str]", unpack(file, "rt", encoding="utf-8-sig", newline=newline))


def read_text(key: str, file: Path) -> str:
    """All of a text file; `key` is the setting that holds its path."""
    with reading(key, file), open_text(file) as stream:
        return stream.read()


def _unpack_whole(file: Path) -> None:
    """Read a packed file to its end, where a damaged one says so: what does not fit in its text is no mistake there."""
    if file.suffix.lower() in COMPRESSED:
        with opened(file) as stream:
            while stream.read(1 << 20):
                pass


def _first_bad_byte(file: Path) -> tuple[int, int]:
    """Line (from 1) and byte (from 0) where an unpacked file is no UTF-8: a decoder counts from its last piece on."""
    line, byte = 1, 0
    try:
        with opened(file) as stream:
            for piece in stream:  # no character lies on both sides of the end of a line
                piece.decode()
                line += len(LINE_END.findall(piece))
                byte += len(piece)
    except UnicodeDecodeError as error:
        line += len(LINE_END.findall(error.object[: error.start]))
        byte += error.start
    return line, byte


@contextmanager
def reading(key: str, file: Path) -> Iterator[None]:
    """A file that is not there, or not what it should be, as the mistake of the setting `key`."""
    try:
        if file.is_dir():
            raise UserError(f"{key}: got {file}; that is a folder; allowed: a file")
        if not file.is_file():
            link = "; it is a link that leads to none" if file.is_symlink() else ""
            raise UserError(f"{key}: got {file}; there is no such file{link}")
        with opened(file) as stream:
            start = stream.read(1024)
        if start.startswith(LFS_POINTER):
            raise UserError(f"{key}: {file}: is a pointer of Git LFS, not the file itself; run git lfs pull there")
        if kind_of(file) == PARQUET:
            yield
            return
        if packed := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
            raise UserError(f"{key}: {file}: is a {packed} file, not text; unpack or convert it first")
        if b"\0" in start and not start.startswith(UTF_16):
            raise UserError(
                f"{key}: {file}: not text: a zero byte at byte {start.index(0)}, as in UTF-16 and in files of "
                "programs; save it as UTF-8 text"
            )
        try:
            yield
        except Exception:
            _unpack_whole(file)
            raise
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if start.startswith(UTF_16) else ""
        line, byte = _first_bad_byte(file)
        problem = f"not UTF-8 text: {error.reason} in line {line}, at byte {byte}{hint}; save it as UTF-8"
        raise UserError(f"{key}: {file}: {problem}") from error
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{key}: {file}: damaged, or cut off: {error}; download or pack it again") from error
    except OSError as error:
        raise UserError(f"{key}: {file}: cannot be read: {error.strerror or error}") from error
    except (csv.Error, ValueError, RecursionError) as error:  # of JSON: also too many digits, and too deep nesting
        raise UserError(f"{key}: {file}: cannot be read: {error}") from error
