"""A head that is stored in 4 bits is never whole, though models read its weight's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prodial_kernels import quantize_model
from prodial_kernels.models.layers.head import find_head
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.step.loss import ChunkedLoss, FullLoss
from support.models import build, token_ids


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "nemotron_h"])
def test_the_chunked_loss_makes_parts_of_it_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    quantize_model(model, "nf4", target_modules="all")
    head, whole = model.get_output_embeddings(), []
    dequantize = QuantizedLinear.dequantize

    def watched(
        layer: QuantizedLinear, out: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        if layer is head:
            whole.append(layer)
        return dequantize(layer, out, dtype=dtype)

    monkeypatch.setattr(QuantizedLinear, "dequantize", watched)
    ids = token_ids()
    loss = float(ChunkedLoss(find_head(model))(ids, ids).detach())
    assert whole == []
    # Where whole logits are wanted it is, and its weight has its values again.
    assert loss == pytest.approx(float(FullLoss(model)(ids, ids).detach()), rel=1e-5)
    assert torch.equal(head.weight, dequantize(head))
    assert all(layer is head for layer in whole)
