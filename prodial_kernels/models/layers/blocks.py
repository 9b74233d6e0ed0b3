"""A model's blocks: where they are, what is in them, and running one with another norm or mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from prodial_kernels.models.mixers.structure import code_of
from prodial_kernels.models.patch_point import View


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks in order: the list of modules with the most parameters.

    ValueError where there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    if not lists or not max(sizes):
        raise ValueError(
            f"{type(model).__name__} holds no nn.ModuleList of blocks; its memory cannot be planned"
        )
    return list(lists[sizes.index(max(sizes))])


def mixer_of(block: nn.Module) -> nn.Module | None:
    """Return the state-space mixer of a block, if any: what owns ``A_log`` and projectors."""
    for module in block.modules():
        if {"in_proj", "out_proj"} <= module._modules.keys() and "A_log" in module._parameters:
            return module
    return None


def has_separate_norm(block: nn.Module) -> bool:
    """Whether a block is ``input + mixer(norm(input rounded to the norm's dtype))``, and no more.

    So are the blocks of Mamba, Mamba-2 and FalconMamba in transformers; it is read off the names
    in their ``forward``.
    """
    code = _own_code(type(block))
    if code is None or {*block._modules} != {"norm", "mixer"}:
        return False
    return {"norm", "mixer", "to", "dtype", "weight"} <= set(code.co_names)


def _own_code(cls: type) -> Any:
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is not None and base.__module__.startswith("transformers.models."):
            code = code_of(forward)
            if code is not None and "residual" in code.co_varnames:
                return code
    return None


class Calling(View):
    """Stands in for a module in a :class:`View` of its block: calls a function instead."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], **given: Any) -> None:
        """Answer with ``given`` where it has the name, as a view does."""
        super().__init__(module, _function=function, **given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return vars(self)["_function"](*args, **kwargs)


def plain_forward(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` below transformers' checkpointing, which asks more of ``self`` than a view."""
    while getattr(upstream, "__code__", None) is not None and (
        upstream.__code__.co_name == "forward_with_checkpointing"
    ):
        upstream = vars(upstream)["__wrapped__"]
    return upstream


class SetAttribute:
    """An attribute of a module, set until :meth:`remove`."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        """Set it."""
        self.module = module
        self.name = name
        self.before = (name in vars(module), vars(module).get(name))
        setattr(module, name, value)

    def remove(self) -> None:
        """Put back what was there."""
        present, value = self.before
        if present:
            setattr(self.module, self.name, value)
        else:
            delattr(self.module, self.name)
