"""Which stream is the side stream."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prodial_kernels.kernels.replay import streams


def test_it_is_never_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands out its streams in turn: one that a caller makes may be the side stream."""
    handed_out = iter((3, 3, 4, 5))
    current = 3
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda _: SimpleNamespace(cuda_stream=next(handed_out))
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    monkeypatch.setattr(streams, "current_handle", lambda _: current)
    monkeypatch.setattr(streams, "_threads", SimpleNamespace())
    device = torch.device("cuda", 0)
    assert streams.side_stream(device).handle == 4
    current = 4
    assert streams.side_stream(device).handle == 3
    assert next(handed_out) == 5, "what there is already is used again"
    current = 0
    assert streams.side_stream(device) is streams.side_stream(device)
