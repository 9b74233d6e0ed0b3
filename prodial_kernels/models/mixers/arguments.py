"""Recognising the arguments of upstream's methods, whatever a release calls them.

Arguments are renamed (transformers 5.24 calls ``cache`` what 5.23 called ``cache_params``), come by
position or by keyword, and arrive under old names in ``**kwargs``. So a policy passes arguments on
unchanged, and recognises the few that it must know by the functions here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

_CACHE_NAME = re.compile(r"cache|past|inference_params|(conv|ssm|recurrent)_states?$")
# Arguments about a cache that are no cache: where in it to write, how long it is.
_ABOUT_A_CACHE = re.compile(r"position|length|seqlen|offset|index|idx|mask")
_CACHE_CLASS = re.compile(r"(Cache|InferenceParams)$")
# Methods of transformers' and mamba_ssm's caches, by which any class is recognised as one.
_CACHE_MEMBERS = ("update_conv_state", "update_recurrent_state", "key_value_memory_dict")


def named_arguments(
    function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of ``function(self, *args, **kwargs)`` by name, in the order given.

    Never raises: what the signature does not know is named by its position, or as the caller
    named it, so that upstream itself can say what is wrong.
    """
    args = tuple(args)
    names = parameters_of(function)
    unnamed = [f"argument {i}" for i in range(len(names), len(args))]
    return dict(zip([*names, *unnamed], args, strict=False)) | dict(kwargs)


def split_first(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the first argument of ``function(self, ...)`` and the others; TypeError without it."""
    others = dict(kwargs)
    if args:
        return args[0], args[1:], others
    name = next(iter(parameters_of(function)), "")
    if name not in others:
        raise TypeError(f"{name or 'the input'} is missing among the arguments {[*others]}")
    return others.pop(name), (), others


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's parameters that take a position, without ``self``."""
    if torch.compiler.is_compiling():
        return _parameters_while_compiling(function)
    return _parameters(function)


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in positional)[1:]


def _parameters_while_compiling(function: Callable[..., Any]) -> tuple[str, ...]:
    """The same, asked by torch.compile, which keeps the answer and traces nothing of it."""
    return _parameters(function)


# What torch.compiler.assume_constant_result does, which would load the compiler here and now.
_parameters_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cache_among(arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the first argument that is a cache of earlier tokens, if there is one."""
    return next((name for name, value in arguments.items() if is_cache(name, value)), None)


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument is a cache, by its class, by what it can do, or by its name.

    Flags (``use_cache``) and tensors that say where in a cache to write are none.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return False
    if could_be_cache(name):
        return True
    if isinstance(value, Tensor):
        return False
    if isinstance(value, list | tuple):
        return any(is_cache("", part) for part in value)
    return any(_CACHE_CLASS.search(cls.__name__) for cls in type(value).__mro__) or any(
        hasattr(value, member) for member in _CACHE_MEMBERS
    )


def could_be_cache(name: str) -> bool:
    """Whether an argument of that name would be a cache."""
    return bool(_CACHE_NAME.search(name)) and not _ABOUT_A_CACHE.search(name)


def mask_among(arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the first argument that is a mask of padding, if there is one."""
    return next((name for name in arguments if "mask" in name), None)
