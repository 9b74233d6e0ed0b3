"""The options of every command. An option that is not given leaves no trace in the namespace."""

from __future__ import annotations

import argparse
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from prodial_kernels._checks import check_choice
from prodial_kernels.config import ProdialConfig
from prodial_kernels.methods import METHODS as LISTED
from prodial_kernels.search.config import (
    DEFAULT_STEPS,
    SEARCH_OUTPUT,
    SHARED_OPTIONS,
)
from prodial_kernels.search.config import OPTIONS as SEARCH_OPTIONS
from prodial_kernels.search.parts import PARTS
from prodial_kernels.training.config import (
    ADAPTER_OPTIONS,
    DEFAULTS,
    OPTIONS,
    QUANTIZE,
    STDLIB_EVAL_TOKENS,
    ConfigError,
)
from prodial_kernels.training.options import Option

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
# The first option of each group of 'prodial finetune --help'.
_GROUPS = {
    "model": "what to train, and on what",
    "method": "method",
    "lr": "training",
    "eval_every": "how often",
}


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every option of ``FinetuneConfig``."""
    group: Any = parser
    for name in OPTIONS:
        if name == "methods":
            continue
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        add_option(group, name)
        if name == "output":
            group.add_argument(
                "--resume", action="store_true",
                help="continue the run in --output; options that are not given are the run's own",
            )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="options in a JSON, TOML or YAML file, such as "
        "batch_size: 4; flags win over it",
    )  # fmt: skip


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial search``: its own, and those that all of its runs share."""
    group = parser.add_argument_group("search")
    for option in SEARCH_OPTIONS.values():
        _add(group, option)
    group.add_argument(
        "--resume", action="store_true",
        help="continue the search in --output, or work on it beside the process that does; options "
        "that are not given are the search's own",
    )  # fmt: skip
    group.add_argument(
        "--config", metavar="FILE", help="options of the runs in a JSON, TOML or YAML file; flags "
        "win over it",
    )  # fmt: skip
    group = parser.add_argument_group("the runs of a search")
    for name in SHARED_OPTIONS:
        changes: Any = {
            "output": {"help": "where the search is kept ({default}); must be empty or new",
                       "default": SEARCH_OUTPUT},
            "steps": {"default": DEFAULT_STEPS},
        }.get(name, {})  # fmt: skip
        add_option(group, name, **changes)


