"""``CaptureCallback``: captured blocks in transformers' ``Trainer`` and in TRL's trainers.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from prodial_kernels.captured.model import Captured, capture


class CaptureCallback(TrainerCallback):
    """Captures the model's blocks while ``trainer.train()`` runs.

    ``Trainer(..., callbacks=[CaptureCallback()])``. Batches should come in one shape or a few: fill
    them up to one length, and set ``dataloader_drop_last=True`` for the last one of an epoch.
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the blocks over."""
        self.release()
        self.captured = capture(kwargs["model"], **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give them back."""
        self.release()

    def release(self) -> None:
        """Give the blocks back, also where training has ended with an error."""
        if self.captured is not None:
            self.captured.release()
            self.captured = None
