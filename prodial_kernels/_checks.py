"""Checks of options, which need no tensor: the command line makes them without loading PyTorch."""

from __future__ import annotations

from numbers import Real

IMPLS = ("auto", "triton", "torch", "reference")
DIAGONALS = ("relu", "free")
# The largest finite number in fp32.
FP32_MAX = (2 - 2**-23) * 2.0**127


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError when ``value`` is not one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


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
    if not isinstance(lora_dropout, Real) or isinstance(lora_dropout, bool):
        raise TypeError(f"lora_dropout must be a number, got {lora_dropout!r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
