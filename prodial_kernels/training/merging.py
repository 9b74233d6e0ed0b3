"""Write a plain model to a directory, and check that what was written computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.atomic import atomic_directory, safetensors_errors
from prodial_kernels.training.device_memory import indexed
from prodial_kernels.training.model import load_model
from prodial_kernels.training.offload import blocks_on_demand
from prodial_kernels.training.written import clear_leftovers, mark_written, own_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Merging rounds each weight once, and the matrix products sum in another order. Measured on eight
# layers: 5 eps in float32, 1 eps in bfloat16; deeper models need room above that.
_TOLERANCE_IN_EPS = {torch.float32: 64, torch.bfloat16: 8}


class MergeError(RuntimeError):
    """The written model does not compute what the trained one does."""


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits on the same tokens are apart.

    Attributes:
        max_difference: Largest absolute difference of a logit.
        relative: Root mean square of the differences by that of the logits.
        relative_tolerance: The largest ``relative`` that rounding explains in the dtype.
        n_tokens: Tokens compared.
    """

    max_difference: float
    relative: float
    relative_tolerance: float
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.max_difference:.1e} "
            f"({self.relative:.1e} relative) over {self.n_tokens:,} tokens"
        )


@contextmanager
def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    replace: bool = False,
) -> Iterator[Path]:
    """Write a plain model and its tokenizer in transformers' format, whole or not at all.

    Yields the directory that they are in first, to be checked; it takes its place at ``path`` when
    the block succeeds. Otherwise ``path`` stays as it was.

    Args:
        model: The model, without an adapter.
        tokenizer: Its tokenizer.
        path: The directory to write.
        replace: Whether an empty directory or an earlier written model at ``path`` is replaced.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
        PlaceError: ``path`` is to be replaced, and holds something that no earlier call wrote.
        OSError: The disk is full, or the place cannot be written.
    """
    clear_leftovers(path)
    with atomic_directory(path, own_files=own_files if replace else None) as temporary:
        with safetensors_errors(path):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        mark_written(temporary)
        yield temporary


def has_room_dense(model: nn.Module, device: torch.device) -> bool:
    """Whether ``device`` has room for a dense copy of a quantised ``model`` beside it."""
    if device.type != "cuda":
        return True
    packed = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    dense = sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in packed)
    dense += sum(parameter.nbytes for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(indexed(device))
    total = torch.cuda.get_device_properties(device).total_memory
    free = min(free, int(limit * total) - torch.cuda.memory_allocated(device))
    # A tenth for activations.
    return 1.1 * dense < free


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits ``[batch, length, vocabulary]`` in float32 on the CPU, without dropout."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = model(input_ids=tokens.to(device), use_cache=False).logits
    model.train(was_training)
    return logits.float().cpu()


def check_written_model(
    path: Path,
    tokens: Tensor,
    expected: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    by_blocks: bool = False,
) -> Agreement:
    """Load a written model and compare its logits with those of the model in memory.

    Args:
        path: Directory of the written model.
        tokens: int64 ``[batch, length]``.
        expected: :func:`logits_of` the model in memory, adapter and all.
        device: Where to run it.
        dtype: The dtype to run it in.
        by_blocks: Keep the model on the CPU and bring its blocks to the device one by one.

    Returns:
        The comparison.

    Raises:
        MergeError: They differ by more than rounding.
    """
    home = torch.device("cpu") if by_blocks else device
    model = load_model(str(path), device=home, dtype=dtype).model
    with blocks_on_demand(model, device) if by_blocks else nullcontext():
        found = logits_of(model, tokens)
    agreement = compare_logits(found, expected, dtype=dtype)
    # "not <=" rather than ">": a NaN must fail.
    if not agreement.relative <= agreement.relative_tolerance:
        raise MergeError(
            f"the written model does not compute what was trained: {agreement}, where rounding "
            f"explains {agreement.relative_tolerance:.1e}; it was not kept. The adapter is not "
            "affected"
        )
    return agreement


def compare_logits(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> Agreement:
    """Compare logits ``[batch, length, vocabulary]`` with the rounding of ``dtype`` in mind."""
    difference = found.double() - expected.double()
    scale = expected.double().square().mean().sqrt()
    return Agreement(
        max_difference=float(difference.abs().max()),
        relative=float(difference.square().mean().sqrt() / scale),
        relative_tolerance=_TOLERANCE_IN_EPS[dtype] * torch.finfo(dtype).eps,
        n_tokens=expected.shape[0] * expected.shape[1],
    )
