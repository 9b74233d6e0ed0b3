"""Quantising the frozen layers of a model in place, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import has_hooks, module_paths, place, replace_each
from prodial_kernels.quantization.convert import (
    FORMATS,
    QuantizationError,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.modules.host_experts import HostStack
from prodial_kernels.quantization.modules.selection import (
    EVERYTHING,
    PROJECTORS,
    TIED,
    Selection,
    kind_of,
    select_everything,
)
from prodial_kernels.quantization.saving import watch_saving


@dataclass(frozen=True)
class KindReport:
    """What storing the weights of one kind changed.

    Attributes:
        layers: Number of layers; a mixture's experts are one.
        bytes_before: Bytes of the dense weights.
        bytes_after: Bytes of the stored weights, scales included.
        error: Of all its weights together; None where they were read as they are.
    """

    layers: int
    bytes_before: int
    bytes_after: int
    error: QuantizationError | None


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_model` did.

    Attributes:
        format: The storage format.
        errors: What each layer's weight lost, by the layer's first dotted path.
        bytes_before: Bytes of the dense weights.
        bytes_after: Bytes of the stored weights, scales included.
        kinds: The same by kind of layer: projectors, attention, MLP, experts, …
    """

    format: str
    errors: Mapping[str, QuantizationError]
    bytes_before: int
    bytes_after: int
    kinds: Mapping[str, KindReport] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = _sizes(self.bytes_before, self.bytes_after)
        if not self.errors:
            return f"layers stored in {self.format}: {sizes}"
        path, worst = max(self.errors.items(), key=lambda item: item[1].relative_rms)
        lines = [
            f"{len(self.errors)} layers in {self.format}: {sizes}; largest error in {path}: {worst}"
        ]
        if len(self.kinds) > 1:
            lines += [
                f"  {kind}: {own.layers} layers, {_sizes(own.bytes_before, own.bytes_after)}"
                + ("" if own.error is None else f"; error {own.error}")
                for kind, own in self.kinds.items()
            ]
        return "\n".join(lines)


class ReportBuilder:
    """Gathers a :class:`QuantizationReport` while a model is stored weight after weight."""

    def __init__(self) -> None:
        self.formats: set[str] = set()
        self._errors: dict[str, QuantizationError] = {}
        self._weights: dict[str, list[tuple[int, QuantizationError]]] = {}
        self._kinds: dict[str, list[int]] = {}

    def add(
        self, path: str, kind: str, format: str, before: int, after: int,
        errors: Iterable[tuple[int, QuantizationError]] = (),
    ) -> None:  # fmt: skip
        """Count a layer.

        Args:
            path: Its first.
            kind: As :func:`~prodial_kernels.quantization.modules.selection.kind_of` calls it.
            format: What it is stored in.
            before: Bytes of the dense weight.
            after: Bytes of the stored one.
            errors: Elements and error of each of its weights; none where it was read stored.
        """
        self.formats.add(format)
        counts = self._kinds.setdefault(kind, [0, 0, 0])
        for index, number in enumerate((1, before, after)):
            counts[index] += number
        weights = list(errors)
        if weights:
            self._errors[path] = _together(weights)
            self._weights.setdefault(kind, []).extend(weights)

    def report(self, format: str | None = None) -> QuantizationReport:
        """Return the report; ``format`` in the place of the formats that were seen."""
        kinds = {
            kind: KindReport(
                layers, before, after,
                _together(self._weights[kind]) if kind in self._weights else None,
            )
            for kind, (layers, before, after) in sorted(
                self._kinds.items(), key=lambda item: -item[1][1]
            )
        }  # fmt: skip
        return QuantizationReport(
            format or " and ".join(sorted(self.formats)) or "no format",
            self._errors,
            sum(own.bytes_before for own in kinds.values()),
            sum(own.bytes_after for own in kinds.values()),
            kinds,
        )


