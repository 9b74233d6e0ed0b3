"""From what a method trains to the weights that a plain model would have, for many runs at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods.registry import adapt
from benchmarks.quality.side_by_side.stacked import HEAD, split_name, weights_of
from prodial_kernels import ProdialLinear
from prodial_kernels.ops.reference import effective_weight

__all__ = ["Method", "Start", "method_of"]

_OFFSET = "prodial_offset_"
Parts = Mapping[str, Tensor]
Rule = Callable[[Parts, Tensor], Tensor]
"""From a module's trained parts [runs, layers, …] and its weight [1, layers, o, i] to W'."""


@dataclass(frozen=True)
class Start:
    """One run before its first step: what trains, flat, and how it is counted."""

    values: Tensor
    figures: dict[str, int]


@dataclass
class Method:
    """How one method, at one budget, makes weights.

    Attributes:
        parts: Name within a layer (or of the model) of each trained parameter, its shape with the
            dimension of layers in front (where it has one), in the order of ``Start.values``.
        rules: Name of an adapted weight -> (names of its parts, rule).
        plain: Name of a trained parameter -> the plain weight that it replaces.
        added: Name of a trained parameter -> the plain weight that it is added to.
    """

    parts: dict[str, torch.Size]
    rules: dict[str, tuple[dict[str, str], Rule]]
    plain: dict[str, str]
    added: dict[str, str]

    @property
    def touches(self) -> set[str]:
        """Names of the weights that are runs' own."""
        return {*self.rules, *self.plain.values(), *self.added.values()}

    def weights(self, flat: Tensor, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights [runs, …] from the runs' parameters [runs, n]. Differentiable."""
        if not self.parts:
            return {}
        sizes = [shape.numel() for shape in self.parts.values()]
        pieces = dict(zip(self.parts, flat.split(sizes, 1), strict=True))
        parts = {name: pieces[name].view(-1, *shape) for name, shape in self.parts.items()}
        made = {weight: parts[name] for name, weight in self.plain.items()}
        for name, weight in self.added.items():
            made[weight] = base[weight] + parts[name]
        for weight, (names, rule) in self.rules.items():
            made[weight] = rule({short: parts[name] for short, name in names.items()}, base[weight])
        return made


def _flat(model: Any) -> tuple[dict[str, torch.Size], Tensor]:
    """Trained parameters by name within a layer, one behind the other."""
    found: dict[str, list[Tensor]] = {}
    layered: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short, layer = split_name(name)
            found.setdefault(short, []).append(parameter.detach())
            layered[short] = layer is not None
    stacked = {n: torch.stack(t) if layered[n] else t[0] for n, t in found.items()}
    values = [t.float().flatten() for t in stacked.values()]
    shapes = {name: tensor.shape for name, tensor in stacked.items()}
    return shapes, torch.cat(values) if values else torch.zeros(0)


def method_of(
    model: Any, name: str, budget: str, seed: int, classes: int | None = None
) -> tuple[Method, Start]:
    """Adapt a copy of a model as one row would, and read from it how its weights are made.

    Args:
        model: The base's, fp32, on the CPU.
        name: Of the method.
        budget: Its budget.
        seed: Of the adapter's start.
        classes: Of a vision task: the model gets a new head for them, which trains along.

    Returns:
        What is the same for every run of this method and budget, and the start of this seed.

    Raises:
        Unfit: The base has not what the method adapts.
        NotImplementedError: The method is more than other weights of a plain model, or one whose
            rule is not known here; such rows are run one by one.
    """
    adapted = copy.deepcopy(model)
    # Not the GPU's, which may be capturing a graph.
    torch.default_generator.manual_seed(seed)
    figures = adapt(adapted, name, budget, classes)
    parts, values = _flat(adapted)
    known = weights_of(model)
    method = Method(parts, {}, {}, {})
    if any(p._backward_hooks for p in adapted.parameters()):
        raise NotImplementedError(f"method: {name} has hooks on gradients; run it without "
                                  "--side-by-side")  # fmt: skip
    modules = {split_name(path)[0]: module for path, module in adapted.named_modules()
               if split_name(path)[1] == 0}  # fmt: skip
    for part in parts:
        if part in known or part == HEAD:
            method.plain[part] = part
        elif _OFFSET in part and part.replace(_OFFSET, "") in known:
            method.added[part] = part.replace(_OFFSET, "")
        else:
            _read_rule(method, part, modules, known, name)
    return method, Start(values, figures)


def _read_rule(
    method: Method, part: str, modules: Mapping[str, nn.Module], known: Parts, name: str
) -> None:
    owners = [path for path in modules if path and part.startswith(f"{path}.")
              and f"{path}.weight" in known]  # fmt: skip
    if not owners:
        raise NotImplementedError(
            f"method: {name} trains {part}, which is no other form of one weight; run it without "
            "--side-by-side"
        )
    path = max(owners, key=len)
    weight = f"{path}.weight"
    if weight not in method.rules:
        mine = [p for p in method.parts if p.startswith(f"{path}.")]
        names = {p.removeprefix(f"{path}.").removesuffix(".weight").removesuffix(".default"): p
                 for p in mine}  # fmt: skip
        method.rules[weight] = names, _rule_of(modules[path], name)


def _rule_of(module: nn.Module, name: str) -> Rule:
    if isinstance(module, ProdialLinear):
        return _prodial(module)
    kind = type(module).__module__
    if kind == "peft.tuners.lora.layer" and module.use_dora["default"]:  # type: ignore[index]
        return _dora(module)
    if kind == "peft.tuners.ia3.layer":
        return _ia3(module)
    if kind == "peft.tuners.oft.layer":
        return _oft(module)
    raise NotImplementedError(
        f"method: {name} uses {type(module).__name__}, whose weight is not known here; run it "
        "without --side-by-side"
    )


def _prodial(module: ProdialLinear) -> Rule:
    scaling, diagonal = module.lora_scaling, module.diagonal

    def one(parts: Parts, weight: Tensor) -> Tensor:
        return effective_weight(
            weight,
            parts.get("prodial_blocks"),
            parts.get("prodial_scale"),
            parts.get("prodial_a"),
            parts.get("prodial_b"),
            scaling,
            diagonal,
        )

    layers = torch.vmap(one)

    def rule(parts: Parts, weight: Tensor) -> Tensor:
        made: Tensor = torch.vmap(layers, in_dims=(0, None))(dict(parts), weight[0])
        return made

    return rule


def _dora(module: Any) -> Rule:
    """PEFT's: the norm is not differentiated."""
    scaling = module.scaling["default"]

    def rule(parts: Parts, weight: Tensor) -> Tensor:
        low_rank = parts["lora_B"] @ parts["lora_A"]
        adapted = weight + scaling * low_rank
        norm = adapted.detach().norm(dim=-1)
        scale: Tensor = parts["lora_magnitude_vector"] / norm
        return scale[..., None] * adapted

    return rule


def _ia3(module: Any) -> Rule:
    """A factor for each output, [o, 1], or, in feed-forward layers, for each input, [1, i]."""
    del module

    def rule(parts: Parts, weight: Tensor) -> Tensor:
        return weight * parts["ia3_l"]

    return rule


def _oft(module: Any) -> Rule:
    """Rotations of blocks of the input, by PEFT's own function."""
    rotation = module.oft_R["default"]
    size = rotation.block_size

    def rule(parts: Parts, weight: Tensor) -> Tensor:
        angles = parts["oft_R"]
        runs, layers, blocks, _ = angles.shape
        turned = rotation.to(angles.device)._cayley_batch(
            angles.flatten(0, 2), size, rotation.use_cayley_neumann,
            rotation.num_cayley_neumann_terms,
        )  # fmt: skip
        # x R Wᵀ = x (W Rᵀ)ᵀ, block by block.
        turned = turned.view(runs, layers, blocks, size, size)
        blocked = weight[0].unflatten(-1, (blocks, size))
        made = torch.einsum("logc,rlgkc->rlogk", blocked, turned)
        return made.flatten(-2)

    return rule
