"""What an option of a run is: its help, its flags, and the values that it may have.

An option is written once, as a field of :class:`~prodial_kernels.training.config.FinetuneConfig`
made by :func:`option`. The command line makes its flags from that, and a file's and a caller's
values are checked by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from prodial_kernels._checks import check_choice
from prodial_kernels.config import ProdialConfig, methods_from
from prodial_kernels.methods import Method

WHOLE_RUN = ("prodial", "lora", "full")
"""Methods whose options are a run's."""
COMBINED = "combined"
"""The method of a run with a list of several."""


class ConfigError(ValueError):
    """An option is unknown, contradicts another, or has a value that cannot be used.

    It is made with a message in which names of options stand in back quotes. ``str()`` drops the
    quotes; :meth:`renamed` puts other names in their place, such as flags.
    """

    def __init__(self, message: str) -> None:
        """Take a message with names of options in back quotes."""
        super().__init__(message.replace("`", ""))
        self._marked = message

    def renamed(self, rename: Callable[[str], str]) -> str:
        """Return the message with each name of an option replaced by ``rename(name)``."""
        return re.sub(r"`(\w+)`", lambda match: rename(match.group(1)), self._marked)


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        help: One phrase for the help, in which ``{default}`` stands for the default.
        metavar: What the help calls a value.
        choices: All possible values; None for any.
        range: The smallest and the largest possible number. The largest is far from what anybody
            trains with: a value over it is a slip of the keyboard, and would end in an overflow, a
            loss of NaN or a wait for ever.
        positive: Whether a number must be more than 0.
        shown: The default as the help shows it, where that is more than the value.
        flags: The flags, the first of which errors name; by default the name as a flag. One that
            begins with ``--no-`` sets false.
        unit: Whether a flag's number may end in k, M or G.
        name: The field's name.
        type: The field's annotation.
        default: What an option that is not given stands for.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    range: tuple[float, float] = (-math.inf, math.inf)
    positive: bool = False
    shown: str = ""
    flags: tuple[str, ...] = ()
    unit: bool = False
    name: str = ""
    type: str = ""
    default: Any = None

    @property
    def help_text(self) -> str:
        """The help with the default."""
        return self.help.format(default=self.shown or self.default)


def option(default: Any, help: str, **details: Any) -> Any:
    """Return a dataclass field that is an option; ``details`` are those of :class:`Option`."""
    return field(default=default, metadata={"option": Option(help, **details)})


def options_of(config: type, defaults: Mapping[str, Any]) -> dict[str, Option]:
    """Return a dataclass's fields, each made by :func:`option`, by name, in its order.

    ``defaults`` are what options whose default is None stand for.
    """
    options = {}
    for each in fields(config):
        flags = each.metadata["option"].flags or ("--" + each.name.replace("_", "-"),)
        options[each.name] = replace(
            each.metadata["option"], name=each.name, type=str(each.type), flags=flags,
            default=defaults.get(each.name, each.default),
        )  # fmt: skip
    return options


_EXPECTED = {
    "str": "a name",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}


def checked_value(option: Option, value: Any, *, required: bool = False) -> Any:
    """Check one value by itself; integers pass as floats, lists as tuples.

    Raises:
        ConfigError: It is of another type, not finite, out of range or none of the choices.
    """
    name, expected = option.name, option.type.split(" | ")[0]
    if value is None and not required and "None" in option.type:
        return None
    if name == "methods":
        return checked_methods(value)
    if name == "memory_budget" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if "tuple" in option.type:
        if isinstance(value, str):
            value = value if expected == "str" else (value,)
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            value = tuple(value)
            for each in value if option.choices is not None else ():
                check_choice(f"`{name}`", each, option.choices or (), error=ConfigError)
        if isinstance(value, (str, tuple)):
            return value
        raise ConfigError(f"`{name}` must be a string or a list of strings, got {value!r:.60}")
    if isinstance(value, Mapping) and "Mapping" in option.type:
        for target, number in value.items():
            if not isinstance(number, int) or isinstance(number, bool):
                raise ConfigError(
                    f"`{name}` for {target!r} must be a whole number, got {number!r:.60}"
                )
        return dict(value)
    if not _fits(value, expected):
        others = ", or one for each target" if "Mapping" in option.type else ""
        raise ConfigError(f"`{name}` must be {_EXPECTED[expected]}{others}, got {_shown(value)}")
    if option.choices is not None:
        check_choice(f"`{name}`", value, option.choices, error=ConfigError)
    elif isinstance(value, str) and not value.strip():
        raise ConfigError(f"`{name}` must not be empty")
    if expected in ("int", "float"):
        _check_range(option, value)
    return float(value) if expected == "float" else value


