"""What a step of mamba_ssm's adapted mixers costs: tensors kept for backward, kernels called."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, remove_prodial
from support.mixers import cuda_stand_ins
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_mamba_ssm import EVERY, adapted, cast, step, token_ids
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2

pytestmark = pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the first mixer keeps for backward besides its parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.layers[0].mixer(x)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_what_mamba_keeps_for_backward() -> None:
    model = adapted(Mamba, depth=1, width=64, d_state=2)
    x = torch.randn(2, 50, 64, dtype=torch.float64, requires_grad=True)
    # X, xz, the scan's output; x_proj's output and H of in_proj; states, A and the like.
    tokens, constant = 2 * 50 * 8, 8 * (2 * 128 * 4 + 128 * 2 + 8 * 128)
    assert kept_bytes(model, x) <= tokens * (64 + 256 + 128 + 7 + 3) + constant
    model.layers[0].mixer.prodial_recompute_xz = True
    assert kept_bytes(model, x) <= tokens * (64 + 128 + 7 + 3) + constant


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_mamba2_keeps_what_the_frozen_path_keeps_and_the_inputs_of_in_proj(impl: str) -> None:
    config = ProdialConfig(r=2, impl=impl)
    model = cast(adapted(Mamba2, config, depth=1, width=64), torch.float16)
    x = torch.randn(2, 50, 64, dtype=torch.float16, requires_grad=True)
    ours = kept_bytes(model, x)
    frozen = kept_bytes(remove_prodial(model).requires_grad_(False), x)
    # X, and each projector's H padded to 16 columns at most; what is left is the adapter's small
    # operands.
    assert ours - frozen <= 2 * 50 * (64 + 2 * 16) * 2 + 2000


def test_recomputing_xz_changes_nothing() -> None:
    model = adapted(Mamba, EVERY)
    expected = step(model, token_ids())
    for layer in model.layers:
        layer.mixer.prodial_recompute_xz = True
    for name, value in step(model, token_ids()).items():
        assert torch.equal(value, expected[name]), name


def test_fused_calls_per_step() -> None:
    """One convolution and one scan more in backward, as upstream's recomputation has it."""
    step(adapted(Mamba, depth=3), token_ids())
    assert cuda_stand_ins.calls == {"conv_fwd": 6, "conv_bwd": 3, "scan_fwd": 3, "scan_bwd": 3}
    assert len(list(itertools.chain(stand_ins.fused_calls))) == 0
