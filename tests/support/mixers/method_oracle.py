"""Every method written out on a plain model in fp64, independent of the package's own ways.

The plain model runs with parameters that are formed from the methods' tensors by their definitions
(``functional_call``), and with hooks for what is no parameter's. Mamba-1 of transformers' and of
mamba_ssm's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prodial_kernels import ProdialConfig
from prodial_kernels.methods import AdditionalScan, Lora, Method, ParallelAdapter, PartialLora

Methods = Iterable[ProdialConfig | Method]


class Oracle:
    """A plain model in fp64 and the leaves that its parameters are formed from."""

    def __init__(self, plain: nn.Module, adapted: nn.Module, methods: Methods) -> None:
        self.model = plain.double().requires_grad_(False)
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        self.leaves = {
            n.replace("base_layer.", ""): p.detach().double().clone().requires_grad_()
            for n, p in trained.items()
        }
        self.methods = list(methods)
        self.used: set[str] = set()

    def method(self, kind: type[Any]) -> Any:
        return next(method for method in self.methods if isinstance(method, kind))

    def leaf(self, path: str, name: str) -> Tensor | None:
        found = self.leaves.get(f"{path}.{name}")
        if found is not None:
            self.used.add(f"{path}.{name}")
        return found

    def parameters(self) -> dict[str, Tensor]:
        formed: dict[str, Tensor] = {}
        for name, own in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            value = own.detach()
            offset = self.leaf(path, f"prodial_offset_{leaf}")
            if offset is not None:
                value = value + offset
            if leaf == "weight":
                value = self.adapted(path, value)
            formed[name] = self.widened(path, leaf, value, own.detach())
        return formed

    def adapted(self, path: str, value: Tensor) -> Tensor:
        blocks, scale = (self.leaf(path, f"prodial_{n}") for n in ("blocks", "scale"))
        if blocks is not None:
            d_a = torch.block_diag(*blocks)
            eye = torch.eye(len(d_a), dtype=d_a.dtype, device=d_a.device)
            value = value @ ((eye - torch.relu(eye * d_a)) + (1 - eye) * d_a)
        if scale is not None:
            value = (1 + scale)[:, None] * value
        a, b = self.leaf(path, "prodial_a"), self.leaf(path, "prodial_b")
        if a is not None and b is not None:
            own = self.method(ProdialConfig)
            value = value + own.lora_alpha / own.r * b @ a
        if path.endswith(("_proj", "_proj_b")):
            value = self.low_rank(path, value, "lora", 0, len(value), Lora)
            for part, (start, stop) in self.ranges(path, value).items():
                value = self.low_rank(path, value, f"lora_{part}", start, stop, PartialLora)
        return value

    def low_rank(
        self, path: str, value: Tensor, tag: str, start: int, stop: int, kind: type[Method]
    ) -> Tensor:
        a, b = (self.leaf(path, f"prodial_added_{tag}_{n}") for n in "ab")
        if a is None or b is None:
            return value
        method = self.method(kind)
        delta = torch.zeros_like(value)
        delta[start:stop] = method.alpha / method.r * b @ a
        return value + delta

    def ranges(self, path: str, value: Tensor) -> dict[str, tuple[int, int]]:
        if path.endswith("in_proj"):
            half = len(value) // 2
            return {"X": (0, half), "Z": (half, 2 * half)}
        if "x_proj" in path:
            states = self.states(path)
            rank = len(value) - 2 * states
            return {"d": (0, rank), "B": (rank, rank + states), "C": (rank + states, len(value))}
        return {}

    def states(self, path: str) -> int:
        mixer = self.model.get_submodule(path.rpartition(".")[0])
        return mixer.A_log.shape[1]

    def widened(self, path: str, leaf: str, value: Tensor, own: Tensor) -> Tensor:
        """The parameter with more states; ``own`` is the pretrained one."""
        if leaf == "A_log" and (offset := self.leaf(path, "prodial_added_scan_A_log")) is not None:
            method, k, n = self.method(AdditionalScan), offset.shape[1], own.shape[1]
            if method.init == "s4d":
                begin = torch.log(
                    torch.arange(n + 1, n + k + 1, dtype=own.dtype, device=own.device)
                )[None]
            else:
                begin = own[:, :k] if method.position == "prefix" else own[:, n - k :]
            return self.joined(value, begin + offset, 1)
        b, c = (self.leaf(path, f"prodial_added_scan_{n}") for n in "BC")
        if leaf != "weight" or b is None or c is None:
            return value
        k, n = len(b), self.states(path)
        rank = len(value) - 2 * n
        prefix = self.method(AdditionalScan).position == "prefix"
        begin = own[rank : rank + k] if prefix else own[rank + n - k : rank + n]
        dt, own_b, own_c = value.split([rank, n, n])
        return torch.cat((dt, self.joined(own_b, begin + b, 0), self.joined(own_c, c, 0)))

    def joined(self, own: Tensor, new: Tensor, dim: int) -> Tensor:
        prefix = self.method(AdditionalScan).position == "prefix"
        return torch.cat((new, own) if prefix else (own, new), dim)

    def beside(self, path: str) -> Callable[..., Any] | None:
        """A forward hook for what is added to a module's output."""
        a, b = (self.leaf(path, f"prodial_added_parallel_{n}") for n in "ab")
        if a is not None and b is not None:
            scale = self.method(ParallelAdapter).scale
            return lambda _, x, y: y + scale * F.relu(x[0] @ a.T) @ b.T
        a, b = (self.leaf(path, f"prodial_added_lora_{n}") for n in "ab")
        if "embedding" in path and a is not None and b is not None:
            factor = self.method(Lora).alpha / self.method(Lora).r
            return lambda _, x, y: y + factor * a[x[0]] @ b.T
        return None

    def run(self, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
        """``call`` gets a module to call and returns what to differentiate; all by name."""
        hooks = [
            module.register_forward_hook(hook)
            for path, module in self.model.named_modules()
            if (hook := self.beside(path)) is not None
        ]
        parameters = self.parameters()
        assert self.used == self.leaves.keys(), self.leaves.keys() - self.used
        for mixer in self.model.modules():
            for name in ("d_state", "ssm_state_size"):
                if name in vars(mixer):
                    scans = [m for m in self.methods if isinstance(m, AdditionalScan)]
                    vars(mixer)[name] += sum(m.states for m in scans)
                    vars(mixer)["use_fast_path"] = False
        wrapped = _Called(self.model, parameters)
        result = call(wrapped)
        names = list(self.leaves)
        found = torch.autograd.grad(result, [self.leaves[n] for n in names])
        for hook in hooks:
            hook.remove()
        return {"result": result.detach(), **dict(zip(names, found, strict=True))}


class _Called(nn.Module):
    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.formed = model, parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.formed, args, kwargs)


@torch.no_grad()
def move(model: nn.Module, seed: int = 3, spread: float = 0.2) -> None:
    """Move all that trains away from its initial values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * spread).to(parameter.dtype))
