"""Ctrl-C at a step of the multilingual job's training."""

from __future__ import annotations

import signal

import pytest

from benchmarks.multilingual.console import Bar


def interrupt_at(patch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Press Ctrl-C so many times once the training's bar stands at a step."""
    move_to = Bar.move_to

    def interrupt(bar: Bar, done: int, total: int | None = None, figures: str | None = None) -> None:
        move_to(bar, done, total, figures)
        if done == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    patch.setattr(Bar, "move_to", interrupt)