def parts_help() -> str:
    """Return what ``prodial search`` can switch on."""
    width = max(map(len, PARTS))
    lines = [f"  {name.ljust(width)}  {part.help}" for name, part in PARTS.items()]
    return "\n".join(["what --among may name, as far as the model has it:", *lines])


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial evaluate``."""
    add_option(parser, "model", shown="the adapter's base model, or embedded")
    _add_adapter(parser, required=False)
    add_option(parser, "data")
    parser.add_argument(
        "--split", choices=("held-out", "all"),
        help="evaluate on the part that 'prodial finetune' holds out (default for stdlib), or on "
        "all of the data (default for anything else; of a hub data set its own test part)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens",
        type=at_least(1, count),
        metavar="N",
        help=f"stop after so many tokens of text (stdlib: {STDLIB_EVAL_TOKENS:,}, else all)",
    )
    parser.add_argument(
        "--seq-len", type=at_least(1), metavar="N", help=f"tokens at once ({DEFAULTS['seq_len']})"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N", help="texts at once (8)"
    )
    parser.add_argument(
        "--lm-eval", nargs="+", metavar="TASK",
        help="run these tasks of lm-evaluation-harness instead, such as hellaswag arc_easy",
    )  # fmt: skip
    parser.add_argument(
        "--num-fewshot", type=at_least(0), metavar="N", help="of --lm-eval: examples per question"
    )
    parser.add_argument(
        "--include-path", metavar="DIR",
        help="of --lm-eval: a folder with tasks of your own, to be named there",
    )  # fmt: skip
    parser.add_argument("--limit", type=share_or_count, metavar="N",
        help="evaluate so many examples (of each task), or, under 1, such a share of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_option(parser, "impl")
    _add_device_options(parser)


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial generate``."""
    add_option(parser, "model", shown="the adapter's base model, or embedded")
    _add_adapter(parser, required=False)
    text = parser.add_argument_group("what to go on with")
    text.add_argument("--prompt", metavar="TEXT", help="a text (what comes on standard input)")
    text.add_argument(
        "--chat", action="store_true",
        help="the prompt is a user's turn, in the tokenizer's chat template; on a terminal without "
        "--prompt: a conversation, turn by turn",
    )  # fmt: skip
    text.add_argument("--system", metavar="TEXT", help="with --chat: what stands before it")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--max-new-tokens", type=at_least(1, count), default=256, metavar="N",
        help="stop after so many tokens, if no end token comes before (256)",
    )  # fmt: skip
    how.add_argument(
        "--temperature", type=number, default=0.0, metavar="T",
        help="0 takes the likeliest token; above, tokens are drawn (0)",
    )  # fmt: skip
    how.add_argument(
        "--top-p", type=number, default=1.0, metavar="P",
        help="draw from the likeliest tokens that together have this probability (1)",
    )  # fmt: skip
    how.add_argument("--seed", type=integer, default=0, metavar="N", help="of the drawing (0)")
    parser.add_argument(
        "--json", action="store_true", help="print JSON, at the end, instead of text as it comes"
    )
    add_option(parser, "impl")
    _add_device_options(parser)


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial merge``."""
    add_option(parser, "model", shown="the adapter's base model")
    _add_adapter(parser, required=True)
    parser.add_argument("--output", metavar="DIR", required=True, help="directory to write")
    parser.add_argument(
        "--stored", action="store_true",
        help="of a quantised checkpoint: write the merged weights in its own format and layout, "
        "rounded, and all else as it is (the default writes a dense model)",
    )  # fmt: skip
    parser.add_argument(
        "--for", choices=("gguf",), dest="target",
        help="gguf: first check that llama.cpp's converter takes the model, and say what becomes "
        "of it (what is written is the same)",
    )  # fmt: skip
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an empty directory, or a model that prodial wrote and nobody changed since",
    )
    _add_device_options(parser)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial inspect``."""
    parser.add_argument(
        "path", help="directory of an adapter or a run; or a model: directory, hub id, embedded"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--adapter", metavar="DIR",
        help="for a model: what the targets of this adapter, PEFT's or ours, would do in it",
    )  # fmt: skip
    parser.add_argument(
        "--list", nargs="+", metavar="TOOLKIT", dest="lists",
        help="for a model: what the targets that toolkits publish would do in it: peft trl unsloth "
        "axolotl nemo llamafactory ms-swift, or all",
    )  # fmt: skip
    group = parser.add_argument_group("for a model: the adapter to plan")
    for name in ("method", "preset", *ADAPTER_OPTIONS):
        add_option(group, name)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial convert``."""
    parser.add_argument(
        "path", metavar="ADAPTER", help="directory of an adapter, or of the run that wrote it"
    )
    parser.add_argument(
        "--to", choices=("peft", "lora", "prodial"), required=True,
        help="ProDiaL for PEFT, plain LoRA for PEFT, or from either of them to this package's form",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", required=True, help="new directory to write")
    add_option(parser, "model", shown="for --to prodial: the adapter's base model")


def add_option(group: Any, name: str, **changes: Any) -> None:
    """Add the flags of an option to a parser or group; ``changes`` are to its :class:`Option`."""
    _add(group, replace(OPTIONS[name], **changes))


def _add(group: Any, option: Option) -> None:
    details: dict[str, Any] = {"dest": option.name, "help": option.help_text}
    if option.type.startswith("bool"):
        details |= {"action": "store_const", "const": not option.flags[0].startswith("--no-")}
    else:
        details |= {"metavar": option.metavar, "type": _parser_of(option)}
        if "tuple" in option.type or "Mapping" in option.type:
            details["nargs"] = "+"
        if option.name == "method":
            details["nargs"] = "+"
        # Where the help names values by one word, the configuration checks the choices.
        if option.metavar is None:
            details["choices"] = option.choices
    group.add_argument(*option.flags, **details)


def _parser_of(option: Option) -> Callable[[str], Any]:
    """Return what makes a value of a word of the command line."""
    if "Mapping" in option.type:
        return per_target
    if option.type.startswith("int"):
        return count if option.unit else integer
    return number if option.type.startswith("float") else str


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a namespace that belong to ``FinetuneConfig``, in its terms."""
    values = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if "method" in values:
        values |= chosen_methods(values.pop("method"))
    for name in ("n_blocks", "block_size"):
        if name in values:
            values[name] = merged_blocks(name, values[name])
    targets = values.get("target_modules")
    if targets is not None and len(targets) == 1 and re.search(r"[\\^$*+?()|\[\]{}]", targets[0]):
        values["target_modules"] = targets[0]
    return values


