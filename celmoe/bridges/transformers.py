"""Callbacks for the ``Trainer`` of transformers: ``trainer.add_callback(LoadCallback(trainer.log))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from celmoe.errors import PackageMissingError
from celmoe.load_tracker import LoadTracker
from celmoe.routing.plan import RoutingPlan

from .experts import gradient_scalars
from .patience import Patience

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise PackageMissingError("transformers must be installed for its callbacks (pip install transformers)") from error

Log = Callable[[dict[str, float]], None]


class LoadCallback(TrainerCallback):  # type: ignore[misc]  # the package may be missing
    """Counts each expert's rows in training, and logs their shares with the trainer's losses: `LoadTracker.scalars`.

    Batches have the plan under ``"plan"``, as `Collator` puts it there.

    Args:
        log: The trainer's ``log``.
        tracker: Counts; a new one by default.
    """

    def __init__(self, log: Log, tracker: LoadTracker | None = None) -> None:
        self.tracker = LoadTracker() if tracker is None else tracker
        self._log = log
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:  # noqa: ARG002  # the trainer's own
        """Look at the model's batches from now on."""
        # Ahead of the hook that takes the plan out of a host's keywords.
        self._handle = model.register_forward_pre_hook(self._count, prepend=True, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # as above
        """Log the shares, if the trainer logs this step."""
        if control.should_log:
            self._log(self.tracker.scalars())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # as above
        """Look no longer."""
        self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG002  # torch's own
        if model.training and isinstance(plan := kwargs.get("plan"), RoutingPlan):
            self.tracker.update(plan)


class GradientNormCallback(TrainerCallback):  # type: ignore[misc]  # as above
    """Logs the norm of each expert's gradient, after clipping, every ``logging_steps`` steps: `gradient_scalars`.

    Args:
        log: The trainer's ``log``.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:  # noqa: ARG002  # as above
        """Log the norms."""
        if (state.global_step + 1) % max(1, state.logging_steps) == 0:
            self._log(gradient_scalars(model))


class ExpertEarlyStopping(TrainerCallback):  # type: ignore[misc]  # as above
    """Freezes experts after each evaluation, and ends training once all are frozen: see `Patience`.

    Its arguments are those of `Patience`. ``monitor`` is a key of what ``compute_metrics`` returns, behind the
    trainer's prefix: ``"eval_loss_{expert}"``. An interrupted run goes on with `Patience.state_dict`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.patience = Patience(*args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:  # noqa: ARG002  # as above
        """Freeze again whom a loaded state says is frozen."""
        self.patience.restore(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **_: Any) -> None:  # noqa: ARG002  # as above
        """Take the figures in."""
        if self.patience.update(model, metrics):
            control.should_training_stop = True
