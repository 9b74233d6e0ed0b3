"""The tensors of an adapted model: the adapter's, those trained beside it, and the base's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.fingerprint import Values
from prodial_kernels.config import ProdialConfig, resolve_block_size
from prodial_kernels.linear import ADAPTER_PARAMETERS, BESIDE, OFFSET, adapted_layers
from prodial_kernels.models.adapt.names import adapter_parameters, base_state, plain_path
from prodial_kernels.models.adapt.targets import Target, find_saved
from prodial_kernels.models.methods.offsets import find_ssm
from prodial_kernels.models.methods.planning import plan_methods, planned_shapes
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.modules.experts import QuantizedStack


@dataclass(frozen=True)
class Contents:
    """An adapted model's tensors, by the names that they have in a plain model and in the file.

    Attributes:
        adapter: ``<module path>.prodial_*``, what is trained beside a module's own included.
        beside: What is trained beside the adapter: what ``modules_to_save`` names, parameters that
            the user has set ``requires_grad`` on, and running statistics, which training moves.
        base: Everything else; the weight of a quantised layer as the layer.
        linears: The adapted layers as they are without their adapters.
    """

    adapter: dict[str, Tensor]
    beside: dict[str, Tensor]
    base: dict[str, Values]
    linears: dict[str, nn.Linear | QuantizedLinear]


def contents_of(model: nn.Module, config: ProdialConfig) -> Contents:
    """Classify the tensors of an adapted ``model``; they are the model's own, not copies.

    Raises:
        AdapterError: A module's state is not made of tensors.
    """
    state = base_state(model)
    beside = configured_beside(model, config, state)
    known = {id(tensor) for tensor in beside.values()}
    for name, value in state.items():
        if isinstance(value, nn.Parameter) and value.requires_grad and id(value) not in known:
            beside[name] = value
            known.add(id(value))
    for name in running_statistics(model):
        value = state.get(name)
        if isinstance(value, Tensor):
            beside.setdefault(name, value)
    linears = {
        plain_path(path): layer.base_layer
        for path, layer in adapted_layers(model).items()
        # Of several adapters, each may have layers that the others have not.
        if any(True for _ in layer.adapter_parameters())
    }
    adapter: dict[str, Tensor] = {**adapter_parameters(model)}
    return Contents(adapter, beside, base_without(state, beside), linears)


def configured_beside(
    model: nn.Module, config: ProdialConfig, state: Mapping[str, object]
) -> dict[str, Tensor]:
    """Return the tensors that ``modules_to_save`` names, out of :func:`base_state`.

    Raises:
        AdapterError: A module's state is not made of tensors.
        ValueError: A name matches nothing.
    """
    tensors: dict[str, Tensor] = {}
    for match in find_saved(model, config, ()):
        path = plain_path(match.path)
        for name, value in state.items():
            if name != path and (match.parameter is not None or not name.startswith(f"{path}.")):
                continue
            if not isinstance(value, Tensor):
                raise AdapterError(
                    f"modules_to_save: {name} is a {type(value).__name__}, and only tensors can "
                    "be saved; name the submodules that hold tensors instead"
                )
            tensors[name] = value
    return tensors


def running_statistics(model: nn.Module) -> list[str]:
    """Return the names of buffers that modules such as ``BatchNorm`` change while training."""
    return [
        f"{plain_path(path)}.{name}" if path else name
        for path, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for name, _ in module.named_buffers(recurse=False)
    ]


def base_without(state: Mapping[str, object], beside: Mapping[str, Tensor]) -> dict[str, Values]:
    """Return the entries of ``state`` that are neither in ``beside`` nor tied to a tensor in it."""
    held = {id(tensor) for tensor in beside.values()}
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor | QuantizedLinear | QuantizedStack)
        and name not in beside
        and id(value) not in held
    }


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of a file is of an adapted layer, rather than trained beside one."""
    leaf = name.rpartition(".")[2]
    return leaf in ADAPTER_PARAMETERS or leaf.startswith(BESIDE)


def expected_shapes(
    model: nn.Module, targets: Iterable[Target], config: ProdialConfig
) -> dict[str, list[int]]:
    """Return the shape of every adapter tensor that ``config`` makes in a plain ``model``.

    ValueError where ``config.train_ssm`` or one of ``config.methods`` does not fit it.
    """
    shapes: dict[str, list[int]] = {
        plain_path(name): shape
        for name, shape in planned_shapes(plan_methods(model, config.methods)).items()
    }
    for moved in find_ssm(model, config.train_ssm):
        path, _, name = plain_path(moved.path).rpartition(".")
        shapes[f"{path}.{OFFSET}{name}"] = list(moved.value.shape)
    for target in targets:
        path, layer = plain_path(target.paths[0]), target.linear
        k, n = layer.in_features, layer.out_features
        size = resolve_block_size(k, **config.blocks_of(target.name))
        if config.train_diagonal:
            shapes[f"{path}.prodial_blocks"] = [k // size, size, size]
        if config.train_scale:
            shapes[f"{path}.prodial_scale"] = [n]
        if config.r:
            shapes[f"{path}.prodial_a"] = [config.r, k]
            shapes[f"{path}.prodial_b"] = [n, config.r]
    return shapes