def chosen_methods(words: list[str]) -> dict[str, Any]:
    """Return ``method`` or ``methods`` of words such as ``prodial additional-scan states=6``.

    ConfigError for an option before any method, or a method or an option that does not exist.
    """
    methods: list[dict[str, Any]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            methods.append({"name": word})
        elif not methods:
            raise ConfigError(f"`method`: {word!r} is an option of no method: name one before it")
        else:
            of = methods[-1]["name"]
            check_choice("`method`", of, ("prodial", *LISTED), error=ConfigError)
            method = LISTED.get(of, ProdialConfig)
            types = {each.name: str(each.type) for each in fields(method)}
            types = {k: t for k, t in types.items() if k not in ("impl", "methods")}
            check_choice(f"an option of `method` {of}", name, tuple(types), error=ConfigError)
            methods[-1][name] = _value_of(word, value, types[name])
    if len(methods) == 1 and len(methods[0]) == 1:
        return {"method": methods[0]["name"]}
    return {"methods": methods}


def _value_of(word: str, text: str, type: str) -> Any:
    """Parse the value of an option of a method by the type that its dataclass gives it."""
    try:
        if "tuple" in type:
            return text.split(",")
        if type.startswith("bool"):
            return {"true": True, "false": False}[text.lower()]
        if type.startswith("int"):
            return integer(text)
        return number(text) if type.startswith("float") else text
    except KeyError:
        raise ConfigError(f"`method`: {word}: expected true or false, got {text!r:.60}") from None
    except ArgumentTypeError as error:
        raise ConfigError(f"`method`: {word}: {error}") from None


def methods_help() -> str:
    """Return the methods that ``--method`` takes, with their options and defaults."""
    lines = [
        "methods of --method, beside prodial (whose options r, block_size, … it takes so too):"
    ]
    for name, method in LISTED.items():
        if name == "full":
            continue
        words = [name]
        for each in fields(method):
            if each.name in ("lr", "decay"):
                continue
            default = each.default
            shown = ",".join(default) if isinstance(default, tuple) else default
            shown = str(shown).lower() if isinstance(shown, bool) else shown
            words.append(f"{each.name}={'' if shown is None else shown}")
        lines.append(f"  {' '.join(words)}")
        lines.append(f"      {(method.__doc__ or '').strip().splitlines()[0]}")
    lines.append("each also has lr= and decay=, factors of the learning rate and the weight decay")
    return "\n".join(lines)


def _add_device_options(group: Any) -> None:
    """Add ``--quantize``, without what it chooses by itself, and what else places a model."""
    help, _, _ = OPTIONS["quantize"].help.partition("; auto")
    add_option(group, "quantize", choices=QUANTIZE, help=help)
    add_option(group, "quantize_modules")
    add_option(group, "device")
    add_option(group, "dtype")


def _add_adapter(group: Any, *, required: bool) -> None:
    group.add_argument(
        "--adapter",
        metavar="DIR",
        required=required,
        help="directory of an adapter for the model, or of its run",
    )


# --- Parsers of one argument. -------------------------------------------------------------------


def integer(text: str) -> int:
    """Parse a whole number such as 8."""
    if not re.fullmatch(r"[+-]?\d{1,100}", text):
        raise ArgumentTypeError(f"expected a whole number such as 8, got {text!r:.60}")
    return int(text)


def number(text: str) -> float:
    """Parse a number such as 0.001 or 1e-3."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number such as 0.001, got {text!r:.60}") from None


def count(text: str) -> int:
    """Parse a count such as 500, 64k or 4M."""
    match = re.fullmatch(r"([+-]?\d{1,100})([kKmMgG]?)", text)
    if match is None:
        raise ArgumentTypeError(f"expected a number such as 500, 64k or 4M, got {text!r:.60}")
    return int(match.group(1)) * _UNITS[match.group(2).lower()]


def at_least(least: int, parse: Callable[[str], int] = integer) -> Callable[[str], int]:
    """Return a parser of numbers that refuses what is under ``least``."""

    def parsed(text: str) -> int:
        value = parse(text)
        if value < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return parsed


def share_or_count(text: str) -> float:
    """Parse a whole number from 1 on, or a share between 0 and 1."""
    value = number(text)
    if not (0 < value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))):
        raise ArgumentTypeError(
            f"expected a whole number from 1 on, or a share between 0 and 1, got {text!r:.60}"
        )
    return value


def per_target(text: str) -> tuple[str | None, int]:
    """Parse ``64`` or ``in_proj=64``."""
    name, equals, digits = text.rpartition("=")
    if not re.fullmatch(r"\d{1,18}", digits) or (equals and not name):
        raise ArgumentTypeError(
            f"expected a number, or NAME=NUMBER such as in_proj=64, got {text!r:.60}"
        )
    return name or None, int(digits)


def merged_blocks(option: str, parts: list[tuple[str | None, int]]) -> int | dict[str, int]:
    """Return one number, or the numbers by target; ConfigError for several without one each."""
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    named = {name: number for name, number in parts if name is not None}
    if len(named) != len(parts):
        raise ConfigError(f"`{option}`: give one number, or a NAME=NUMBER for every target")
    return named
