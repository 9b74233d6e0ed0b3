"""The benchmark of whole models, as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import mixers
from benchmarks.harness.task import line_of, message_of
from benchmarks.models import backbones, upstream, variants
from benchmarks.models.methods import METHOD_VARIANTS
from benchmarks.models.rows import ModelRow, shapes_of, write_rows
from prodial_kernels.linear import ProdialLinear
from support.mixers import mamba_ssm_stand_ins as stand_ins


def row(device: str = "NVIDIA H100", **changes: object) -> ModelRow:
    values = {
        "model": "mamba-130m", "batch": 4, "length": 512, "variant": "prodial", "status": "ok",
        "ms": 12.0, "mib": 1000.0, "time_ratio": 1.2, "memory_ratio": 1.05,
    }  # fmt: skip
    judged = ModelRow(**{**values, **changes})
    mixers.judge(judged, device)
    return judged


def test_a_row_is_judged_by_both_ratios() -> None:
    assert row().ok
    assert not row(time_ratio=1.26).ok
    assert not row(memory_ratio=1.11).ok
    assert not row("NVIDIA H200").ok
    assert row("NVIDIA H200", time_ratio=1.04).ok
    assert row(variant="lora", time_ratio=2.0).ok
    assert row(batch=2).must == ""
    method = {"batch": 8, "length": 2048, "variant": "additional-scan"}
    assert row(**method, memory_ratio=1.14).ok
    assert not row(**method, time_ratio=1.26).ok
    assert row(**{**method, "variant": "additional-scan-slow"}, time_ratio=2.0).ok
    assert "must 1.25x 1.10x  ok" in str(row())
    assert str(row(time_ratio=1.26)).endswith("MISSED")
    failed = row(status="failed: OutOfMemoryError: x", ms=None, mib=None)
    assert not failed.ok
    assert str(failed).endswith("OutOfMemoryError: x")
    assert row(status="unavailable: No module named 'mamba_ssm'").ok


def test_shapes() -> None:
    with_targets = mixers.cases_of(["mamba-1.4b"], None)
    assert [(case.batch, case.length) for case in with_targets] == [(4, 512), (4, 2048)]
    assert mixers.cases_of(["mamba-1.4b"], ["1x64"]) == [backbones.ModelCase("mamba-1.4b", 1, 64)]
    assert shapes_of(["1x64", "2x8"]) == [(1, 64), (2, 8)]


@pytest.mark.parametrize("variant", variants.VARIANTS)
@pytest.mark.parametrize("mixer", [stand_ins.Mamba, stand_ins.Mamba2])
def test_a_variant_is_undone(mixer: type, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "RANK", 2)
    model = stand_ins.Model(mixer).requires_grad_(False)
    before = {name: id(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    switches = [vars(m).get("use_fast_path", vars(m).get("use_mem_eff_path")) for m in
                model.modules()]  # fmt: skip
    # Undone also where what is measured fails.
    with pytest.raises(KeyError), variants.adapted(model, variant):  # noqa: PT012
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert bool(trained) == (variant != "frozen")
        adapters = [m for m in model.modules() if isinstance(m, ProdialLinear)]
        assert bool(adapters) == (variant not in ("frozen", "authors"))
        assert all((m.compute == "fp8") == (variant == variants.IN_FP8) for m in adapters)
        raise KeyError
    assert {name: id(module) for name, module in model.named_modules()} == before
    if variant == "frozen":
        assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert switches == [
        vars(m).get("use_fast_path", vars(m).get("use_mem_eff_path")) for m in model.modules()
    ]
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", METHOD_VARIANTS)
def test_a_list_of_methods_is_undone(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_ins.Model(stand_ins.Mamba, d_state=4).requires_grad_(False)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(KeyError), variants.adapted(model, variant):  # noqa: PT012
        assert any(p.requires_grad for p in model.parameters())
        slow = variant.endswith("-slow")
        assert all(layer.mixer.use_fast_path is not slow for layer in model.layers)
        raise KeyError
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("prodial" in name for name, _ in model.named_parameters())
    assert all(layer.mixer.use_fast_path for layer in model.layers)


@pytest.mark.parametrize(
    ("mixer", "switch"),
    [(stand_ins.Mamba, "use_fast_path"), (stand_ins.Mamba2, "use_mem_eff_path")],
)
def test_lora_today_leaves_the_fused_functions(
    mixer: type, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "RANK", 2)
    model = stand_ins.Model(mixer).requires_grad_(False)
    for variant, fused in (("lora-slow", False), ("authors", False), ("prodial", True)):
        with variants.adapted(model, variant):
            assert all(getattr(layer.mixer, switch) is fused for layer in model.layers), variant


def test_the_authors_weight_starts_at_the_pretrained_one() -> None:
    weight = torch.randn(32, 24)
    torch.testing.assert_close(variants.AuthorsWeight(weight)(weight), weight)


class Tuner:
    def __init__(self, count: int) -> None:
        self.configs = list(range(count))


def test_upstream_tunes_over_fewer_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners = [Tuner(11), Tuner(6), Tuner(2)]
    monkeypatch.setattr(upstream, "upstream_tuners", lambda: tuners)
    with pytest.raises(KeyError), upstream.one_configuration(7):  # noqa: PT012
        assert [tuner.configs for tuner in tuners] == [[7], [1], [1]]
        raise KeyError
    upstream.limit_configurations(0)
    assert [len(tuner.configs) for tuner in tuners] == [11, 6, 2]
    upstream.limit_configurations(3)
    assert [tuner.configs for tuner in tuners] == [[0, 5, 10], [0, 2, 5], [0, 1]]


def test_tuners_are_found_under_heuristics(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    @triton.autotune(configs=[triton.Config({}, num_warps=4)], key=["n"])
    @triton.heuristics({"EVEN": lambda args: True})
    @triton.jit
    def inside(n, EVEN: triton.language.constexpr):
        pass

    @triton.heuristics({"ODD": lambda args: True})
    @triton.autotune(configs=[triton.Config({}, num_warps=4)], key=["n"])
    @triton.jit
    def outside(n, ODD: triton.language.constexpr):
        pass

    module = types.ModuleType("mamba_ssm.ops.kernels")
    module.inside, module.outside, module.other = inside, outside, torch.nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert [id(tuner) for tuner in upstream.upstream_tuners()] == [id(inside), id(outside.fn)]


def test_the_plan() -> None:
    first, second = mixers.plan(backbones.BACKBONES, None, None, 0)
    models = [job for job in first if isinstance(job, backbones.ModelJob)]
    assert [str(job) for job in models] == [
        "mamba-130m 4×512: frozen, prodial, lora-slow, authors",
        "mamba-130m 8×2048: frozen, prodial, lora-slow",
        "mamba-1.4b 4×512: frozen, prodial, lora-slow",
        "mamba-1.4b 4×2048: frozen, prodial, lora-slow",
    ]
    assert len(first) - len(models) == 2 * mixers.CONFIGURATIONS
    assert [type(job) for job in second] == [backbones.ModelJob] * 4
    for job in (*first, *second):
        assert message_of(line_of(job)) == job
    (only,), none = mixers.plan(["mamba-130m"], ["1x64"], ["lora"], 0)
    assert (str(only), none) == ("mamba-130m 1×64: frozen, lora", [])


def test_results_are_written_as_they_come(tmp_path: Path) -> None:
    rows = [row(), row(variant="authors", status="failed: OutOfMemoryError: x", ms=None, mib=None)]
    write_rows(tmp_path / "new" / "mixers.json", {"device": "a GPU", "notes": []}, rows)
    written = json.loads((tmp_path / "new" / "mixers.json").read_text())
    assert [r["ok"] for r in written["rows"]] == [True, False]
    assert upstream.notes(0) == []
    assert "chose among 3" in upstream.notes(3)[0]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert mixers.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