def checked_methods(value: Any) -> tuple[dict[str, Any], ...]:
    """Return a list of methods as plain values, every option of each filled in.

    Args:
        value: A list of objects with a ``name``, such as ``{"name": "prodial", "r": 16}``, or of
            :class:`~prodial_kernels.ProdialConfig` and :mod:`prodial_kernels.methods`.

    Raises:
        ConfigError: Something else, an unknown name or option (the message names the one that may
            be meant), a value out of range, or methods that cannot stand beside each other.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(f"`methods` must be a list of methods, got {value!r:.60}")
    made: list[ProdialConfig | Method] = []
    for each in value:
        if isinstance(each, ProdialConfig | Method):
            made.append(each)
            continue
        try:
            made += methods_from([each])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"`methods`: {error}") from error
    try:
        ProdialConfig.of(made)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`methods`: {error}") from error
    if any(each.impl != "auto" for each in made if isinstance(each, ProdialConfig)):
        raise ConfigError("`impl` is of the whole run: give it there, and not in `methods`")
    return tuple(
        each.to_dict() if isinstance(each, Method) else {"name": "prodial", **_own(each)}
        for each in made
    )


def settled_methods(
    method: str, methods: tuple[Mapping[str, Any], ...] | None
) -> tuple[str, tuple[Mapping[str, Any], ...] | None]:
    """Return a run's ``method`` and ``methods``, each saying what the other does.

    ConfigError where they contradict each other.
    """
    if methods is None and method in WHOLE_RUN:
        return method, None
    if methods is None and method == COMBINED:
        raise ConfigError(
            "`method` 'combined' stands for a list: give it as `methods`, such as "
            "[{'name': 'prodial'}, {'name': 'additional-scan', 'states': 6}]"
        )
    methods = checked_methods([{"name": method}]) if methods is None else methods
    names = [each["name"] for each in methods]
    if "full" in names:
        raise ConfigError("`methods`: 'full' stands alone, as `method` 'full'")
    label = names[0] if len(names) == 1 and names[0] not in WHOLE_RUN else COMBINED
    if method not in (label, "prodial"):
        raise ConfigError(
            f"`method` is {method!r}, and `methods` names {', '.join(names)}; give one of the two"
        )
    return label, methods


def _own(adapter: ProdialConfig) -> dict[str, Any]:
    values = adapter.to_dict()
    del values["impl"]
    return values


def _fits(value: Any, expected: str) -> bool:
    if expected in ("str", "bool"):
        return isinstance(value, str if expected == "str" else bool)
    kinds = (int,) if expected == "int" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    # Integers are always finite, and may be too large to be asked.
    return isinstance(value, int) or math.isfinite(value)


def _check_range(option: Option, value: float) -> None:
    least, most = option.range
    if option.positive and value <= 0:
        raise ConfigError(f"`{option.name}` must be positive, got {_shown(value)}")
    if value < least:
        raise ConfigError(f"`{option.name}` must be at least {_shown(least)}, got {_shown(value)}")
    if value > most:
        raise ConfigError(f"`{option.name}` must be at most {_shown(most)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for a message; of an endless number, how long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r}…"
    return repr(value)[:200]
