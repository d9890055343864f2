"""The files that `data` names: found by pattern, unpacked as they are read, refused if they are no text."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from leap_dist.errors import UserError

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

PIECE = 2**16
"""Bytes of a packed file that are read, or unpacked, at once."""


class DamagedError(Exception):
    """What stands in a packed file, and is none of its kind."""


class Streams(io.RawIOBase):
    """The bytes of all streams of a bzip2 or xz file: Python's readers take a damaged one for the end of the file."""

    def __init__(self, packed: IO[bytes], new: Callable[[], Any], padding: bytes = b"") -> None:
        """new: makes a decompressor of one stream; padding: the byte that may stand behind a stream, however often."""
        self._packed, self._new, self._padding = packed, new, padding
        self._stream = new()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, room: Any) -> int:
        while (piece := self._piece()) is not None:
            try:
                data = self._stream.decompress(piece, len(room))
            except (OSError, lzma.LZMAError) as error:
                raise DamagedError(str(error)) from error
            if data:
                room[: len(data)] = data
                return len(data)
        return 0

    def _piece(self) -> bytes | None:
        """What is unpacked next, of the next stream where one has ended; None at the end of the file."""
        if self._stream.eof:
            piece = self._stream.unused_data
            while not (piece := piece.lstrip(self._padding)):
                if not (piece := self._packed.read(PIECE)):
                    return None
            self._stream = self._new()
        else:
            piece = self._packed.read(PIECE) if self._stream.needs_input else b""
            if not piece and self._stream.needs_input:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        return piece


def _open_bz2(file: Path) -> IO[bytes]:
    return io.BufferedReader(Streams(file.open("rb"), bz2.BZ2Decompressor), PIECE)


def _open_xz(file: Path) -> IO[bytes]:
    return io.BufferedReader(Streams(file.open("rb"), partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), b"\0"), PIECE)


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": zstd.open, ".bz2": _open_bz2, ".xz": _open_xz}
"""Endings of compressed files, and what opens them to read bytes; what they hold is said by the ending before.

All end in an error where they are cut."""
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, DamagedError, zstd.ZstdError)
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
    return cast("IO[bytes]", unpack(file)) if unpack else file.open("rb")


def open_text(file: Path, newline: str | None = None) -> IO[str]:
    """The text of a file, unpacked."""
    return io.TextIOWrapper(opened(file), encoding="utf-8-sig", newline=newline)


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
