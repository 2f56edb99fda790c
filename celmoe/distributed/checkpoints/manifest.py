"""The content of a checkpoint's directory, as JSON: nothing else in the directory is believed."""

from __future__ import annotations

import json
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from celmoe.errors import CheckpointError
from celmoe.files import replaced

from .agreement import told
from .experts import Orders, checked_orders

FILE_NAME = "checkpoint.json"
FORMAT = "celmoe checkpoint"
VERSION = 1
CURE = "Give the directory of a finished save_checkpoint, or take an older checkpoint"

# The place of a tensor or value: ("model", name), or ("optimizer", name, key).
Place: TypeAlias = tuple[str, ...]

_GENERATION = re.compile(r"data-[0-9a-f]{32}")
_FILE = re.compile(r"rank-\d+\.bin")
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


class Piece(NamedTuple):
    """A box of a tensor that one rank wrote.

    Attributes:
        offsets: The box's first index in the tensor, by axis.
        sizes: The box's sizes, by axis.
        file: The name of the file that holds the box's bytes.
        start: The position of the first byte in the file.
        checksum: The CRC-32 of the box's bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str = ""
    start: int = 0
    checksum: int = 0


class SavedTensor(NamedTuple):
    """A saved tensor: its dtype, its shape, and the pieces that make it up, each element in one piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass
class Content:
    """All of a checkpoint but tensors' bytes.

    Attributes:
        tensors: The saved tensors, by place.
        values: Optimizer state that is no tensor, by place.
        groups: The optimizer's hyperparameters, by group; ``None`` if no optimizer was saved.
        extra: The caller's ``extra``.
        generation: The name of the files' folder.
        experts: The order of the experts; empty in checkpoints of earlier versions.
    """

    tensors: dict[Place, SavedTensor]
    values: dict[Place, Any]
    groups: list[dict[str, Any]] | None
    extra: dict[str, Any]
    generation: str = ""
    experts: Orders = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_right = self.groups is None or all(isinstance(group, dict) for group in self.groups)
        if not (is_right and isinstance(self.extra, dict)):
            raise TypeError("groups or extras that are no mappings")


def new_generation() -> str:
    """A name for the folder of one save, which no other save has."""
    return f"data-{secrets.token_hex(16)}"


def old_generations(directory: Path) -> list[Path]:
    """The folders that the manifest does not name, of replaced saves and of unfinished saves."""
    try:
        kept = read_manifest(directory).generation if (directory / FILE_NAME).exists() else ""
    except CheckpointError:
        return []
    return [each for each in directory.iterdir() if _GENERATION.fullmatch(each.name) and each.name != kept]


def write_manifest(directory: Path, content: Content) -> None:
    """Commit a checkpoint: from then on the directory holds this checkpoint.

    Raises:
        OSError: The manifest could not be written; the directory holds the checkpoint before.
    """
    body = json.dumps(
        {
            "generation": content.generation,
            "tensors": [
                [place, str(each.dtype).removeprefix("torch."), each.shape, each.pieces]
                for place, each in content.tensors.items()
            ],
            "values": list(content.values.items()),
            "groups": content.groups,
            "extra": content.extra,
            "experts": content.experts,
        }
    ).encode()
    head = json.dumps({"format": FORMAT, "version": VERSION, "checksum": zlib.crc32(body)}).encode()
    # See [Note: Replaced whole].
    with replaced(directory / FILE_NAME) as file:
        file.write(head + b"\n" + body + b"\n")


def read_manifest(directory: Path) -> Content:
    """Read the directory's content.

    Raises:
        CheckpointError: The manifest is missing, damaged, foreign, or of another version.
    """
    rule = "'directory' must hold a checkpoint of save_checkpoint"
    try:
        written = (directory / FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        found = "none" if not directory.is_dir() else "one of torch.distributed.checkpoint, or of an older celmoe"
        if directory.is_dir() and not (directory / ".metadata").exists():
            found = f"no {FILE_NAME!r}"
        raise CheckpointError(f"{rule} (got {found} in {str(directory)!r}). {CURE}") from None
    except OSError as error:
        raise CheckpointError(f"{rule} that can be read (got {error}). Mend what keeps the file from you") from error
    with told(f"{rule} (in {str(directory)!r}) whose {FILE_NAME!r} is whole", CURE):
        head, _, body = written.partition(b"\n")
        said = json.loads(head)
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']!r}")
        if said["version"] != VERSION:
            raise CheckpointError(
                f"{rule} of version {VERSION} (got version {said['version']!r} in {str(directory)!r}). Read it with "
                f"the celmoe that wrote it"
            )
        if zlib.crc32(body.removesuffix(b"\n")) != said["checksum"]:
            raise ValueError("a wrong checksum")
        return _content(json.loads(body))


def _content(said: Mapping[str, Any]) -> Content:
    """The content, with every part checked to be of its kind: somebody else may have written the manifest."""
    if not _GENERATION.fullmatch(said["generation"]):
        raise ValueError(f"a folder {said['generation']!r}")
    return Content(
        {_place(place): _tensor(*rest) for place, *rest in said["tensors"]},
        {_place(place): value for place, value in said["values"]},
        said["groups"],
        said["extra"],
        said["generation"],
        checked_orders(said.get("experts", {})),
    )


def key_of(place: Place) -> str:
    """A place as one string, as DCP wants names."""
    return json.dumps(place)


def place_of(key: str) -> Place:
    """The place that a string stands for."""
    return tuple(json.loads(key))


def _place(parts: Iterable[Any]) -> Place:
    place = tuple(parts)
    if not all(isinstance(part, str) for part in place) or (place[0], len(place)) not in {
        ("model", 2),
        ("optimizer", 3),
    }:
        raise ValueError(f"a tensor or value {place}")
    return place


def _tensor(dtype: str, shape: Iterable[Any], pieces: Iterable[Iterable[Any]]) -> SavedTensor:
    sizes = _counts(shape)
    found = []
    for offsets, lengths, file, start, checksum in pieces:
        piece = Piece(_counts(offsets), _counts(lengths), file, *_counts((start, checksum)))
        ends = [first + length for first, length in zip(piece.offsets, piece.sizes, strict=True)]
        if not _FILE.fullmatch(file) or any(end > size for end, size in zip(ends, sizes, strict=True)):
            raise ValueError(f"a piece {piece} of a tensor of shape {sizes}")
        found.append(piece)
    if sum(prod(piece.sizes) for piece in found) != prod(sizes) or _overlap(found):
        raise ValueError(f"pieces that do not make up a tensor of shape {sizes}")
    return SavedTensor(_DTYPES[dtype], sizes, found)


def _overlap(pieces: Iterable[Piece]) -> bool:
    """True if two pieces share an element."""
    boxes = [
        [(first, first + length) for first, length in zip(piece.offsets, piece.sizes, strict=True)]
        for piece in pieces
        if prod(piece.sizes)
    ]
    if len(boxes) < 2:
        return False
    # A sweep along the axis with the most starts compares the fewest boxes.
    axis = max(range(len(boxes[0])), key=lambda axis: len({box[axis][0] for box in boxes}))
    opened: list[list[tuple[int, int]]] = []
    for box in sorted(boxes, key=lambda box: box[axis]):
        opened = [other for other in opened if other[axis][1] > box[axis][0]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)) for other in opened):
            return True
        opened.append(box)
    return False


def _counts(numbers: Iterable[Any]) -> tuple[int, ...]:
    counts = tuple(numbers)
    if not all(type(number) is int and number >= 0 for number in counts):
        raise ValueError(f"counts {counts}")
    return counts
