"""Methods that train weights of the model themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.quality.methods.method import DENSE_RATES, STATE_RATES, VECTOR_RATES, Method, Unfit

__all__ = ["METHODS"]

_SSM = ("x_proj", "dt_proj", "A_log", "D", "dt_bias", "conv1d")
Wanted = Callable[[str], bool]


def _thaw(wanted: Wanted) -> Callable[[nn.Module, int], None]:
    def apply(model: nn.Module, target: int) -> None:
        del target
        found = 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name))
            found += parameter.requires_grad
        if not found:
            raise Unfit("none of the model's parameters are of this kind")

    return apply


def _in(*parts: str) -> Wanted:
    """Whether a parameter belongs to a module or is itself of one of these names."""

    def wanted(name: str) -> bool:
        # Vision Mamba's second direction ends in _b.
        return bool({part.removesuffix("_b") for part in name.split(".")} & set(parts))

    return wanted


def _probe(model: nn.Module, target: int) -> None:
    """The output layer alone: a language model's head is untied from its embeddings first."""
    del target
    model.requires_grad_(False)
    output = getattr(model, "lm_head", None)
    if output is not None:
        output.weight = nn.Parameter(output.weight.detach().clone())


def _bias(name: str) -> bool:
    return name.endswith(("bias", "bias_b"))


METHODS = (
    Method("full", "everything", _thaw(lambda name: True), DENSE_RATES, own_size=True),
    Method("probe", "linear probe", _probe, DENSE_RATES, own_size=True),
    Method("bitfit", "BitFit", _thaw(_bias), VECTOR_RATES, own_size=True),
    Method(
        "ft-in", "in_proj", _thaw(_in("in_proj")), DENSE_RATES, own_size=True, group="component"
    ),
    Method(
        "ft-out", "out_proj", _thaw(_in("out_proj")), DENSE_RATES, own_size=True, group="component"
    ),
    Method(
        "ft-both", "both projectors", _thaw(_in("in_proj", "out_proj")), DENSE_RATES,
        own_size=True, group="component",
    ),
    Method(
        "ft-ssm", "state-space parameters", _thaw(_in(*_SSM)), STATE_RATES,
        own_size=True, group="component",
    ),
    Method(
        "ft-both-ssm", "projectors and state-space parameters",
        _thaw(_in("in_proj", "out_proj", *_SSM)), DENSE_RATES, own_size=True, group="component",
    ),
    Method(
        "ft-embeddings", "embeddings", _thaw(_in("embeddings", "embed_tokens", "patch_embed")),
        DENSE_RATES, own_size=True, group="component",
    ),
)  # fmt: skip
