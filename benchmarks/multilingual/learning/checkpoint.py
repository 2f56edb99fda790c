"""Checkpoints: everything that a run needs to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.multilingual.learning.training import Contender, Progress
from benchmarks.multilingual.words.rules import EditRule
from benchmarks.multilingual.words.vocabulary import Vocabulary
from celmoe.files import replaced, verify_archive
from celmoe.optim import load_state_by_name, state_by_name

FORMAT = 4
FILE_NAME = "checkpoint.pt"


class CheckpointError(Exception):
    """There is no checkpoint to go on from, or it belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The facts that must not change between a run and its resumption.

    ``added`` are the last of the languages, which came after the training, each with the number of its training words,
    ``None`` for all that it has.
    """

    languages: tuple[str, ...]
    pairs: int
    batch_size: int
    seed: int
    added: tuple[tuple[str, int | None], ...] = ()


def _vocabulary_state(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "languages": vocabulary.languages,
        "characters": vocabulary.characters,
        "rules": [rule.to_text() for rule in vocabulary.rules],
        "candidates": vocabulary.candidates,
    }


def vocabulary_of(state: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of the checkpoint's networks."""
    saved = state["vocabulary"]
    return Vocabulary(
        languages=saved["languages"],
        characters=saved["characters"],
        rules=[EditRule.from_text(text) for text in saved["rules"]],
        candidates=saved["candidates"],
        later=len(identity_of(state).added),
    )


def save_checkpoint(
    folder: Path, identity: RunIdentity, vocabulary: Vocabulary, contenders: Sequence[Contender], progress: Progress
) -> Path:
    """Write the checkpoint in one step; whoever is killed, and whenever, leaves this one or the one before, whole.

    Raises:
        OSError: It can't be written; the one before is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "identity": {
            "languages": list(identity.languages),
            "pairs": identity.pairs,
            "batch_size": identity.batch_size,
            "seed": identity.seed,
            "added": [*map(list, identity.added)],
        },
        "vocabulary": _vocabulary_state(vocabulary),
        "progress": progress.state_dict(),
        "contenders": {
            each.name: {
                "network": each.network.state_dict(),
                # By the experts' names: a stacked run goes on from one that is not, and the other way round.
                "optimizer": state_by_name(each.network, each.optimizer),
                "seconds": each.seconds,
                "words": each.words,
            }
            for each in contenders
        },
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    path = folder / FILE_NAME
    with replaced(path) as file:
        torch.save(state, file)
    return path


def read_checkpoint(folder: Path, option: str = "--resume", *, mapped: bool = False) -> dict[str, Any]:
    """The checkpoint's content, on the CPU; ``mapped``: tensors are read from the file when they are used.

    ``option`` is the option that asks for the checkpoint, for errors.

    Raises:
        CheckpointError: There is none, it is damaged, or of another format.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise CheckpointError(f"'{option}' must find a checkpoint in the report folder (got none in {str(folder)!r})")
    try:
        verify_archive(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        found = state.get("format")
    except Exception as error:  # torch.load passes on all errors of its layers below
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"'{option}' must find a whole checkpoint (got {str(path)!r}: {reason})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"'{option}' must find a checkpoint of format {FORMAT} (got format {found!r} in {str(path)!r})"
        )
    return state


def identity_of(state: Mapping[str, Any]) -> RunIdentity:
    """The identity of the run that wrote the checkpoint."""
    found = state["identity"]
    # A run that no language was added to may not have noted that.
    added = tuple((language, words) for language, words in found.get("added", ()))
    return RunIdentity(**{**found, "languages": tuple(found["languages"]), "added": added})


def restore(state: dict[str, Any], vocabulary: Vocabulary, contenders: Sequence[Contender]) -> Progress:
    """Put the checkpoint's state into networks, optimizers and random generators.

    Raises:
        CheckpointError: The words that the run was made from have changed since.
    """
    if state["vocabulary"] != _vocabulary_state(vocabulary):
        raise CheckpointError("'--resume' must find the words that the checkpoint was trained on (got another sample)")
    for each in contenders:
        saved = state["contenders"][each.name]
        each.network.load_state_dict(saved["network"])
        load_state_by_name(each.network, each.optimizer, saved["optimizer"])
        each.seconds, each.words = saved["seconds"], saved["words"]
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return Progress.from_state(state["progress"])
