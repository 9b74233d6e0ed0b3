"""Adapters in two processes of somebody's own loop: the gradients of one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

# Other sums of the same numbers in fp32: a few units in the last place, 6e-8, in the norm.
ROUNDING = 4e-7


@pytest.mark.parametrize("case", ["ddp", "accelerate", "fsdp"])
def test_every_adapter_gradient(outcomes, case: str) -> None:
    """DDP, accelerate's, and FSDP2 with the adapter divided like the rest."""
    for process in outcomes[case]:
        differences = process["returned"]
        assert len(differences) == 16
        assert max(differences.values()) <= ROUNDING, differences


@pytest.mark.parametrize("adapter", ["divided", "kept"])
def test_a_divided_model_on_disk(outcomes, place: Path, adapter: str) -> None:
    """Saved by all processes together, whether FSDP2 divides the adapter or it is kept whole."""
    for process in outcomes["fsdp_on_disk"]:
        assert process["returned"][f"{adapter} there"]
        assert process["returned"][adapter]
    saved, plain = (
        load_file(place / name / "adapter_model.safetensors") for name in (adapter, "plain0")
    )
    assert saved.keys() == plain.keys()
    assert all(saved[name].equal(plain[name]) for name in saved)
    described = [(place / name / "adapter_config.json").read_text() for name in (adapter, "plain0")]
    assert described[0] == described[1]


def test_what_cannot_be_done_with_a_divided_model_says_how(outcomes) -> None:
    for process in outcomes["fsdp_on_disk"]:
        said = process["returned"]
        assert "cannot be merged; call save_adapter in every process" in said["merge"]
        for call in ("apply", "load"):
            assert "call apply_prodial or load_adapter first, then fully_shard" in said[call]


def test_deepspeed(outcomes, place: Path) -> None:
    """ZeRO 1 to 3; without the library, ``tests/checkpoint`` holds what is refused."""
    pytest.importorskip("deepspeed")
    for process in outcomes["zero"]:
        said = process["returned"]
        for stage in (1, 2, 3):
            assert max(said[f"gradients {stage}"].values()) <= ROUNDING, stage
        assert said["kept 1"]
        assert said["kept 2"]
        assert "enter deepspeed.zero.GatheredParameters" in said["save"]
        assert "loaded before deepspeed.initialize" in said["load"]
    first, *others = (
        load_file(place / f"zero{stage}" / "adapter_model.safetensors") for stage in (1, 2, 3)
    )
    assert all(first[name].equal(other[name]) for other in others for name in first)
