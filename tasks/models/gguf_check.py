"""Reading a GGUF file without trusting it.

`check_gguf` walks the header and holds every length and offset to the size of the file, because the
readers behind it do not: the one of the `gguf` package (0.19) loops over whatever count the file
states, and MLX's has open out-of-bounds reports. `read_gguf` then reads what has been checked.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.errors import InputError

if TYPE_CHECKING:
    from gguf import ReaderTensor

Value = TypeVar("Value", int, float, str, bool, list[Any])

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
# Bytes of a scalar, by GGUF value type.
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file.

    Attributes:
        path: of the file, for messages.
        metadata: every key with its value; arrays are lists.
        tensors: by name, in file order; `data` is mapped, not read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    def need(self, key: str, kind: type[Value]) -> Value:
        """The metadata value under `key`; `InputError` when the file has none, or one of another kind."""
        value = self.maybe(key, kind)
        if value is None:
            raise InputError(f"{self.path}: has no metadata '{key}'; convert the model to GGUF again")
        return value

    def maybe(self, key: str, kind: type[Value]) -> Value | None:
        """The metadata value under `key`, None when the file has none; `InputError` for another kind."""
        value = self.metadata.get(key)
        if kind is float and isinstance(value, int):
            value = float(value)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise InputError(f"{self.path}: {key} = {str(value)[:60]!r}, expected one {kind.__name__}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Check a GGUF file and read its metadata and its tensors' places.

    Raises:
        InputError: not GGUF, truncated or corrupt.
    """
    check_gguf(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: corrupt GGUF file ({error}); fetch it again") from None
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def has_gguf_magic(path: Path) -> bool:
    """Whether the file starts as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def check_gguf(path: Path) -> None:
    """Hold every length, count and tensor extent of a GGUF file to the file's size.

    Raises:
        InputError: names the file and the fault.
    """
    if path.stat().st_size < 24 or not has_gguf_magic(path):
        raise InputError(f"{path}: is not a GGUF file (it does not start with 'GGUF')")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _check(data)
        except _FormatError as fault:
            raise InputError(f"{path}: truncated or corrupt GGUF file: {fault}; fetch it again") from None


def read_texts(path: Path) -> dict[str, str]:
    """The metadata values that are a text, in a moment: `read_gguf` takes seconds over the vocabulary.

    Raises:
        InputError: as `check_gguf`.
    """
    check_gguf(path)
    texts = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        header.skip(struct.calcsize("<IQ"), "version and tensor count")
        for _ in range(header.number("<Q", "key count")):
            key, value_type = header.text("metadata key"), header.number("<I", "type")
            if value_type == STRING:
                texts[key] = header.text(key)
            else:
                _skip_value(header, value_type, key)
    return texts


class _FormatError(Exception):
    pass


class _Header:
    """A position in the header that never leaves the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def skip(self, length_bytes: int, what: str) -> int:
        start = self.position
        if length_bytes > len(self.data) - start:
            left = len(self.data) - start
            raise _FormatError(f"{what} of {length_bytes:,} bytes where {left:,} are left")
        self.position += length_bytes
        return start

    def number(self, form: str, what: str) -> int:
        start = self.skip(struct.calcsize(form), what)
        return int(struct.unpack_from(form, self.data, start)[0])

    def text(self, what: str) -> str:
        length = self.number("<Q", what)
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _FormatError(f"{what} is not UTF-8") from None


def _check(data: mmap.mmap) -> None:
    header = _Header(data)
    version = header.number("<I", "version")
    if version not in VERSIONS:
        raise _FormatError(
            f"version {version}, expected one of {', '.join(map(str, VERSIONS))} (little-endian)"
        )
    tensor_count, key_count = header.number("<Q", "tensor count"), header.number("<Q", "key count")
    alignment = DEFAULT_ALIGNMENT
    for _ in range(key_count):
        key = header.text("metadata key")
        value_type = header.number("<I", f"type of '{key}'")
        start = header.position
        _skip_value(header, value_type, key)
        if key == "general.alignment" and value_type == 4:
            alignment = struct.unpack_from("<I", data, start)[0]
    if alignment == 0 or alignment & (alignment - 1):
        raise _FormatError(f"general.alignment = {alignment}, expected a power of two")
    extents = [_tensor_extent(header, alignment) for _ in range(tensor_count)]
    _check_extents(extents, math.ceil(header.position / alignment) * alignment, len(data))


def _skip_value(header: _Header, value_type: int, key: str) -> None:
    if value_type in SCALAR_BYTES:
        header.skip(SCALAR_BYTES[value_type], f"'{key}'")
    elif value_type == STRING:
        header.text(f"'{key}'")
    elif value_type == ARRAY:
        element, count = header.number("<I", f"'{key}'"), header.number("<Q", f"'{key}'")
        if element in SCALAR_BYTES:
            header.skip(count * SCALAR_BYTES[element], f"'{key}'")
        elif element == STRING:
            for _ in range(count):
                header.text(f"'{key}'")
        else:
            raise _FormatError(f"'{key}' is an array of type {element}")
    else:
        raise _FormatError(f"'{key}' has the unknown type {value_type}")


def _tensor_extent(header: _Header, alignment: int) -> tuple[int, int, str]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = header.text("tensor name")
    dimensions = header.number("<I", f"dimensions of {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _FormatError(f"tensor {name} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = [header.number("<Q", f"shape of {name}") for _ in range(dimensions)]
    kind, offset = header.number("<I", f"type of {name}"), header.number("<Q", f"offset of {name}")
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _FormatError(f"tensor {name} has the unknown type {kind}") from None
    if min(shape) < 1 or shape[0] % block or offset % alignment:
        raise _FormatError(
            f"tensor {name} of shape {shape} at offset {offset} does not fit blocks of {block}"
        )
    return offset, math.prod(shape) // block * block_bytes, name


def _check_extents(extents: list[tuple[int, int, str]], data_start: int, file_bytes: int) -> None:
    position, before = 0, "the header"
    for offset, length, name in sorted(extents):
        if data_start + offset + length > file_bytes:
            end = data_start + offset + length
            raise _FormatError(f"tensor {name} ends at byte {end:,} of a file of {file_bytes:,}")
        if offset < position:
            raise _FormatError(f"tensor {name} overlaps {before}")
        position, before = offset + length, name
