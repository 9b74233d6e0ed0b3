"""Write a plain model to a directory, and check that what was written computes the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prodial_kernels.files.atomic import atomic_directory, safetensors_errors
from prodial_kernels.files.written import clear_leftovers, mark_written, own_files
from prodial_kernels.linear import unrounded
from prodial_kernels.models.layers.head import eval_mode
from prodial_kernels.models.layers.offload import blocks_on_demand
from prodial_kernels.models.loading.load import LoadedModel, load_model
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.modules.counting import stored_elements
from prodial_kernels.training.memory.device import indexed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Merging rounds each weight once, and the matrix products sum in another order. Measured on eight
# layers: 5 eps in float32, 1 eps in bfloat16; deeper models need room above that.
_TOLERANCE_IN_EPS = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}


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


@dataclass(frozen=True)
class Rounded:
    """A model whose weights were rounded before they are written.

    Attributes:
        dtype: To what.
        logits: :func:`logits_of` it, computed in the dtype that it had before.
    """

    dtype: torch.dtype
    logits: Tensor


@contextmanager
def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    replace: bool = False,
    rename: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Write a plain model and its tokenizer in transformers' format, whole or not at all.

    Yields the directory that they are in first, to be checked; it takes its place at ``path`` when
    the block succeeds. Otherwise ``path`` stays as it was.

    Args:
        model: The model, without an adapter.
        tokenizer: Its tokenizer.
        path: The directory to write.
        replace: Whether an empty directory or an earlier written model at ``path`` is replaced.
        rename: Changes names in what transformers has written, before it is checked.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
        PlaceError: ``path`` is to be replaced, and holds something that no earlier call wrote.
        OSError: The disk is full, or the place cannot be written.
    """

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if rename is not None:
            rename(directory)

    with written_directory(path, save, replace=replace) as temporary:
        yield temporary


@contextmanager
def written_directory(
    path: Path, save: Callable[[Path], None], *, replace: bool = False
) -> Iterator[Path]:
    """Let ``save`` write a directory, whole or not at all; as :func:`write_model`."""
    clear_leftovers(path)
    with atomic_directory(path, own_files=own_files if replace else None) as temporary:
        with safetensors_errors(path):
            save(temporary)
        mark_written(temporary)
        yield temporary


def has_room_dense(model: nn.Module, device: torch.device) -> bool:
    """Whether ``device`` has room for a dense copy of a quantised ``model`` beside it."""
    if device.type != "cuda":
        return True
    packed = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    dense = sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in packed)
    dense += stored_elements(model) * (packed[0].dtype.itemsize if packed else 0)
    dense += sum(parameter.nbytes for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(indexed(device))
    total = torch.cuda.get_device_properties(device).total_memory
    free = min(free, int(limit * total) - torch.cuda.memory_allocated(device))
    # A tenth for activations.
    return 1.1 * dense < free


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits ``[batch, length, vocabulary]`` in float32 on the CPU, without dropout.

    Nothing is rounded to fp8 on the way: a merged model computes without that.
    """
    device = next(model.parameters()).device
    with eval_mode(model), unrounded(model):
        logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.float().cpu()


def check_written_model(
    path: Path,
    tokens: Tensor,
    expected: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    by_blocks: bool = False,
    rounded: Rounded | None = None,
) -> Agreement:
    """Load a written model and compare its logits with those of the model in memory.

    Args:
        path: Directory of the written model.
        tokens: int64 ``[batch, length]``.
        expected: :func:`logits_of` the model in memory, adapter and all.
        device: Where to run it.
        dtype: The dtype to run it in.
        by_blocks: Keep the model on the CPU and bring its blocks to the device one by one.
        rounded: What :func:`round_as_stored` gave for the model before it was written.

    Raises:
        MergeError: They differ by more than rounding.
    """
    home = torch.device("cpu") if by_blocks else device
    model = load_model(str(path), device=home, dtype=dtype).model
    with blocks_on_demand(model, device) if by_blocks else nullcontext():
        found = logits_of(model, tokens)
    agreement = compare_logits(found, expected, dtype=dtype)
    if rounded is None:
        _check(agreement, "the written model does not compute what was trained")
        return agreement
    # The file must hold the rounded weights, and nothing else may tell it from what was trained.
    _check(
        compare_logits(found, rounded.logits, dtype=dtype),
        "the written model does not compute what was merged",
    )
    return compare_logits(found, expected, dtype=rounded.dtype)


def round_as_stored(
    loaded: LoadedModel, tokens: Tensor, expected: Tensor, *, dtype: str
) -> Rounded | None:
    """Cast a merged model to what its checkpoint is stored in, if that is narrower, in place.

    A base of 16 bits that was computed with in fp32 becomes one of 16 bits again, of the same
    size; the few parameters that it stores in fp32 stay so. Buffers, such as rotary frequencies,
    which no file holds, stay as they are.

    Args:
        loaded: What was loaded and merged; on the CPU or a GPU.
        tokens: int64 ``[batch, length]``.
        expected: :func:`logits_of` the model before it was merged.
        dtype: The option; only ``"auto"`` leaves the choice.

    Returns:
        What the rounded model computes; None where it is not rounded.

    Raises:
        MergeError: Merging changed what the model computes by more than rounding.
    """
    model, stored = loaded.model, loaded.stored_dtype
    wide = next(model.parameters()).dtype
    if dtype != "auto" or stored is None or stored.itemsize >= wide.itemsize:
        return None
    largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.numel())
    if not largest <= torch.finfo(stored).max:
        return None
    merged = compare_logits(logits_of(model, tokens), expected, dtype=wide)
    _check(merged, "the merged model does not compute what was trained")
    kept = {_within(name) for name in loaded.stored_wider}
    _cast_parameters(model, stored, kept)
    _cast_parameters(model, wide)
    logits = logits_of(model, tokens)
    _cast_parameters(model, stored, kept)
    return Rounded(stored, logits)


def _cast_parameters(
    model: nn.Module, dtype: torch.dtype, kept: Collection[str] = frozenset()
) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and _within(name) not in kept:
            parameter.data = parameter.data.to(dtype)


def _within(name: str) -> str:
    """A parameter's name below the base model, which checkpoints may call otherwise."""
    return name.partition(".")[2]


def check_adapter(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> Agreement:
    """Compare logits of a written adapter with those of the trained one, as they were.

    MergeError where they differ by more than rounding.
    """
    agreement = compare_logits(found, expected, dtype=dtype)
    _check(agreement, "the written adapter does not compute what was trained")
    return agreement


def _check(agreement: Agreement, problem: str) -> None:
    # "not <=" rather than ">": a NaN must fail.
    if not agreement.relative <= agreement.relative_tolerance:
        raise MergeError(
            f"{problem}: {agreement}, where rounding explains {agreement.relative_tolerance:.1e}; "
            "it was not kept. The adapter is not affected"
        )


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
