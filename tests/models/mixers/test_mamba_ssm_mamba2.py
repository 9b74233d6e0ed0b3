"""What only Mamba-2's mixers have: packed and flattened tokens, no norm, an inner MLP, versions."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_mamba_ssm import adapted, assert_right, token_ids
from support.mixers.mamba_ssm_stand_ins import Mamba2, Mamba2Simple

pytestmark = pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")


@pytest.mark.parametrize("mixer", [Mamba2, Mamba2Simple])
def test_mamba2_sequences_side_by_side(mixer: type[nn.Module]) -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2]]).expand(2, -1).int().contiguous()
    model = adapted(mixer)
    assert_right(model, token_ids(), seq_idx=seq_idx)
    logits = model(token_ids(), seq_idx=seq_idx)
    torch.testing.assert_close(logits[:, 3:5], model(token_ids()[:, 3:5]))


def test_mamba2_flattened_tokens() -> None:
    mixer = adapted(Mamba2).layers[0].mixer
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.flatten(0, 1), seqlen=7), mixer(x).flatten(0, 1))
    torch.testing.assert_close(mixer(x.flatten(0, 1), 7), mixer(x).flatten(0, 1))


def test_mamba2_without_a_norm() -> None:
    assert_right(adapted(Mamba2, rmsnorm=False), token_ids())
    assert len(stand_ins.fused_calls) == 2


def test_mamba2_with_a_gated_mlp_inside_takes_the_unfused_kernels() -> None:
    assert_right(adapted(Mamba2, d_ssm=8), token_ids())
    assert not stand_ins.fused_calls


def test_mamba2_of_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = stand_ins.MambaSplitConv1dScanCombinedFn
    forward = rule.forward

    @functools.wraps(forward)
    def keeps_one_more(ctx: Any, *arguments: Any) -> Tensor:
        y = forward(ctx, *arguments)
        ctx.save_for_backward(*ctx.saved_tensors, None)
        return y

    monkeypatch.setattr(rule, "forward", staticmethod(keeps_one_more))
    with pytest.raises(RuntimeError, match=r"keeps other tensors than that of mamba_ssm 2\.3"):
        adapted(Mamba2)(token_ids())
