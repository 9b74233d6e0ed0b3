"""``CaptureCallback``: captured blocks in transformers' ``Trainer`` and in TRL's trainers.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from prodial_kernels.captured.answers.early import early_losses
from prodial_kernels.captured.model import Captured, capture


class CaptureCallback(TrainerCallback):
    """Captures the model's blocks while ``trainer.train()`` runs.

    ``Trainer(..., callbacks=[CaptureCallback()])``. Batches should have one shape or a few: pad
    them to one length, and set ``dataloader_drop_last=True`` to drop an epoch's short last batch.

    Whether a loss is finite, which ``Trainer`` asks in every step, it is told while backward still
    runs (``answers/early.py``), so that the next step is prepared meanwhile.
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        norms: bool = True,
    ) -> None:
        """Take the arguments of :func:`prodial_kernels.capture`."""
        self._options: dict[str, Any] = {
            "batch_size": batch_size, "seq_len": seq_len, "norms": norms
        }  # fmt: skip
        self.captured: Captured | None = None
        self._early: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture the blocks."""
        self.release()
        self.captured = capture(kwargs["model"], **self._options)
        if getattr(args, "logging_nan_inf_filter", False):
            self._early = early_losses(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release them."""
        self.release()

    def release(self) -> None:
        """Release the blocks; call it where training ended with an error."""
        if self._early is not None:
            self._early.remove()
            self._early = None
        if self.captured is not None:
            self.captured.release()
            self.captured = None
