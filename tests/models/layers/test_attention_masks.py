"""Attention masks of transformers' hybrids: none reads a value on the host."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels.models.layers.attention_masks import masks_without_waiting
from prodial_kernels.models.layers.head import run_model
from support.models import build, token_ids

# granitemoehybrid hands its masks no positions.
HYBRIDS = ("bamba", "falcon_h1", "jamba", "nemotron_h", "zamba", "zamba2")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
         "mamba_n_heads": 4, "mamba_d_head": 8}  # fmt: skip


class _Reads(TorchDispatchMode):
    """Notes the files of transformers from which a value is read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = [f.filename for f in traceback.extract_stack() if "transformers" in f.filename]
            self.files.add(frames[-1].replace("\\", "/").rpartition("/")[2])
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param).eval()


def positions() -> Tensor:
    """Two documents in each row."""
    return torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(2, -1)


@torch.no_grad()
def test_no_value_is_read(model: nn.Module) -> None:
    ids = token_ids()
    with _Reads() as upstream:
        expected = model(input_ids=ids, use_cache=False).logits
    assert "masking_utils.py" in upstream.files, "transformers does not look any more: drop this"
    with _Reads() as ours:
        logits = run_model(model, ids).logits
    assert "masking_utils.py" not in ours.files
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_documents_are_kept_apart_as_upstream_does(model: nn.Module) -> None:
    ids = token_ids()
    expected = model(input_ids=ids, position_ids=positions(), use_cache=False).logits
    with _Reads() as ours:
        logits = run_model(model, ids, position_ids=positions()).logits
    assert "masking_utils.py" not in ours.files
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    alone = run_model(model, ids).logits
    assert not torch.equal(alone, logits)


def test_no_mask_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the eager step; transformers makes one as soon as it sees a capture."""
    from transformers import BambaConfig, masking_utils

    config = BambaConfig(**SIZES, attn_implementation="sdpa")
    # By place: the fourth, the cache, has had several names.
    given: Any = (config, torch.zeros(2, 7, 16), None, None, torch.arange(7)[None])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    with masks_without_waiting({}):
        assert masking_utils.create_causal_mask(*given) is None
    assert (masking_utils.find_packed_sequence_indices, masking_utils.is_tracing) == before


@torch.no_grad()
def test_a_mask_is_left_to_transformers(model: nn.Module) -> None:
    ids, mask = token_ids(), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = run_model(model, ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
