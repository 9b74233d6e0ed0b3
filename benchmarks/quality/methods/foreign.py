"""PEFT's own methods on both projectors, and MambaPEFT's where the package has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from benchmarks.quality.methods.budgets import fit, projectors
from benchmarks.quality.methods.method import ADAPTER_RATES, VECTOR_RATES, Method, Unfit
from prodial_kernels.models.mixers.hf import unfused_forward
from prodial_kernels.models.patch_point import AdaptedMixer

__all__ = ["METHODS"]

BOTH = ["in_proj", "out_proj"]
Options = Callable[[list[tuple[int, int]], int], Mapping[str, Any]]


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of a model's layers."""
    for path in ("backbone.layers", "model.layers", "layers"):
        found: Any = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise Unfit("the base has no list of layers that is known here")


def _peft(config: str, options: Options) -> Callable[[nn.Module, int], None]:
    """Inject a method of PEFT past its refusal of ``out_proj``, on the path that calls it."""

    def apply(model: nn.Module, target: int) -> None:
        import peft

        blocks = _blocks_of(model)
        chosen = options(projectors(model, BOTH), target)
        model.requires_grad_(False)
        made = getattr(peft, config)(target_modules=BOTH, **chosen)
        # The list of layers carries no model type, by which PEFT would refuse.
        if made.peft_type == peft.PeftType.VERA:
            # Its matrices are shared by all layers, which injecting refuses.
            peft.get_peft_model(blocks, made)
        else:
            peft.inject_adapter_in_model(made, blocks)
        for block in blocks:
            mixer = getattr(block, "mixer", None) or getattr(block, "mamba", None)
            # Transformers' fused training path would read out_proj's weight; Vision Mamba calls it.
            if mixer is not None and type(mixer).__module__.startswith("transformers."):
                AdaptedMixer(mixer, {"forward": unfused_forward})
        if not any(p.requires_grad for p in model.parameters()):
            raise Unfit(f"PEFT's {config} trains nothing here")

    return apply


def _dora(shapes: list[tuple[int, int]], target: int) -> Mapping[str, Any]:
    r = fit(shapes, target, scale=True, blocks=None).r
    return {"r": r, "lora_alpha": r, "use_dora": True}


def _oft(shapes: list[tuple[int, int]], target: int) -> Mapping[str, Any]:
    """The block size whose rotations have about as many parameters: d (b - 1) / 2 a layer."""
    inputs = sum(i for i, _ in shapes)
    sizes = [b for b in range(2, 513) if all(i % b == 0 for i, _ in shapes)]
    block = min(sizes, key=lambda b: abs(inputs * (b - 1) // 2 - target))
    return {"oft_block_size": block, "r": 0}


def _vera(shapes: list[tuple[int, int]], target: int) -> Mapping[str, Any]:
    del shapes, target
    return {"r": 256, "d_initial": 0.1, "projection_prng_key": 0}


def _ia3(shapes: list[tuple[int, int]], target: int) -> Mapping[str, Any]:
    del shapes, target
    return {"feedforward_modules": ["out_proj"]}


def _of_package(
    make: Callable[[Any, int, nn.Module], list[Any]], measure: bool = True
) -> Callable[[nn.Module, int], None]:
    """A list of the package's methods, its knob raised until the count is nearest the budget.

    ``make`` takes ``prodial_kernels.methods`` and the knob's value. The count is linear in the
    knob, so two trials on copies say the rest; without ``measure`` it has one size.
    """

    def apply(model: nn.Module, target: int) -> None:
        try:
            import prodial_kernels
            from prodial_kernels import methods
        except ImportError as error:
            raise Unfit(f"this version of the package lacks methods ({error})") from None
        listed: Any = getattr(prodial_kernels, "apply_methods", None)
        if listed is None:
            raise Unfit("this version of the package lacks apply_methods")
        knob = 1
        if measure:
            counts = [_count(model, listed, make(methods, value, model)) for value in (1, 2)]
            slope = counts[1] - counts[0]
            knob = max(1, 1 + round((target - counts[0]) / slope)) if slope else 1
        try:
            listed(model, make(methods, knob, model))
        except ValueError as error:
            raise Unfit(str(error)) from None

    return apply


def _count(model: nn.Module, listed: Any, methods: list[Any]) -> int:
    import copy

    trial = copy.deepcopy(model)
    try:
        listed(trial, methods)
    except ValueError as error:
        raise Unfit(str(error)) from None
    return sum(p.numel() for p in trial.parameters() if p.requires_grad)


def _strong(m: Any, r: int, model: nn.Module) -> list[Any]:
    """Halloran et al.'s: LoRA on x_proj (Mamba-2 has none), both projectors and embeddings."""
    x_proj = ("x_proj",) if projectors(model, ["x_proj"]) else ()
    return [m.Lora(targets=(*x_proj, "in_proj", "out_proj", "embed"), r=r)]


_PARTS = ("A_log", "D", "conv1d")

METHODS = (
    Method("dora", "DoRA (PEFT)", _peft("LoraConfig", _dora)),
    Method("oft", "OFT (PEFT)", _peft("OFTConfig", _oft)),
    Method("vera", "VeRA (PEFT)", _peft("VeraConfig", _vera), VECTOR_RATES, own_size=True),
    Method("ia3", "(IA)³ (PEFT)", _peft("IA3Config", _ia3), VECTOR_RATES, own_size=True),
    Method("strong", "Strong", _of_package(_strong), ADAPTER_RATES),
    Method(
        "partial-lora", "LoRA, X", _of_package(lambda m, r, _: [m.PartialLora(rows=("X",), r=r)])
    ),
    Method("parallel", "ParallelAdapter", _of_package(lambda m, r, _: [m.ParallelAdapter(r=r)])),
    Method(
        "additional-scan", "additional scan",
        _of_package(lambda m, r, _: [m.AdditionalScan(states=4)], measure=False), own_size=True,
    ),
    Method(
        "partial-tuning", "A_log, D, conv1d",
        _of_package(lambda m, r, _: [m.PartialTuning(parts=_PARTS)], measure=False),
        own_size=True,
    ),
)  # fmt: skip