def quantize_model(
    model: nn.Module,
    format: str,
    *,
    target_modules: Iterable[str] = PROJECTORS,
    exclude: Iterable[str] = (),
) -> QuantizationReport:
    """Replace frozen layers of ``model`` by stored ones, in place; call it before adapting.

    Layers are replaced one at a time, so that memory falls from the first one on. The model itself
    is dense when this starts; :func:`from_state_dict` reads a quantised checkpoint by layers.
    ``save_pretrained`` of a model of transformers then writes the weights dense, because
    ``from_pretrained`` would take codes for weights.

    Args:
        model: A dense model.
        format: ``"nf4"``, ``"int8"`` or ``"fp8"``.
        target_modules: Names, or endings of dotted paths, of the linear layers to store; or
            ``"all"``: linear layers, embeddings, head and the experts of mixtures, but no router,
            norm, convolution or part of a recurrence
            (:mod:`prodial_kernels.quantization.modules.selection`).
        exclude: With ``"all"``: names of modules that stay dense, such as ``"lm_head"``.

    Raises:
        TypeError: A match that is not a dense ``nn.Linear`` in 16 or 32 bits.
        ValueError: An unknown format, a name that matches nothing, or a match whose weight another
            module shares, or that cannot be quantised. Checked before the first change but for
            the values of the weights.
    """
    check_choice("format", format, FORMATS)
    selection = select(model, target_modules, exclude)
    builder = ReportBuilder()
    paths = [*selection.linears, *(layers for _, layers in selection.tied)]
    kinds = {found[0]: kind_of(found[0], model) for found in paths}
    kinds.update({layers[0]: TIED for _, layers in selection.tied})

    def quantized(path: str, dense: nn.Linear) -> QuantizedLinear:
        try:
            layer = quantize_linear(dense, format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
        lost = quantization_error(dense.weight, layer)
        builder.add(
            path, kinds[path], format, dense.weight.nbytes, layer.packed_bytes,
            [(dense.weight.numel(), lost)],
        )  # fmt: skip
        return layer

    replace_each(model, nn.Linear, quantized, paths=paths)
    for found in selection.experts:
        experts = model.get_submodule(found[0])
        place(model, found, quantized_experts(found[0], experts, format, builder))
        del experts
    for found, layers in (*selection.tied, *((own, None) for own in selection.embeddings)):
        embedding: Any = model.get_submodule(found[0])
        if layers is None:
            stand_in = nn.Linear(1, 1, bias=False, device="meta")
            stand_in.weight = embedding.weight
            kinds[found[0]] = "embeddings"
            table = quantized(found[0], stand_in)
            del stand_in
        else:
            table = cast(QuantizedLinear, model.get_submodule(layers[0]))
        padding = embedding.padding_idx
        new = QuantizedEmbedding(table, tied=layers is not None, padding_idx=padding)
        place(model, found, new.train(embedding.training))
        del embedding
    watch_saving(model)
    return builder.report(format)


def quantized_experts(
    path: str, experts: nn.Module, format: str, builder: ReportBuilder
) -> QuantizedExperts:
    """Return what stands for dense ``experts``, each of whose weights goes when it is stored."""
    stacks: dict[str, QuantizedStack] = {}
    lost: list[tuple[int, QuantizationError]] = []
    before = 0
    for name in list(experts._parameters):
        weight = cast(nn.Parameter, experts._parameters[name])
        before += weight.nbytes
        for index in range(len(weight)):
            dense: Tensor = weight.detach()[index]
            stack = put_expert(stacks, name, index, len(weight), dense, format, path)
            lost.append((dense.numel(), quantization_error(dense, stack[index])))
        experts._parameters[name] = None
        del weight, dense
    result = QuantizedExperts(experts, stacks)
    after = sum(stack.packed_bytes for stack in stacks.values())
    builder.add(path, "experts", format, before, after, lost)
    return result


def put_expert(
    stacks: dict[str, QuantizedStack], name: str, index: int, count: int, dense: Tensor,
    format: str, path: str, on_host: bool = False,
) -> QuantizedStack:  # fmt: skip
    """Store one expert's weight in the stack called ``name``, which the first one makes."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    try:
        layer = quantize_linear(linear, format)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}.{name}[{index}]: {error}") from error
    if name not in stacks:
        stacks[name] = (HostStack if on_host else QuantizedStack)(count, layer)
    stacks[name].put(index, layer)
    return stacks[name]


def select(
    model: nn.Module, target_modules: Iterable[str], exclude: Iterable[str] = ()
) -> Selection:
    """Return what :func:`quantize_model` stores of a model; arguments and errors are its."""
    if target_modules == EVERYTHING:
        return select_everything(model, exclude)
    if left_out := list(exclude):
        raise ValueError(f"exclude={left_out} is for target_modules='all' alone; leave it out")
    return Selection(tuple(find_layers(model, target_modules)))


def make_dense(model: nn.Module) -> None:
    """Replace every quantised layer of ``model`` by a plain one with the weight it stands for."""
    made: dict[int, nn.Parameter] = {}

    def plain(_: str, layer: QuantizedLinear) -> nn.Linear:
        linear = layer.to_linear()
        made[id(layer)] = cast(nn.Parameter, linear.weight)
        return linear

    def plain_table(_: str, embedding: QuantizedEmbedding) -> nn.Embedding:
        return embedding.to_plain(made.get(id(vars(embedding)["table"])))

    replace_each(model, QuantizedLinear, plain)  # type: ignore[type-abstract]
    replace_each(model, QuantizedEmbedding, plain_table)
    replace_each(model, QuantizedExperts, lambda _, experts: experts.to_plain())


def find_layers(model: nn.Module, target_modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the dotted paths of each layer to quantise, of which a shared one has several.

    The model may be on the meta device. Arguments and errors are those of :func:`quantize_model`.
    """
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    paths = module_paths(model)
    matches = {
        module: found
        for module, found in paths.items()
        if any(matches_name(path, name) for path in found for name in names)
    }
    for name in names:
        if not any(matches_name(path, name) for found in matches.values() for path in found):
            raise ValueError(f"target_modules {name!r} matches no module of this model")
    for module, found in matches.items():
        _check_replaceable(module, found[0], paths)
    return list(matches.values())


def _check_replaceable(module: nn.Module, path: str, owners: Iterable[nn.Module]) -> None:
    """Raise unless ``module`` is a plain linear layer with a weight of its own."""
    if type(module) is not nn.Linear:
        raise TypeError(
            f"{path} is a {type(module).__module__}.{type(module).__name__}; only a plain "
            "nn.Linear can be quantised (before apply_prodial, and only once)"
        )
    if has_hooks(module):
        raise ValueError(f"{path} has hooks, which would be lost; remove them first")
    shared = [
        other
        for other in owners
        if other is not module and other._parameters.get("weight") is module.weight
    ]
    if shared:
        raise ValueError(
            f"{path} shares its weight with a {type(shared[0]).__name__}, which needs it dense; "
            "take it out of target_modules"
        )


def _sizes(before: int, after: int) -> str:
    return f"{before / 2**20:,.1f} MiB -> {after / 2**20:,.1f} MiB"


def _together(weights: Iterable[tuple[int, QuantizationError]]) -> QuantizationError:
    """The error of several weights: root mean square over all of their elements."""
    listed = list(weights)
    if len(listed) == 1:
        return listed[0][1]
    total = sum(count for count, _ in listed)
    # The same in whatever order the weights came.
    squares = math.fsum(count * error.relative_rms**2 for count, error in listed)
    return QuantizationError(
        maximum=max(error.maximum for _, error in listed),
        relative_rms=math.sqrt(squares / total),
    )
