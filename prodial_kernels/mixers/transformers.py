"""Mamba mixers of transformers (5.17 and later): keep adapted ones off the fused shortcut.

In training without a cache, eight of the ten mixer classes pass ``self.out_proj.weight`` to one
fused function and return its result, so ``out_proj`` is never called. ``ProdialLinear.weight`` is
the exact W', so that would be right, but it forms W' in every forward and cannot express dropout.
All eight decide by ``self.training``, which their ``forward`` uses for nothing else. So the mixer
alone, not its children, is told that it is not training while its ``forward`` runs: it then takes
the path that evaluation takes (separate convolution and scan kernels, projectors called as
modules). transformers is recognised by module names and never imported here.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from prodial_kernels.linear import ProdialLinear

FUSED_FUNCTIONS = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
"""Names of the fused training functions, globals of transformers' modeling modules."""


def bypass_fused_training(model: nn.Module) -> list[RemovableHandle]:
    """Keep the mixers of ``model`` that hold an adapted projector off the fused function.

    FalconMamba's mixers are kept off it even where they hold no adapter themselves: the fused
    backward leaves out the Jacobian of their B, C and dt norms, so any adapter below such a mixer
    would get a wrong gradient.

    Returns:
        The handles that undo it. They survive deepcopy and pickle together with the model.
    """
    handles = []
    for mixer in model.modules():
        adapted = any(isinstance(child, ProdialLinear) for child in mixer.children())
        if calls_fused_function(mixer) and (adapted or hasattr(mixer, "b_layernorm")):
            pause = _TrainingPause()
            handles.append(mixer.register_forward_pre_hook(pause.begin))
            handles.append(
                mixer.register_forward_hook(pause.end, prepend=True, always_call=True),
            )
    return handles


def calls_fused_function(mixer: nn.Module) -> bool:
    """Whether a transformers ``forward`` of the mixer's class refers to a fused function."""
    for cls in type(mixer).__mro__:
        if cls.__module__.startswith("transformers.models.") and "forward" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
            if code is not None and not set(FUSED_FUNCTIONS).isdisjoint(code.co_names):
                return True
    return False


class _TrainingPause:
    """The two hooks of one mixer; ``interrupted`` says that the second has to resume training."""

    def __init__(self) -> None:
        self.interrupted = False

    def begin(self, mixer: nn.Module, args: Any) -> None:
        if mixer.training:
            mixer.training = False
            self.interrupted = True

    def end(self, mixer: nn.Module, args: Any, output: Any) -> None:
        if self.interrupted:
            mixer.training = True
            self.interrupted = False
