"""``CaptureCallback``: captured blocks in transformers' ``Trainer`` and in TRL's trainers.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from prodial_kernels.captured.answers.early import early_losses
from prodial_kernels.captured.model import Captured, capture

# Of accelerate's loaders, which TrainingArguments(accelerator_config={"non_blocking": True}) sets.
_NON_BLOCKING = "_non_blocking"


class CaptureCallback(TrainerCallback):
    """Captures the model's blocks while ``trainer.train()`` runs.

    ``Trainer(..., callbacks=[CaptureCallback()])``. Batches should have one shape or a few: pad
    them to one length, and set ``dataloader_drop_last=True`` to drop an epoch's short last batch.

    ``Trainer`` waits for the device twice in every step: to ask whether the loss is finite, and to
    copy the next batch. Here it is told of the loss while backward still runs
    (``answers/early.py``), and batches in pinned memory (``dataloader_pin_memory``, on by default)
    are copied without waiting, so that the next step is prepared meanwhile.
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
        self._loader: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture the blocks."""
        self.release()
        self.captured = capture(kwargs["model"], **self._options)
        if getattr(args, "logging_nan_inf_filter", False):
            self._early = early_losses(kwargs["model"])
        loader = kwargs.get("train_dataloader")
        if getattr(loader, "pin_memory", False) and vars(loader).get(_NON_BLOCKING) is False:
            self._loader = loader
            setattr(loader, _NON_BLOCKING, True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release them."""
        self.release()

    def release(self) -> None:
        """Release the blocks; call it where training ended with an error."""
        if self._early is not None:
            self._early.remove()
            self._early = None
        if self._loader is not None:
            setattr(self._loader, _NON_BLOCKING, False)
            self._loader = None
        if self.captured is not None:
            self.captured.release()
            self.captured = None
