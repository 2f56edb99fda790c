"""Files that are whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write. The file replaces ``path`` when the block ends; an error leaves ``path`` as it was.

    [Note: Replaced whole] The new content goes into a file beside ``path``, is flushed to the disk, and renamed. POSIX
    file systems, NFS and Windows rename in one step. If another process on Windows has ``path`` open, the rename is an
    ``OSError`` and ``path`` stays. Buckets mounted as folders copy instead of renaming, and give no such promise. A
    killed process leaves the file beside ``path``, and the next write takes over that file.

    Raises:
        OSError: The file could not be written, flushed or renamed.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            flush(file)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            # torch.save says "unexpected pos"; the error of its file says why.
            raise error.__context__ from None
        raise
    flush_folder(path.parent)


def verify_archive(path: Path, first: int = 0, step: int = 1) -> None:
    """Verify the checksums in a file of ``torch.save``, which ``torch.load`` does not verify.

    Args:
        path: A file of ``torch.save``. A file that is no archive (as before PyTorch 1.6) has no checksums.
        first: The first record to verify.
        step: Verify every ``step``-th record, so that several processes share the reading.

    Raises:
        OSError, zipfile.BadZipFile: The file can't be read; the file is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist()[first::step]:
                with archive.open(entry) as record:
                    while record.read(2**20):
                        pass


def flush(file: IO[bytes]) -> None:
    """Wait until the disk has the file's content."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder. Windows opens no folder, and journals names on its own."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
