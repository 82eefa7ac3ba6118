"""Data files as streams of plain bytes: decompressed, and refused where they are plainly something else."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import zstandard

from tasks.errors import InputError
from tasks.prepare.files import DataFile

BUFFER_BYTES = 1 << 20
COMPRESSED_BYTES = 1024  # decompressed at once: of zstd, four bytes can stand for 128 KiB

OTHER_KINDS = {
    b"\xff\xfe": "is UTF-16; save it as UTF-8 (in Excel 'CSV UTF-8'; or iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; save it as UTF-8 (in Excel 'CSV UTF-8'; or iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "is gzip-compressed; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed; let its name end in .zst",
    b"PK\x03\x04": "is a zip archive or an Excel file; unpack it, or save it as CSV UTF-8",
    b"PAR1": "is a Parquet file; let its name end in .parquet",
}

DAMAGE = (zlib.error, zstandard.ZstdError)
READ_ERRORS = (OSError, EOFError, *DAMAGE)


@contextmanager
def open_text(file: DataFile) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file of text.

    Raises:
        InputError: it cannot be opened, or begins as no UTF-8 text does.
        READ_ERRORS: from reading on; `unreadable` makes an InputError of them.
    """
    try:
        stream = open_bytes(file)
        beginning = stream.peek(4)[:4]
    except READ_ERRORS as error:
        raise unreadable(file, error, "") from None
    with stream:
        for magic, cure in OTHER_KINDS.items():
            if beginning.startswith(magic):
                raise InputError(f"{file.path}: {cure}")
        yield stream


def open_bytes(file: DataFile) -> io.BufferedReader[Any]:
    """A file's bytes, decompressed."""
    plain = io.FileIO(file.path)
    if not file.compression:
        return io.BufferedReader(plain, BUFFER_BYTES)
    return io.BufferedReader(_Decompressed(plain, FRAMES[file.compression]), BUFFER_BYTES)


def unreadable(file: DataFile, error: Exception, place: str) -> InputError:
    """What to raise when a file cannot be read on; `place` as ", after line 7", or empty."""
    where = f"{file.path}{place}"
    if isinstance(error, EOFError):
        return InputError(f"{where}: its compressed data ends too early; copy or download it again")
    if isinstance(error, DAMAGE):
        return InputError(f"{where}: its compressed data is damaged ({error}); copy or download it again")
    return InputError(f"{where}: {getattr(error, 'strerror', error)}; make the file readable")


class _Frame(Protocol):
    """A decompressor of one gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Decompressed(io.RawIOBase):
    """The members of a .gz file or the frames of a .zst file, one after another.

    Unlike the readers of `gzip` and `zstandard` it gives all that stands before a damage, and notices
    when the last frame is cut off.
    """

    def __init__(self, compressed: io.FileIO, new_frame: Callable[[], _Frame]) -> None:
        self._compressed = io.BufferedReader(compressed, BUFFER_BYTES)
        self._new_frame = new_frame
        self._frame: _Frame | None = None
        self._rest = b""
        self._ready = memoryview(b"")
        self._failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._compressed.close()
        super().close()

    def readinto(self, target: Any) -> int:
        filled = 0
        while filled < len(target) and (self._ready or self._advance()):
            count = min(len(target) - filled, len(self._ready))
            target[filled : filled + count] = self._ready[:count]
            self._ready = self._ready[count:]
            filled += count
        if not filled and self._failure is not None:
            raise self._failure
        return filled

    def _advance(self) -> bool:
        """Decompress on; False at the end, and at a damage until all that stands before it is read."""
        while not self._ready and self._failure is None:
            try:
                piece = self._rest or self._compressed.read(COMPRESSED_BYTES)
                if not piece and self._frame is not None:
                    raise EOFError
                if not piece:
                    return False
                self._decompress(piece)
            except READ_ERRORS as error:
                self._failure = error
        return bool(self._ready)

    def _decompress(self, piece: bytes) -> None:
        if self._frame is None:
            piece = piece.lstrip(b"\0")  # the padding of a block device or archive; no frame begins so
            self._frame = self._new_frame() if piece else None
        if self._frame is None:
            self._rest = b""
            return
        self._ready = memoryview(self._frame.decompress(piece))
        self._rest = self._frame.unused_data
        if self._frame.eof:
            self._frame = None


def _gzip_member() -> _Frame:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _zstd_frame() -> _Frame:
    return zstandard.ZstdDecompressor().decompressobj()


FRAMES: dict[str, Callable[[], _Frame]] = {".gz": _gzip_member, ".zst": _zstd_frame}
