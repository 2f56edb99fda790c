"""Tensors as bytes in files, each piece with its checksum.

[Note: CRC-32] A checksum finds damage by disks, networks and copies. A checkpoint's author can write checksums too, so
a cryptographic checksum would promise nothing more. For 1 GiB on one core, CRC-32 took 0.3 s, BLAKE2b 1.5 s, SHA-256
0.6 s with the processor's own instructions and several seconds without.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from celmoe.errors import CheckpointError
from celmoe.files import flush

from .manifest import CURE, Piece, SavedTensor


class Written(NamedTuple):
    """A piece, with its tensor's key, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: Piece


def write_pieces(folder: Path, name: str, plan: SavePlan, planner: SavePlanner) -> list[Written]:
    """Write one rank's part of a checkpoint, and wait until the disk has the bytes.

    Tensors on another device are copied to the host one at a time.

    Raises:
        OSError: The file could not be written.
    """
    written: list[Written] = []
    if not plan.items:
        return written
    with (folder / name).open("xb") as file:
        start = 0
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            assert item.tensor_data is not None
            data = _bytes_of(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())
            file.write(data)
            chunk = item.tensor_data.chunk
            piece = Piece(tuple(chunk.offsets), tuple(chunk.sizes), name, start, zlib.crc32(data))
            written.append(Written(item.index.fqn, tensor.dtype, tuple(item.tensor_data.size), piece))
            start += data.nbytes
        flush(file)
    return written


def joined(written: Iterable[Written]) -> dict[str, SavedTensor]:
    """All ranks' pieces, by tensor."""
    tensors: dict[str, SavedTensor] = {}
    for key, dtype, shape, piece in written:
        tensors.setdefault(key, SavedTensor(dtype, shape, [])).pieces.append(piece)
    return tensors


def require_written(folder: Path, tensors: Iterable[SavedTensor]) -> None:
    """Refuse to commit files that the first rank does not see whole.

    Raises:
        CheckpointError: A file is missing, too short or too long.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            end = piece.start + prod(piece.sizes) * tensor.dtype.itemsize
            sizes[piece.file] = max(sizes.get(piece.file, 0), end)
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise CheckpointError(
                f"'directory' must be one that all ranks reach and no one else writes to (got {found} bytes of "
                f"{name!r} on rank 0, not {size}). Give a directory of a file system that all machines share"
            )


class PieceReader:
    """Reads pieces of one checkpoint; one file is open at a time.

    Args:
        folder: The files' folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._file: IO[bytes] | None = None

    def read(self, piece: Piece, into: torch.Tensor) -> None:
        """Fill a contiguous tensor of the piece's sizes.

        Raises:
            OSError: The file can't be read.
            CheckpointError: The file is damaged.
        """
        if self._file is None or self._name != piece.file:
            self.close()
            self._name, self._file = piece.file, (self._folder / piece.file).open("rb")
        data = _bytes_of(into)
        self._file.seek(piece.start)
        fault = None
        if (found := self._file.readinto(data)) != data.nbytes:  # type: ignore[attr-defined]  # of a BufferedReader
            fault = f"{found} of {data.nbytes} bytes from byte {piece.start} on"
        elif (checksum := zlib.crc32(data)) != piece.checksum:
            fault = f"checksum {checksum:08x} instead of {piece.checksum:08x} from byte {piece.start} on"
        if fault is not None:
            path = self._folder / piece.file
            raise CheckpointError(f"'directory' must hold whole files (got {fault} in {str(path)!r}). {CURE}")

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def opened(folder: Path) -> Iterator[PieceReader]:
    """A reader, closed at the end of the block."""
    reader = PieceReader(folder)
    try:
        yield reader
    finally:
        reader.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
