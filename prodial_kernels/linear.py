"""``ProdialLinear``: a frozen ``nn.Linear`` with a ProDiaL adapter, as a drop-in module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prodial_kernels.config import AdapterOptions, ProdialConfig, resolve_block_size
from prodial_kernels.functional import checked_linear
from prodial_kernels.kernels.projector.operands import Compute, Impl, Operands, ProjectionOptions
from prodial_kernels.merged_weight import Marks, marks_of, merge_again
from prodial_kernels.ops.implementation import described_impl
from prodial_kernels.ops.layout import lay_out
from prodial_kernels.ops.reference import effective_weight
from prodial_kernels.quantization import (
    QuantizationError,
    QuantizedLinear,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.convert import STORED
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.quantization.names import ADDED as ADDED
from prodial_kernels.quantization.names import OFFSET as OFFSET
from prodial_kernels.scale_versions import KEPT_AS, NEWEST, refuse_newer, scale_to_load, unpickled
from prodial_kernels.tuners import check_still_trained

ADAPTER_PARAMETERS = ("prodial_blocks", "prodial_scale", "prodial_a", "prodial_b")
BESIDE = (OFFSET, ADDED)
"""Beginnings of the names of what is trained in modules beside the layers' own adapters."""
OFFSETS_OFF = "_prodial_offsets_off"
"""Attribute of a module in which what is trained beside is switched off."""
_ADAPTER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ProdialLinear(nn.Module):
    """``y = x W'ᵀ + bias`` with ``W' = s ⊙ (W D_b) + α B A`` (Eq. 7), computed without W'.

    The frozen layer is ``base_layer``; the adapter's tensors are ``prodial_blocks`` (D_a,
    [n_blocks, P, P]), ``prodial_scale`` (s − 1, [out_features]), ``prodial_a`` ([r, in_features])
    and ``prodial_b`` ([out_features, r]). A part that is switched off is None. At construction
    W' = W exactly: D_a, s − 1 and B are zero, A is drawn as PEFT's LoRA draws it. Weight decay
    therefore pulls towards W' = W, whoever's trainer it is.

    The adapter is kept in ``adapter_dtype`` or wider whatever ``.to(dtype)`` asks for (fp32
    masters by default): 16-bit formats would round many of an optimiser's updates away.
    """

    _version = NEWEST  # of the state dict: 1 held the scale s, 2 holds s - 1

    prodial_blocks: nn.Parameter | None
    prodial_scale: nn.Parameter | None
    prodial_a: nn.Parameter | None
    prodial_b: nn.Parameter | None
    _merged_weight: Tensor | None
    _merged_of: Marks = ()
    compute: str = AdapterOptions.compute  # which pickled layers of older releases do not have

    def __init__(
        self,
        base_layer: nn.Linear | QuantizedLinear,
        *,
        n_blocks: int | None = None,
        block_size: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        """Wrap ``base_layer`` and freeze it. See :meth:`from_linear` for the arguments."""
        super().__init__()
        _check_base_layer(base_layer)
        _check_adapter_dtype(adapter_dtype)
        adapter = AdapterOptions(**options)
        if adapter.compute == "fp8":
            _check_stored_in_fp8(base_layer)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.block_size = resolve_block_size(self.in_features, n_blocks, block_size)
        r = self.r = adapter.r
        self.lora_alpha = float(r if adapter.lora_alpha is None else adapter.lora_alpha)
        self.lora_dropout = float(adapter.lora_dropout)
        self.diagonal = adapter.diagonal
        self.adapter_dtype = adapter_dtype
        self.impl = adapter.impl
        self.compute = adapter.compute
        self.adapter_enabled = True
        self.base_layer = base_layer.requires_grad_(False)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(shape, dtype=adapter_dtype, device=weight_like(base_layer).device)
            )

        size, width = self.block_size, self.in_features
        self.prodial_blocks = (
            parameter(width // size, size, size) if adapter.train_diagonal else None
        )
        self.prodial_scale = parameter(self.out_features) if adapter.train_scale else None
        self.prodial_a = parameter(r, width) if r else None
        self.prodial_b = parameter(self.out_features, r) if r else None
        self.register_buffer("_merged_weight", None, persistent=False)
        vars(self)[KEPT_AS] = self._version
        self.register_load_state_dict_post_hook(merge_again)
        self.reset_adapter()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | QuantizedLinear,
        *,
        r: int = AdapterOptions.r,
        n_blocks: int | None = None,
        block_size: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = AdapterOptions.lora_dropout,
        diagonal: str = AdapterOptions.diagonal,
        train_scale: bool = AdapterOptions.train_scale,
        train_diagonal: bool = AdapterOptions.train_diagonal,
        adapter_dtype: torch.dtype = torch.float32,
        impl: str = AdapterOptions.impl,
        compute: str = AdapterOptions.compute,
    ) -> ProdialLinear:
        """Wrap a linear layer. The layer itself is kept, frozen, as ``base_layer``.

        Args:
            linear: The pretrained layer, dense or quantised.
            r: As in :class:`~prodial_kernels.config.AdapterOptions`, like the others below.
            n_blocks: Number of diagonal blocks (the paper's r_b); must divide ``in_features``.
            block_size: Side P of a block; give this or ``n_blocks``. Default: 1, a pure diagonal.
            lora_alpha: See ``r``.
            lora_dropout: See ``r``.
            diagonal: See ``r``.
            train_scale: See ``r``.
            train_diagonal: See ``r``.
            adapter_dtype: Dtype of the trained tensors, and the narrowest they are ever cast to.
            impl: See ``r``.
            compute: See ``r``.

        Raises:
            TypeError: ``linear`` is neither an ``nn.Linear`` with a weight nor a
                ``QuantizedLinear``, or an option is of the wrong kind.
            ValueError: An option out of range or not finite, a layer without features, a block
                count that does not divide ``in_features`` (the message lists the divisors), or
                ``compute="fp8"`` of a layer that is not stored in fp8 by tiles.
        """
        return cls(
            linear, r=r, n_blocks=n_blocks, block_size=block_size, lora_alpha=lora_alpha,
            lora_dropout=lora_dropout, diagonal=diagonal, train_scale=train_scale,
            train_diagonal=train_diagonal, adapter_dtype=adapter_dtype, impl=impl,
            compute=compute,
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, linear: nn.Linear | QuantizedLinear, config: ProdialConfig, target: str
    ) -> ProdialLinear:
        """Wrap a linear layer as a configuration says, in the layer's train or eval mode.

        The trained tensors are fp32, and fp64 where the layer's weight is.

        Args:
            linear: The pretrained layer, dense or quantised.
            config: The adapter.
            target: The one of ``config.target_modules`` that the layer matches.

        Raises:
            TypeError: As for :meth:`from_linear`.
            ValueError: As for :meth:`from_linear`.
        """
        wide = torch.promote_types(torch.float32, weight_like(linear).dtype)
        layer = cls(linear, adapter_dtype=wide, **config.layer_options(target))
        return layer.train(linear.training)

    @property
    def lora_scaling(self) -> float:
        """α = lora_alpha / r; 0 without a LoRA part."""
        return self.lora_alpha / self.r if self.r else 0.0

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, [out_features]: the adapter leaves it as it is."""
        return self.base_layer.bias

    @property
    def weight(self) -> Tensor:
        """The exact effective weight W', [out_features, in_features], differentiable.

        For code that reads ``.weight`` instead of calling the module: right, but it forms an
        [out_features, in_features] temporary. Nothing in this package's own paths reads it.

        Raises:
            RuntimeError: In training mode with ``lora_dropout > 0``, which no weight can express.
        """
        if self.training and self._adapter_active() and self.lora_dropout > 0 and self.r:
            raise RuntimeError(
                f"the effective weight was read in training mode with lora_dropout="
                f"{self.lora_dropout}, which a weight cannot express; set lora_dropout=0, or "
                "call the module instead of reading .weight"
            )
        return self.effective_weight()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See ``nn.Module``; AttributeError for ``weight``, as when weights are tied."""
        if name == "weight":
            raise AttributeError(
                "the weight of a ProdialLinear is made of its base layer and its adapter, and "
                "cannot be set or tied; set base_layer.weight, or tie weights before "
                "apply_prodial, or leave this layer out of target_modules"
            )
        super().register_parameter(name, param)

    def effective_weight(self) -> Tensor:
        """W' without dropout, [out_features, in_features], in the base weight's dtype."""
        if not self.adapter_enabled:
            return self.base_layer.weight
        if self._merged_weight is not None:
            return self._cached_weight()
        return self.adapted_weight()

    def forward(self, input: Tensor, channel_first: bool = False) -> Tensor:
        """[..., in_features] -> [..., out_features]; the argument is named as in ``nn.Linear``.

        With ``channel_first``, [..., l, in_features] -> contiguous [..., out_features, l].

        Raises:
            RuntimeError: In training mode while merged, when no adapter gradient could flow.
        """
        if not self.adapter_enabled:
            return lay_out(self.base_layer(input), channel_first)
        if self._merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this ProdialLinear is merged, so its adapter would get no gradient; call "
                    "unmerge() before training, or eval() for inference"
                )
            merged = nn.functional.linear(input, self._cached_weight(), self.base_layer.bias)
            return lay_out(merged, channel_first)
        operands, options = self.projection()
        return checked_linear(
            input, operands, options, training=self.training, channel_first=channel_first
        )

    def projection(self, *, bias: bool = True) -> tuple[Operands, ProjectionOptions]:
        """What :func:`prodial_kernels.functional.prepared` takes; a packed weight stays packed.

        Args:
            bias: Whether to add the layer's bias.

        Raises:
            RuntimeError: PEFT has frozen the adapter, and this call is for training.
        """
        parts = self.prodial_blocks, self.prodial_scale, self.prodial_a, self.prodial_b
        if self.training and torch.is_grad_enabled():
            # Not compared as tuples, which torch.compile of torch 2.11 cannot trace.
            present = [part for part in parts if part is not None]
            if present:
                check_still_trained(self, present)
        base, packed = self.base_layer, None
        if isinstance(base, QuantizedLinear):
            weight, packed = base.stand_in(), base.packed_weight()
        else:
            weight = base.weight
        options = ProjectionOptions(
            cast(Impl, self.impl), self.lora_scaling, self.lora_dropout, self.diagonal, packed,
            cast(Compute, self.compute),
        )  # fmt: skip
        return Operands(weight, *parts, base.bias if bias else None), options

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Set the adapter to its initial values, at which W' = W."""
        if self.prodial_blocks is not None:
            self.prodial_blocks.zero_()
        if self.prodial_scale is not None:
            self.prodial_scale.zero_()
        if self.prodial_a is not None and self.prodial_b is not None:
            nn.init.kaiming_uniform_(self.prodial_a, a=math.sqrt(5))
            self.prodial_b.zero_()
        merge_again(self)

    @property
    def merged(self) -> bool:
        """Whether calls use the cached effective weight."""
        return self._merged_weight is not None

    def merge(self) -> None:
        """Cache W' and use it in every call: plain-linear speed for inference.

        The base weight is left untouched, so :meth:`unmerge` is exact and the state dict does not
        change; the price is one more weight in memory. :meth:`to_linear` gives a layer without it.
        W' is formed anew when what it is made of changes, as by ``load_state_dict`` or a moving
        average; :func:`~prodial_kernels.merged_weight.marks_of` says what cannot be seen.
        """
        self.renew_merged()

    def renew_merged(self) -> None:
        """Form W' anew if what the cached one was made of has changed."""
        marks = self._marks()
        if self._merged_weight is None or self._merged_of != marks:
            # A weight made in inference mode could never be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._merged_weight = self.adapted_weight().clone()
            self._merged_of = marks

    def unmerge(self) -> None:
        """Drop the cached W'; calls use the adapter again, bit for bit as before."""
        self._merged_weight = None
        self._merged_of = ()

    def _cached_weight(self) -> Tensor:
        """The merged W', made again first if what it was made of has changed."""
        if not torch.compiler.is_compiling():
            self.renew_merged()
        if self._merged_weight is None:
            raise RuntimeError("the merged weight was asked of a layer that is not merged")
        return self._merged_weight

    def adapted_weight(self) -> Tensor:
        """W' of the adapter as it is now, whether merged, switched off or neither."""
        return effective_weight(
            self.base_layer.weight, self.prodial_blocks, self.prodial_scale, self.prodial_a,
            self.prodial_b, self.lora_scaling, self.diagonal,
        )  # fmt: skip

    def _marks(self) -> Marks:
        base = self.base_layer
        weights = base.packed() if isinstance(base, QuantizedLinear) else (base.weight,)
        parts = (self.prodial_blocks, self.prodial_scale, self.prodial_a, self.prodial_b)
        return marks_of((*weights, *parts), self.lora_scaling, self.diagonal)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a new plain ``nn.Linear`` with weight W' and a copy of the bias."""
        base = self.base_layer
        linear = nn.Linear(
            self.in_features, self.out_features, bias=base.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.adapted_weight().clone())
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.clone())
        return linear.train(self.training)

    def original_layer(self) -> nn.Module:
        """Return the layer that this one replaced."""
        return self.base_layer

    def to_quantized(self, format: str) -> tuple[QuantizedLinear, QuantizationError]:
        """Return :meth:`to_linear` in a storage format, and what quantising W' lost.

        With ``"stored"``, in the one that the base layer is stored in; ValueError where weights
        are not made in that.

        A merge into a quantised layer is never exact: W' falls between the format's values even
        where W was one of them.
        """
        merged = self.to_linear()
        base = self.base_layer
        if format == STORED and isinstance(base, QuantizedLinear):
            quantized = base.rounded(merged.weight.detach()).train(self.training)
        else:
            quantized = quantize_linear(merged, format)
        return quantized, quantization_error(merged.weight, quantized)

    def enable_adapter(self, enabled: bool = True) -> None:
        """Switch the adapter on or off; off, the module is the pretrained layer."""
        self.adapter_enabled = enabled

    @property
    def switched_on(self) -> bool:
        """What :meth:`enable_adapter` was last told."""
        return self.adapter_enabled

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, tensor) of every part that is present."""
        for name in ADAPTER_PARAMETERS:
            parameter = getattr(self, name)
            if parameter is not None:
                yield name, parameter

    def extra_repr(self) -> str:
        """The shape, the adapter's parts, and the implementation that calls will use."""
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        parts.append(f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha:g}")
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout:g}")
        if self.prodial_blocks is not None:
            n_blocks = self.prodial_blocks.shape[0]
            parts.append(f"n_blocks={n_blocks}, block_size={self.block_size}")
            parts.append(f"diagonal={self.diagonal!r}")
        parts.append(f"scale={self.prodial_scale is not None}")
        parts.append(described_impl(self.impl, weight_like(self.base_layer)))
        if self.compute != "same":
            parts.append(f"compute={self.compute!r}")
        if self.merged:
            parts.append("merged")
        if not self.adapter_enabled:
            parts.append("adapter disabled")
        return ", ".join(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpickled(state))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        version = local_metadata.get("version")
        refuse_newer(f"the state of {prefix.removesuffix('.') or 'this layer'}", version)
        name = f"{prefix}prodial_scale"
        if self.prodial_scale is not None and isinstance(state_dict.get(name), Tensor):
            state_dict[name] = scale_to_load(state_dict[name], version)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _adapter_active(self) -> bool:
        return self.adapter_enabled and self._merged_weight is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProdialLinear:
        """Move or cast, keeping the adapter at least as wide as ``adapter_dtype``."""
        merged = self.merged
        self.unmerge()
        if recurse:
            self.base_layer._apply(fn)

        super()._apply(never_narrower(fn, self.adapter_dtype), recurse=False)
        if merged:
            self.merge()
        return self


