"""What of a model must be as it was once adapters are gone."""

from __future__ import annotations

from torch import nn

from prodial_kernels import ProdialConfig

CONFIG = ProdialConfig(r=2, n_blocks=3)


EVERYTHING = ProdialConfig(
    r=2, target_modules=("in_proj", "out_proj", "stem", "shared", "head"), block_size=2
)


def snapshot(model: nn.Module) -> tuple[object, ...]:
    """Everything that must not change: modules, attributes, flags, modes, hooks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return (
        {name: id(module) for name, module in modules.items()},
        {name: module.training for name, module in modules.items()},
        {name: set(vars(module)) for name, module in modules.items()},
        {name: list(module._forward_hooks) for name, module in modules.items()},
        {name: (id(p), p.requires_grad, p._version) for name, p in parameters.items()},
    )
