"""The benchmark of whole models, as far as it goes without a GPU."""

from __future__ import annotations

import mamba_ssm_stand_ins as stand_ins
import pytest
import torch

from benchmarks import mixers
from prodial_kernels.linear import ProdialLinear


def row(**changes: object) -> mixers.Row:
    values = {
        "model": "mamba-130m", "batch": 4, "length": 512, "variant": "prodial", "ms": 12.0,
        "mib": 1000.0, "time_ratio": 1.2, "memory_ratio": 1.05,
    }  # fmt: skip
    return mixers.Row(**{**values, **changes})


def test_a_row_is_judged_by_both_ratios() -> None:
    assert row().ok
    assert not row(time_ratio=1.26).ok
    assert not row(memory_ratio=1.11).ok
    assert row(variant="lora", time_ratio=2.0).ok
    assert row(batch=2).must is None
    assert "must 1.25x 1.10x  ok" in str(row())
    assert str(row(time_ratio=1.26)).endswith("MISSED")


def test_shapes() -> None:
    assert mixers.shapes_of("mamba-1.4b", None) == [(4, 512), (4, 2048)]
    assert mixers.shapes_of("mamba-1.4b", ["1x64"]) == [(1, 64)]


@pytest.mark.parametrize("variant", mixers.VARIANTS)
@pytest.mark.parametrize("mixer", [stand_ins.Mamba, stand_ins.Mamba2])
def test_a_variant_is_undone(mixer: type, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "RANK", 2)
    model = stand_ins.Model(mixer).requires_grad_(False)
    before = {name: id(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with mixers.adapted(model, variant):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert bool(trained) == (variant != "frozen")
        adapters = [m for m in model.modules() if isinstance(m, ProdialLinear)]
        assert bool(adapters) == (variant in ("prodial", "recompute", "lora"))
    assert {name: id(module) for name, module in model.named_modules()} == before
    if variant == "frozen":
        assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(p.requires_grad for p in model.parameters())


def test_the_authors_weight_starts_at_the_pretrained_one() -> None:
    weight = torch.randn(32, 24)
    torch.testing.assert_close(mixers.AuthorsWeight(weight)(weight), weight)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert mixers.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