def never_narrower(
    fn: Callable[[Tensor], Tensor], narrowest: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, which moves or casts a tensor, without casts below ``narrowest``."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        wide = torch.promote_types(applied.dtype, narrowest)
        if applied.dtype == wide:
            return applied
        # Cast from the original, not from the narrowed copy: nothing is lost on the way.
        return tensor.to(device=applied.device, dtype=wide)

    return apply


def weight_like(layer: nn.Linear | QuantizedLinear) -> Tensor:
    """Return a tensor with the dtype and device that ``layer.weight`` has; nothing is unpacked."""
    if isinstance(layer, QuantizedLinear):
        return torch.empty(0, dtype=layer.dtype, device=layer.device)
    return layer.weight


def adapted_layers(model: nn.Module) -> dict[str, ProdialLinear]:
    """Return the adapted layers of ``model``, each once, by the first dotted path to it."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, ProdialLinear)
    }


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Run the pretrained model: switch every adapter in ``model`` off, and back afterwards."""
    layers = [*adapted_layers(model).values()]
    before = [layer.switched_on for layer in layers]
    moved = [m for m in model.modules() if any(name.startswith(BESIDE) for name in m._parameters)]
    moved = [module for module in moved if not vars(module).get(OFFSETS_OFF)]
    for layer in layers:
        layer.enable_adapter(False)
    for module in moved:
        vars(module)[OFFSETS_OFF] = True
    forget_decoding_graphs(model)
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enable_adapter(enabled)
        for module in moved:
            vars(module).pop(OFFSETS_OFF, None)
        forget_decoding_graphs(model)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Let the adapters in ``model`` compute in the dtype of their inputs, and as before after."""
    layers = [layer for layer in adapted_layers(model).values() if layer.compute != "same"]
    before = [layer.compute for layer in layers]
    for layer in layers:
        layer.compute = "same"
    try:
        yield
    finally:
        for layer, compute in zip(layers, before, strict=True):
            layer.compute = compute


def forget_decoding_graphs(model: nn.Module) -> None:
    """Drop the CUDA graphs of mamba_ssm's ``generate(cg=True)``, which hold the weights of then."""
    for module in model.modules():
        if "_decoding_cache" in vars(module):
            vars(module)["_decoding_cache"] = None


def _check_base_layer(layer: object) -> None:
    """Raise TypeError unless ``layer`` is a linear layer, ValueError unless it has a size."""
    if not isinstance(layer, nn.Linear | QuantizedLinear):
        raise TypeError(
            f"base_layer must be an nn.Linear, got {type(layer).__name__}; a quantised "
            "layer comes from prodial_kernels.quantization"
        )
    if isinstance(layer, nn.Linear) and is_lazy(layer.weight):
        raise TypeError(
            f"base_layer must have its weight already, got a {type(layer).__name__} that has no "
            "shape yet; run the model once before it is adapted"
        )
    if layer.in_features < 1 or layer.out_features < 1:
        raise ValueError(
            "base_layer must have at least one feature in and out, got in_features="
            f"{layer.in_features}, out_features={layer.out_features}"
        )


def _check_stored_in_fp8(layer: nn.Linear | QuantizedLinear) -> None:
    """Raise ValueError unless the layer is stored in fp8 by 128×128 tiles."""
    if isinstance(layer, nn.Linear) and layer.weight.is_meta:
        return  # A model that is only planned with is not stored yet.
    if not isinstance(layer, FP8Linear):
        stored = f"stored in {layer.FORMAT}" if isinstance(layer, QuantizedLinear) else "dense"
        raise ValueError(
            f"compute='fp8' multiplies a weight that is stored in fp8, and this one is {stored}; "
            "store it by quantize_model(model, 'fp8') before it is adapted (--quantize fp8), or "
            "use compute='same'"
        )
    if layer.by_rows:
        raise ValueError(
            "compute='fp8' takes fp8 weights with a scale per 128×128 tile, and this one has a "
            "scale per row; dequantise it and store it by quantize_model(model, 'fp8'), or use "
            "compute='same'"
        )


def _check_adapter_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that an optimiser cannot train in."""
    if dtype not in _ADAPTER_DTYPES:
        names = ", ".join(str(known) for known in _ADAPTER_DTYPES)
        raise TypeError(f"adapter_dtype must be a dtype to train in ({names}), got {dtype}")
