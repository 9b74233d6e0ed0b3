"""``Method``: what every method of fine-tuning has, and its form in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from prodial_kernels._checks import check_choice, check_dropout, check_finite, check_integer

MethodT = TypeVar("MethodT", bound="Method")


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a method: its default, and what the command line says of it.

    Args:
        default: Its default.
        help: One sentence, in the words of the command line.
        more: Further metadata, such as ``choices``.
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning that stands in a list of methods.

    Attributes:
        decay: Multiplies the weight decay of what this method trains.
        lr: Multiplies its learning rate.

    Raises:
        ValueError: A value out of range or not finite.
        TypeError: A value of the wrong kind.
    """

    name: ClassVar[str]
    """What files and the command line call it."""

    _: KW_ONLY
    decay: float = option(1.0, "multiplies the weight decay of what it trains")
    lr: float = option(1.0, "multiplies the learning rate of what it trains")

    def __post_init__(self) -> None:
        for multiplier in ("decay", "lr"):
            value = getattr(self, multiplier)
            check_finite(multiplier, value)
            if value < 0:
                raise ValueError(f"{multiplier} must be >= 0, got {value}")
            # Not a number of NumPy's, which JSON cannot hold.
            object.__setattr__(self, multiplier, float(value))

    @property
    def inserted(self) -> int:
        """Tokens that a mixer reads beside a text's own, at most."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Return its name and its options as plain JSON-ready values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"name": self.name, **plain}

    def __str__(self) -> str:
        """Its name, and the options that are not their defaults."""
        given = [
            f"{each.name}={' '.join(v) if isinstance(v, tuple) else v}"
            for each in fields(self)
            if (v := getattr(self, each.name)) != each.default
        ]
        return f"{self.name} ({', '.join(given)})" if given else self.name

    @classmethod
    def from_dict(cls: type[MethodT], values: Mapping[str, Any]) -> MethodT:
        """Build it from :meth:`to_dict`'s values; ``name`` may be left out.

        Raises:
            ValueError: Unknown keys, or a value out of range.
            TypeError: A value of the wrong kind.
        """
        given = {key: value for key, value in values.items() if key != "name"}
        known = [each.name for each in fields(cls)]
        for key in given:
            check_choice(f"an option of the method {cls.name!r}", key, known)
        return cls(**given)

    # --- Checks that several methods make. --------------------------------------------------------

    def _freeze_names(self, option: str, choices: Iterable[str] | None = None) -> None:
        """Make a tuple of a list of names; raise for anything else, and for unknown names."""
        value = getattr(self, option)
        names = (value,) if isinstance(value, str) else value
        listed = isinstance(names, list | tuple)
        if not listed or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{option} must be a list of names, got {value!r}")
        if not names:
            raise ValueError(f"{option} must name at least one, got none")
        if len({*names}) < len(names):
            raise ValueError(f"{option} names one twice: {list(names)}")
        for name in names if choices is not None else ():
            check_choice(option, name, tuple(choices or ()))
        object.__setattr__(self, option, tuple(names))

    def _check_low_rank(self) -> None:
        """Check ``r``, ``alpha`` and ``dropout``, and set ``alpha`` where it is left out."""
        r, alpha = getattr(self, "r", 1), getattr(self, "alpha", None)
        check_integer("r", r, least=1)
        alpha = float(r) if alpha is None else alpha
        check_finite("alpha", alpha)
        object.__setattr__(self, "alpha", float(alpha))
        check_dropout(getattr(self, "dropout", 0.0))
