"""Ranks act together: a fault of one rank fails every rank, and all ranks know it before any rank goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist

from celmoe.errors import CheckpointError, StackedError

_Said = TypeVar("_Said")
_Answer = TypeVar("_Answer")


@contextmanager
def told(rule: str, cure: str) -> Iterator[None]:
    """Turn any failure in the block into a `CheckpointError` that names the broken rule and the cure.

    Raises:
        CheckpointError: The block failed.
    """
    try:
        yield
    except CheckpointError:
        raise
    except StackedError as error:
        # The optimizer is at fault, not the checkpoint.
        raise CheckpointError(str(error)) from error
    except Exception as error:
        raise CheckpointError(f"{rule} (got {type(error).__name__}: {_first_line(error)}). {cure}") from error


def agree(
    work: Callable[[], _Said], settle: Callable[[list[_Said]], Sequence[_Answer]], *, rule: str, cure: str
) -> _Answer:
    """Do some work on every rank, and have the first rank settle the results once all ranks have succeeded.

    Args:
        work: The work; its result travels to the first rank.
        settle: Takes the ranks' results, and returns each rank's answer.
        rule: See `told`.
        cure: See `told`.

    Returns:
        This rank's answer.

    Raises:
        CheckpointError: A rank failed, and all ranks raise; or a rank is gone, as the backend tells the others.
    """
    cause: BaseException | None = None
    said: _Said | None = None
    try:
        with told(rule, cure):
            said = work()
    except BaseException as error:  # noqa: BLE001  # raised again, once the others know
        cause = error
    heard = _gathered((_fault(cause), said))
    answers: list[tuple[str | None, Any]] | None = None
    if heard is not None:
        faults = {rank: fault for rank, (fault, _) in enumerate(heard) if fault is not None}
        if not faults:
            try:
                with told(rule, cure):
                    answers = [(None, answer) for answer in settle([cast(_Said, said) for _, said in heard])]
            except BaseException as error:  # noqa: BLE001  # as above
                cause = error
                faults = {0: str(_fault(error))}
        if faults:
            rank, fault = next(iter(faults.items()))
            answers = [(f"rank {rank}: {fault}" if len(heard) > 1 else fault, None)] * len(heard)
    fault, answer = _scattered(answers)
    if fault is None:
        return cast(_Answer, answer)
    if cause is not None and not isinstance(cause, Exception):
        raise cause  # Ctrl-C stays Ctrl-C on its rank.
    raise CheckpointError(fault) from (cause and cause.__cause__)


def is_first() -> bool:
    """True if this rank settles for all ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _fault(error: BaseException | None) -> str | None:
    # Errors themselves don't travel: not every error class can be unpickled.
    return None if error is None else str(error) or type(error).__name__


def _gathered(said: Any) -> list[Any] | None:
    if not dist.is_initialized():
        return [said]
    heard = [None] * dist.get_world_size() if is_first() else None
    with _all_there():
        dist.gather_object(said, heard)
    return heard


def _scattered(answers: list[Any] | None) -> Any:
    if not dist.is_initialized():
        assert answers is not None
        return answers[0]
    answer: list[Any] = [None]
    with _all_there():
        dist.scatter_object_list(answer, answers)
    return answer[0]


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(
            f"rank {dist.get_rank()}: all {dist.get_world_size()} ranks must come to a checkpoint (got "
            f"{_first_line(error)}). Start the job again: the directory holds the checkpoint before this one, or this "
            f"one, whole"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason"])[0]
