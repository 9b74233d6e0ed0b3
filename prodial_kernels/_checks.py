"""Checks of options, and what their messages say of names: none needs a tensor.

So the command line makes them without loading PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from numbers import Real
from pathlib import Path

IMPLS = ("auto", "triton", "torch", "reference")
DIAGONALS = ("relu", "free")
COMPUTES = ("same", "fp8")
# The largest finite number in fp32.
FP32_MAX = (2 - 2**-23) * 2.0**127

# What other trainers call options of ours.
_ELSEWHERE = {
    "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "learning_rate": "lr", "model_name": "model", "model_name_or_path": "model",
    "base_model": "model", "dataset": "data", "dataset_name": "data", "train_file": "data",
    "validation_file": "held_out", "eval_file": "held_out", "output_dir": "output",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps",
    "max_seq_length": "seq_len", "max_seq_len": "seq_len", "max_length": "seq_len",
    "context_length": "seq_len", "block_length": "seq_len",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accumulation", "lr_scheduler_type": "schedule",
    "scheduler": "schedule", "warmup_steps": "warmup", "max_grad_norm": "clip",
    "grad_clip": "clip", "optim": "optimizer", "eval_steps": "eval_every",
    "save_steps": "save_every", "logging_steps": "log_every", "bf16": "dtype", "fp16": "dtype",
    "load_in_4bit": "quantize", "load_in_8bit": "quantize", "targets": "target_modules",
    "random_seed": "seed", "resume_from_checkpoint": "resume",
}  # fmt: skip

# A directory of more files is not searched whole for a name like the one that was given.
_MOST_NAMES = 10_000


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def check_choice(
    name: str, value: object, choices: Iterable[object], *, error: type[ValueError] = ValueError
) -> None:
    """Raise ``error``, which names what may be meant, when ``value`` is not one of ``choices``."""
    listed = tuple(choices)
    if value not in listed:
        raise error(
            f"{name} must be one of {', '.join(map(repr, listed))}, got {value!r:.60}"
            f"{did_you_mean(str(value), map(str, listed))}"
        )


def check_integer(name: str, value: object, *, least: int, hint: str = "") -> None:
    """Raise TypeError for what is no integer (True is none), ValueError below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}{hint}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError for anything but True and False: a string such as "no" would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_finite(name: str, value: object) -> None:
    """Raise TypeError for what is no number, ValueError for one that fp32 does not hold."""
    if type(value) is float and -FP32_MAX <= value <= FP32_MAX:
        return  # in every call of a layer, where asking an abstract class takes longer
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        size = abs(float(value))
    except OverflowError:
        size = float("inf")
    # "not <=" rather than ">": NaN must fail.
    if not size <= FP32_MAX:
        raise ValueError(
            f"{name} must be a finite number of at most {FP32_MAX:.2g} in size (fp32's largest), "
            f"got {value if isinstance(value, float) else 'a larger one'}"
        )


def check_dropout(lora_dropout: float) -> None:
    """Raise TypeError for what is no number, ValueError for a probability outside [0, 1)."""
    if type(lora_dropout) is float and 0.0 <= lora_dropout < 1.0:
        return
    if not isinstance(lora_dropout, Real) or isinstance(lora_dropout, bool):
        raise TypeError(f"lora_dropout must be a number, got {lora_dropout!r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


# --- Names in messages: what an unknown one may stand for, and the first of many. -----------------


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return at most so many of the names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``word``; None if none is much like it."""
    from difflib import get_close_matches

    by_folded = {name.casefold(): name for name in known}
    found = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def option_meant(name: str, known: Iterable[str]) -> str | None:
    """Return the option that an unknown one stands for: as others call it, or misspelt."""
    options = tuple(known)
    plain = name.replace("-", "_").casefold()
    elsewhere = _ELSEWHERE.get(plain)
    return elsewhere if elsewhere in options else closest(plain, options)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'NAME'?"``, or nothing."""
    name = closest(word, known)
    return "" if name is None else f"; did you mean {name!r}?"


def printable(text: str, keep: str = "") -> str:
    """Escape the characters that would steer a terminal: a name may come from anybody."""
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def similar_path(path: Path) -> str:
    """Return ``"; did you mean 'PATH'?"`` with a neighbour of a path that does not exist."""
    try:
        if not path.parent.is_dir():
            above = similar_path(path.parent) if path.parent != path else ""
            return above or f"; there is no directory {str(path.parent)!r} either"
        names = [entry.name for entry in islice(path.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return ""
    name = closest(path.name, names)
    return "" if name is None else f"; did you mean {str(path.parent / name)!r}?"
