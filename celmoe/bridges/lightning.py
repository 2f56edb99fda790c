"""Callbacks for Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celmoe.errors import PackageMissingError
from celmoe.load_tracker import LoadTracker
from celmoe.routing.plan import RoutingPlan

from .experts import gradient_scalars, plan_in
from .patience import Patience

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise PackageMissingError("lightning must be installed for its callbacks (pip install lightning)") from error


class LoadCallback(Callback):  # type: ignore[misc]  # the package may be missing
    """Counts each expert's rows in training, and logs their shares: `LoadTracker.scalars`.

    Checkpoints keep the counts.

    Args:
        tracker: Counts; a new one by default.
        every: Steps from one log to the next.
        plan: Finds the plan in a batch; by default it is an entry of it.
    """

    def __init__(
        self, tracker: LoadTracker | None = None, *, every: int = 1, plan: Callable[[Any], RoutingPlan] = plan_in
    ) -> None:
        self.tracker = LoadTracker() if tracker is None else tracker
        self.every = every
        self._plan = plan

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002  # Lightning's own
        """Count a batch."""
        self.tracker.update(self._plan(batch))
        if (batch_idx + 1) % self.every == 0:
            pl_module.log_dict(self.tracker.scalars(), on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's counts."""
        self.tracker.load_state_dict(state_dict)


class GradientNormCallback(Callback):  # type: ignore[misc]  # as above
    """Logs the norm of each expert's gradient before an optimizer's step: `gradient_scalars`.

    Args:
        every: Optimizer's steps from one log to the next. A log waits for the device once for each place.
    """

    def __init__(self, *, every: int = 1) -> None:
        self.every = every

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002  # Lightning's own
        """Log the norms."""
        if (trainer.global_step + 1) % self.every == 0:
            pl_module.log_dict(gradient_scalars(pl_module), on_step=True, on_epoch=False, batch_size=1)


class ExpertEarlyStopping(Callback):  # type: ignore[misc]  # as above
    """Freezes experts after each validation, and ends training once all are frozen: see `Patience`.

    Its arguments are those of `Patience`. ``monitor`` is a key that the module has logged in validation. Checkpoints
    keep who is frozen.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.patience = Patience(*args, **kwargs)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002  # Lightning's own
        """Freeze again whom a checkpoint says is frozen."""
        self.patience.restore(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the figures in."""
        if not trainer.sanity_checking and self.patience.update(pl_module, trainer.callback_metrics):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Who is frozen, and since when the others have not improved."""
        return self.patience.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's state."""
        self.patience.load_state_dict(state_dict)
