"""Does a checkpoint fit its model whole: every tensor there, known, and of the right shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.quantization import TensorFiles
from prodial_kernels.quantization.names import (
    SIGNS,
    check_dense_dtype,
    foreign_format,
    is_part,
    is_part_of_adapter,
    listed,
)

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_FLOATING = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
# Files that a tokenizer may be built from beside those that its class names.
_WHOLE_TOKENIZERS = ("tokenizer.json", "tekken.json")
# Of the files that a class names: not of the vocabulary, or one of several ways to store it.
_NOT_VOCABULARY = ("tokenizer_file", "tokenizer_config_file", "normalizer_file")


def check_whole(info: Mapping[str, Any], names: Collection[str], layers: int | None = None) -> None:
    """Raise unless ``from_pretrained`` found every tensor of the model, and knew every one.

    Args:
        info: What it returns for ``output_loading_info``. Tensors that the model's class allows to
            be missing or unexpected, and tied ones, are not in it.
        names: The model's own tensors.
        layers: How many its configuration says it has, if that is known.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape; the message names it and
            says what to do.
    """
    missing = set(info["missing_keys"])
    there = set(names) - missing
    unexpected = {name for name in info["unexpected_keys"] if not is_part_of_adapter(name, there)}
    mismatched = {name: (stored, own) for name, stored, own in info["mismatched_keys"]}
    wrong = []
    if missing:
        wrong.append(f"the checkpoint lacks {listed(missing)}")
    if unexpected:
        wrong.append(f"it holds what this model does not know: {listed(unexpected)}")
    if mismatched:
        name = min(mismatched)
        stored, own = mismatched[name]
        more = f" (and {len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        wrong.append(
            f"{name} has shape {list(stored)} in the checkpoint, {list(own)} in the model{more}"
        )
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}. {_advice(missing, unexpected, layers)}")


def check_dense(tensors: TensorFiles) -> None:
    """Raise ValueError unless a checkpoint that says it is dense holds what dense tensors can be.

    transformers casts what it finds: codes would become weights. The message names a tensor that is
    stored in 8 bits or less.
    """
    names = set(tensors)
    # Of an adapted layer on a quantised base the merged weight is there too.
    own = [name for name in tensors if not is_part_of_adapter(name, names)]
    for name in own:
        if any(name.endswith(f".{sign}") for sign in SIGNS):
            raise ValueError(
                f"{name} is of a quantised layer, but config.json has no quantization_config: add "
                "the one that it was quantised with, or fetch the checkpoint again"
            )
    for name in own:
        check_dense_dtype(name, tensors.dtype(name))


def check_numbers(tensors: TensorFiles, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless all that became floating-point weights was stored as such numbers.

    transformers casts integers, booleans and complex numbers too, and drops what it loses by that.
    The message names the tensor. ``state`` holds the loaded model's own tensors by the names that
    they have there.
    """
    for name in tensors:
        own = state.get(name)
        if own is not None and own.is_floating_point() and tensors.dtype(name) not in _FLOATING:
            raise ValueError(
                f"{name} is stored as {tensors.dtype(name)}, where the model has floating-point "
                f"numbers ({', '.join(_FLOATING)}): these may be codes of a quantised weight. Use "
                "the dense checkpoint, or fetch this one again"
            )


def dtypes_of_dense(tensors: TensorFiles) -> tuple[torch.dtype | None, frozenset[str]]:
    """Return what most of a checkpoint's floating-point tensors are stored in; None without any.

    And the names of those that are stored wider, as transformers keeps a few parameters of some
    models in fp32 (zamba's A_log, the router of nemotron_h). Quantised layers do not count.
    """
    quantised = {name.rpartition(".")[0] for name in tensors if foreign_format(name) is not None}
    quantised |= {
        name.removesuffix(f".{sign}") for name in tensors for sign in SIGNS if name.endswith(sign)
    }
    stored = {
        name: _FLOATING[tensors.dtype(name)]
        for name in tensors
        if tensors.dtype(name) in _FLOATING
        and not any(name.startswith(f"{path}.") for path in quantised)
    }
    if not stored:
        return None, frozenset()
    main = Counter(stored.values()).most_common(1)[0][0]
    wider = (name for name, dtype in stored.items() if dtype.itemsize > main.itemsize)
    return main, frozenset(wider)


def check_merged(error: RuntimeError) -> None:
    """Raise ValueError for tensors, as of experts, that ``from_pretrained`` cannot put together.

    Its own ``error`` points to a report in a log that need not be shown; the message here names
    what they make up.
    """
    step = error.__traceback__
    while step is not None:
        info = step.tb_frame.f_locals.get("loading_info")
        failed = getattr(info, "conversion_errors", None)
        if failed:
            raise ValueError(
                f"the checkpoint's tensors for {listed(failed)} do not fit together: they differ "
                "in shape or number; fetch the checkpoint again, whole"
            ) from error
        step = step.tb_next


def check_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Raise ValueError unless the vocabulary of ``tokenizer`` came from files of ``directory``.

    For several models transformers invents an empty one otherwise. The message names the files.
    """
    if any((directory / file).is_file() for file in _WHOLE_TOKENIZERS):
        return
    named = dict(type(tokenizer).vocab_files_names)
    files = [file for key, file in named.items() if key not in _NOT_VOCABULARY]
    if not named:
        # One without a vocabulary, of bytes say.
        files = ["tokenizer_config.json"]
    missing = [file for file in files if not (directory / file).is_file()]
    if missing or not files:
        alternative = f" (or {' and '.join(missing)})" if missing else ""
        raise ValueError(
            f"its tokenizer is incomplete: there is no tokenizer.json{alternative}; save the "
            "tokenizer there too (tokenizer.save_pretrained), or fetch the model again"
        )


def _advice(missing: Iterable[str], unexpected: Iterable[str], layers: int | None) -> str:
    """What most likely went wrong, and what to do."""
    if any(map(is_part, unexpected)):
        return (
            "It was saved while adapted, without merged weights: save an adapted model with "
            "save_adapter, or call merge_prodial first"
        )
    formats = {whose for name in unexpected if (whose := foreign_format(name)) is not None}
    if formats:
        return f"That is of a quantised format that is not read: {' or '.join(sorted(formats))}"
    numbers = [int(m.group(1)) for n in (*missing, *unexpected) if (m := _LAYER.search(n))]
    beyond = [number for number in numbers if layers is not None and number >= layers]
    if beyond:
        return (
            f"config.json says {layers} layers, and the checkpoint has more: its configuration "
            "belongs to another checkpoint"
        )
    return (
        "Nothing is filled in at random: fetch the checkpoint again, whole, and check that "
        "config.json belongs to it"
    )
