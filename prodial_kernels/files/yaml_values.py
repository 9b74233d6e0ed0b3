"""YAML as plain values, by the rules of version 1.2, which are those that people expect.

PyYAML follows version 1.1, in which ``3e-4`` is a string and ``off`` is false. Importing this
module imports PyYAML.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml


class _Loader(yaml.SafeLoader):
    """Builds nothing but plain values; refuses a key given twice, and what stands for a value."""

    # By its own table below, not by that of version 1.1.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse ``*name``: nested, a few lines of it stand for more than any memory holds."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"line {event.start_mark.line + 1}: *{event.anchor} stands for a value given "
                "elsewhere, which is not read here; write it out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key given twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise ValueError(f"line {line}: {key!r:.60} is given twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|"
     r"\.(nan|NaN|NAN)", "-+.0123456789"),
):  # fmt: skip
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first]
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("$"), [""])
# 010 is ten, and 1:30 no number of seconds.
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)


def parsed_yaml(text: str) -> Any:
    """Return what a YAML document holds: dictionaries, lists, strings, numbers, true, false, null.

    Raises:
        ValueError: Not valid, several documents, an alias, a key given twice, or a value of another
            kind.
        RecursionError: Nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
