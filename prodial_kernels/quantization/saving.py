"""Making ``save_pretrained`` of a model with adapted or quantised layers write a loadable one.

Their state dicts hold codes, and a base layer beside an adapter's parts; a class of transformers
knows neither, and completes a checkpoint with random weights. So the models given to
``apply_prodial``, ``quantize_model`` and ``load_quantized`` write the plain layers that theirs
stand for. The adapter's parts stay in the file too, exactly, for a trainer that resumes from it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts
from prodial_kernels.quantization.names import (
    ADDED,
    METHOD,
    OFFSET,
    is_part,
    is_part_of_adapter,
    listed,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

RESCALING = "rescale_prenorm_residual"
"""Setting of Mamba's configurations by which transformers divides out_proj at every load."""

_SAVE = "save_pretrained"
_AROUND = "_prodial_part_of_another"


@runtime_checkable
class StandsForLinear(Protocol):
    """An adapted or quantised layer: one that computes what a plain linear layer does."""

    in_features: int
    out_features: int

    def to_linear(self) -> nn.Linear:
        """Return that plain layer."""


class _PlainSaving:
    """Replaces a model's own ``save_pretrained``; copied and pickled with the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._handle = model.register_load_state_dict_pre_hook(_without_plain_weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own method so that it writes plain weights."""
        model = self._model
        _check_plain_parameters(model)
        own = getattr(type(model), _SAVE)
        layers = [layer for _, layer in _stand_ins(model)]
        packed = all(isinstance(layer, QuantizedLinear) for layer in layers) and not any(
            isinstance(module, QuantizedEmbedding | QuantizedExperts) for module in model.modules()
        )
        # What transformers loaded packed is written so.
        if not layers or (packed and has_own_quantizer(model)):
            return own(model, *args, **kwargs)
        parameters = inspect.signature(own).parameters
        with _plain_config(model), _without_quantizer(model):
            if "state_dict" not in parameters:
                return self._by_state_dict(own, *args, **kwargs)
            given = inspect.signature(own).bind(model, *args, **kwargs)
            _check_saveable(model, given.arguments)
            if "save_original_format" in parameters:
                # A trainer that resumes loads the file by the names that the model itself has.
                given.arguments.setdefault("save_original_format", False)
            if given.arguments.get("is_main_process", True):
                state = given.arguments.get("state_dict")
                given.arguments["state_dict"] = plain_state(model, state)
            return own(*given.args, **given.kwargs)

    def _by_state_dict(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """For a method that asks the model for its state: plain layers and nothing else."""
        plain = plain_state(self._model, None, parts=False)
        vars(self._model)["state_dict"] = lambda *_, **__: dict(plain)
        try:
            return own(self._model, *args, **kwargs)
        finally:
            del vars(self._model)["state_dict"]

    def remove(self) -> None:
        self._handle.remove()
        vars(self._model).pop(_SAVE, None)


class _PartOfAnother:
    """Refuses ``save_pretrained`` of a model around the watched one: it would write codes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle = model.register_state_dict_pre_hook(_refuse_saving_around)

    def remove(self) -> None:
        self._handle.remove()
        vars(self._model).pop(_AROUND, None)


def watch_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of ``model``, and of models within it, write plain layers.

    A model around it cannot be reached from here: its ``save_pretrained`` raises ValueError.
    """
    if _AROUND not in vars(model):
        vars(model)[_AROUND] = _PartOfAnother(model)
    for module in model.modules():
        if (
            callable(getattr(type(module), _SAVE, None))
            and _SAVE not in vars(module)
            and (next(_stand_ins(module), None) is not None or _holds(module, OFFSET, ADDED))
        ):
            vars(module)[_SAVE] = _PlainSaving(module)


def release_saving(model: nn.Module) -> None:
    """Restore ``save_pretrained`` of every module that has only plain layers again."""
    for module in model.modules():
        for name in (_SAVE, _AROUND):
            change = vars(module).get(name)
            if isinstance(change, _PlainSaving | _PartOfAnother) and not any(_stand_ins(module)):
                change.remove()


def settle_configuration(model: nn.Module) -> None:
    """Let a merged model be loaded as it is: dense, not rescaled, not tied if it is no longer."""
    for module in model.modules():
        quantizer: Any = getattr(module, "hf_quantizer", None)
        if has_own_quantizer(module):
            quantizer.remove_quantization_config(module)
        config = getattr(module, "config", None)
        for name, value in _settled(module).items():
            setattr(config, name, value)


def plain_state(
    model: nn.Module, state: Mapping[str, Any] | None, *, parts: bool = True
) -> dict[str, Any]:
    """Return a state dict with the plain layers that layers of ``model`` stand for.

    Args:
        model: Has adapted or quantised layers.
        state: Its state dict, if somebody gathered it already, or a part of it.
        parts: Whether the entries of adapted layers stay in it.

    Returns:
        Plain weights in the place of quantised ones, and beside those of adapted layers. What is
        new is on the CPU.

    Raises:
        ValueError: ``state`` holds a part of a layer, from which its weight does not follow.
    """
    plain = dict(model.state_dict() if state is None else state)
    shared = Counter(map(_memory, plain.values()))
    made: dict[int, dict[str, Tensor]] = {}
    for path, layer in _stand_ins(model):
        prefix = f"{path}." if path else ""
        own = {name: plain[name] for name in plain if name.startswith(prefix)}
        if not own:
            continue
        first = id(layer) not in made
        if first:
            given = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
            made[id(layer)] = _plain_entries(path, layer if state is None else _twin(layer, given))
        for name, tensor in own.items():
            if isinstance(layer, QuantizedLinear) or not parts or not first:
                del plain[name]
            elif shared[_memory(tensor)] > 1:
                # A base layer may share its weight, as a tied head does; tensors of files do not.
                plain[name] = tensor.clone()
        for name, tensor in made[id(layer)].items():
            plain[prefix + name] = tensor
    for prefix, embedding in _modules_of(model, QuantizedEmbedding):
        table = vars(embedding)["table"]
        name = f"{prefix}weight"
        if any(other.startswith(prefix) for other in plain):
            _drop(plain, prefix)
            entries = made.get(id(table))
            plain[name] = table.dequantize().cpu() if entries is None else entries["weight"]
    for prefix, experts in _modules_of(model, QuantizedExperts):
        if any(other.startswith(prefix) for other in plain):
            _drop(plain, prefix)
            for name, stack in experts.stacks.items():
                plain[prefix + name] = stack.dequantize().cpu()
    for owner, name, offset in _offsets(model):
        if offset in plain and owner + name in plain:
            value = plain[owner + name]
            plain[owner + name] = (value + plain[offset].to(value.device)).to(value.dtype).cpu()
            if not parts:
                del plain[offset]
    without = sorted(
        name for name in plain if is_part(name) and not is_part_of_adapter(name, plain)
    )
    if without:
        raise ValueError(
            f"state_dict holds parts of adapted layers whose names are not the model's: "
            f"{listed(without)}; pass the state dict of the model itself"
        )
    return plain


def _modules_of(model: nn.Module, kind: type[ModuleT]) -> Iterator[tuple[str, ModuleT]]:
    """Yield each module of a class with its path and a dot, at each of its paths."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            yield f"{path}." if path else "", module


def _drop(state: dict[str, Any], prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _plain_entries(path: str, layer: Any) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            linear: nn.Linear = layer.to_linear()
            return {name: tensor.cpu() for name, tensor in linear.state_dict().items()}
    except RuntimeError as error:
        raise RuntimeError(
            f"the weight that {path} stands for cannot be computed: {error}"
        ) from error


def _twin(layer: Any, given: Mapping[str, Any]) -> Any:
    """Return a copy of ``layer`` with the tensors of a state dict, for a sharded layer."""
    try:
        if isinstance(layer, QuantizedLinear):
            return type(layer).from_entries(given, given.get("bias"), layer.dtype)
        twin = copy.copy(layer)
        twin._parameters = {
            name: None if own is None else nn.Parameter(given[name], requires_grad=False)
            for name, own in layer._parameters.items()
        }
    except KeyError as error:
        raise ValueError(
            f"state_dict holds a part of a {type(layer).__name__} only, without {error.args[0]}; "
            "pass the whole state dict, or none"
        ) from error
    twin._modules = {
        name: _twin(child, {n.removeprefix(f"{name}."): t for n, t in given.items()})
        for name, child in layer._modules.items()
    }
    return twin


def _holds(model: nn.Module, *beginnings: str) -> bool:
    """Whether a module of ``model`` has a parameter whose name begins so."""
    return any(n.startswith(beginnings) for m in model.modules() for n in m._parameters)


def _memory(tensor: Any) -> Any:
    """Return an identity of the tensor's memory; of the tensor itself where it has none."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def _stand_ins(model: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every adapted or quantised layer of ``model``, at each of its paths."""
    if isinstance(model, StandsForLinear):
        yield path, model
        return
    for name, child in model._modules.items():
        if child is not None:
            yield from _stand_ins(child, f"{path}.{name}" if path else name)


def _offsets(model: nn.Module, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield, outside adapted layers, each parameter with an offset: owner, own name, offset."""
    if isinstance(model, StandsForLinear):
        return
    for name in model._parameters:
        if name.startswith(OFFSET):
            yield path, name.removeprefix(OFFSET), path + name
    for name, child in model._modules.items():
        if child is not None:
            yield from _offsets(child, f"{path}{name}.")


def _check_plain_parameters(model: nn.Module) -> None:
    if _holds(model, ADDED):
        raise ValueError(
            "this model holds tensors of methods beside the pretrained weights, and cannot be "
            "saved as a whole; use save_adapter(model, directory), or merge_prodial(model) first"
        )


def _check_saveable(model: Any, arguments: Mapping[str, Any]) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "this model holds adapted layers beside layers that transformers quantised, and cannot "
            "be saved as a whole; use save_adapter(model, directory), or merge_prodial(model) first"
        )
    if arguments.get("distributed_checkpoint"):
        raise ValueError(
            "a distributed checkpoint of an adapted or quantised model could not be loaded again; "
            "use save_adapter(model, directory), or save without distributed_checkpoint"
        )


@contextmanager
def _plain_config(model: Any) -> Iterator[None]:
    """Set the plain model's configuration while it is written."""
    config = getattr(model, "config", None)
    settled = _settled(model)
    before = {name: getattr(config, name) for name in settled}
    for name, value in settled.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def has_own_quantizer(model: Any) -> bool:
    """Whether transformers loaded ``model`` by this package's ``quantization_config``."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "quant_method", None) == METHOD


@contextmanager
def _without_quantizer(model: Any) -> Iterator[None]:
    """Let a model that was loaded quantised be written as the dense one that it stands for."""
    if not has_own_quantizer(model):
        yield
        return
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    del model.hf_quantizer, model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config


def _settled(model: Any) -> dict[str, bool]:
    config = getattr(model, "config", None)
    settled = {}
    if getattr(config, RESCALING, False):
        settled[RESCALING] = False
    if getattr(config, "tie_word_embeddings", False) and _untied(model):
        settled["tie_word_embeddings"] = False
    return settled


def _untied(model: Any) -> bool:
    """Whether input and output embeddings, tied in the base model, are no longer tied."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    if outputs is None or inputs is None:
        return False
    if isinstance(inputs, QuantizedEmbedding):
        return vars(inputs)["table"] is not outputs
    stand_ins = (isinstance(inputs, StandsForLinear), isinstance(outputs, StandsForLinear))
    return any(stand_ins) or _own_weight(inputs) is not _own_weight(outputs)


def _own_weight(layer: Any) -> Any:
    """Return the parameter itself: read as an attribute, a master of fp32 is another tensor."""
    own = layer._parameters.get("weight")
    return layer.weight if own is None else own


def _refuse_saving_around(module: nn.Module, *_: Any) -> None:
    """Raise if transformers' own ``save_pretrained`` is what asks for the state of ``module``.

    :class:`_PlainSaving` never lets it ask. Only a model around ``module`` that is not watched
    does, or one that writes PEFT's adapters and nothing of the layers.
    """
    library = sys.modules.get("transformers.modeling_utils")
    own = getattr(getattr(library, "PreTrainedModel", None), _SAVE, None)
    code = getattr(inspect.unwrap(own), "__code__", None) if own is not None else None
    frame = sys._getframe(1)
    while code is not None and frame is not None:
        if frame.f_code is code:
            asking = frame.f_locals.get("self")
            if not getattr(asking, "_hf_peft_config_loaded", False):
                raise ValueError(
                    f"a part of this {type(asking).__name__} was adapted or quantised by itself, "
                    "and a file of the whole would not load: call apply_prodial (quantize_model) "
                    "on the whole model, or merge_prodial on the part first"
                )
        frame = frame.f_back  # type: ignore[assignment]


def _without_plain_weights(
    module: nn.Module, state: MutableMapping[str, Any], prefix: str, *rest: Any
) -> None:
    """Before a state is loaded: drop plain weights that were saved beside an adapter's parts."""
    errors: list[str] = rest[-1]
    others: list[tuple[str, Any]] = [
        *_modules_of(module, QuantizedEmbedding), *_modules_of(module, QuantizedExperts)
    ]  # fmt: skip
    for own_prefix, other in others:
        start = prefix + own_prefix
        own = {name.removeprefix(start) for name in state if name.startswith(start)}
        plain = {"weight"} if isinstance(other, QuantizedEmbedding) else set(other.stacks)
        if own and own <= plain and all(state[start + n].is_floating_point() for n in own):
            _take_plain(start, other, own, state, errors)
    for path, layer in _stand_ins(module):
        start = f"{prefix}{path}." if path else prefix
        own = {name.removeprefix(start) for name in state if name.startswith(start)}
        if not isinstance(layer, QuantizedLinear):
            if any(name.startswith("base_layer.") for name in own):
                for name in own & {"weight", "bias"}:
                    del state[start + name]
        elif "weight" in own <= {"weight", "bias"} and state[f"{start}weight"].is_floating_point():
            dense = state.pop(f"{start}weight")
            here = layer.dequantize(dtype=dense.dtype).to(dense.device)
            if not torch.equal(here, dense):
                errors.append(
                    f"{start}weight is not what the quantised layer here holds: the state was "
                    "saved from another base model"
                )
            state.update({start + name: tensor for name, tensor in layer.entries().items()})
    for path, name, offset in _offsets(module):
        given, moved = state.get(prefix + path + name), state.get(prefix + offset)
        pretrained = module.get_submodule(path.rstrip("."))._parameters[name]
        if given is None or moved is None or pretrained is None or given.is_meta:
            continue
        value = pretrained.detach().to(given.device)
        # The sum was saved for everyone, and the offset beside it; the value itself is here.
        if torch.equal((value + moved.to(given.device)).to(given.dtype), given):
            state[prefix + path + name] = value


def _take_plain(
    start: str, module: Any, own: set[str], state: MutableMapping[str, Any], errors: list[str]
) -> None:
    """Replace the plain weights of an embedding or of experts by what these hold, if equal."""
    for name in own:
        dense = state.pop(start + name)
        holder = vars(module)["table"] if name == "weight" else module.stacks[name]
        if not torch.equal(holder.dequantize().to(dense), dense):
            errors.append(
                f"{start}{name} is not what the quantised layer here holds: the state was saved "
                "from another base model"
            )
    state.update(module.state_dict(prefix=start))
