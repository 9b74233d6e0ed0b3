"""The search over launch configurations, the table it writes, and how the table is read."""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from benchmarks import tune
from prodial_kernels.kernels.choices import tuned
from prodial_kernels.kernels.choices.tuned_table import TABLE
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls


@dataclass(frozen=True)
class Inner:
    warps: int = 4


@dataclass(frozen=True)
class Config:
    block: int = 64
    flat: bool = False
    inner: Inner = Inner()


def test_descent_finds_the_best_of_each_field_and_skips_what_fails() -> None:
    tried: list[Mapping[str, object]] = []

    def evaluate(candidates: Sequence[Mapping[str, object]]) -> list[float | None]:
        tried.extend(candidates)
        times: list[float | None] = []
        for changes in candidates:
            block, warps = changes.get("block", 64), changes.get("inner.warps", 4)
            # 256 would be fastest, and does not run.
            time = {32: 1.2, 64: 1.0, 128: 0.8, 256: None}[block]
            times.append(None if time is None else time * {4: 1.0, 8: 0.9}[warps])
        return times

    values = {"block": (32, 64, 128, 256), "inner.warps": (4, 8)}
    found = tune.descend(values, evaluate, {"block": 64, "inner.warps": 4})
    assert found == {"block": 128, "inner.warps": 8}
    assert {"block": 64} not in tried


def test_descent_returns_nothing_for_nothing() -> None:
    values = {"block": (32, 64)}
    assert tune.descend(values, lambda c: [0.995] * len(c), {"block": 64}, passes=1) == {}
    assert tune.descend(values, lambda c: [0.98] * len(c), {"block": 64}, passes=1) == {"block": 32}


def test_descent_ends_when_the_time_is_over() -> None:
    def evaluate(candidates: Sequence[Mapping[str, object]]) -> list[float | None]:
        raise AssertionError("nothing is evaluated")

    assert tune.descend({"block": (32, 64)}, evaluate, {"block": 64}, until=0.0) == {}


def test_a_changed_choice_is_not_overruled_by_a_recorded_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("caller_with_tapes")
    module.choose = lambda: Config()
    module.tuned = tuned.tuned
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for known in (recorded_calls._tapes, recorded_calls._met):
        monkeypatch.setitem(known, "a call", None)
    with tune.chosen("choose", {}, caller=module.__name__):
        assert "a call" not in recorded_calls._tapes
        assert "a call" not in recorded_calls._met
        recorded_calls._tapes["a call"] = None
    assert "a call" not in recorded_calls._tapes


def test_every_sweep_names_a_chooser_and_its_fields() -> None:
    for sweep in tune.SWEEPS:
        returns = get_type_hints(getattr(passes, sweep.chooser))["return"]
        for name, values in sweep.values.items():
            kind = returns
            for part in name.split("."):
                kind = get_type_hints(kind)[part]
            assert all(type(value) is kind for value in values), name


def test_a_chooser_is_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("caller_of_choosers")
    module.choose = lambda m: Config(block=m)
    module.tuned = tuned.tuned
    original = module.choose
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with tune.chosen("choose", {"inner.warps": 8}, caller=module.__name__) as returned:
        assert module.choose(32) == Config(32, False, Inner(8))
        assert module.tuned(Config(), None) == Config(), "the table has no say in a search"
    assert module.tuned is tuned.tuned
    assert returned == [Config(32, False, Inner(8))]
    assert module.choose is original
    with (
        pytest.raises(ValueError, match="has no choose_nothing"),
        tune.chosen("choose_nothing", {}, caller=module.__name__),
    ):
        pass


def test_the_written_table_reads_back(tmp_path: Path) -> None:
    entries = {
        tuned.key_of("backward", "sm_90x132", 2048, 3072, 768, 16, "bfloat16"): {
            "gemm.block_m": 64, "companion": True,
        },
        tuned.key_of("backward", "sm_90x132", 512, 3072, 768, 16, "bfloat16"): {"companion": False},
    }  # fmt: skip
    path = tmp_path / "table.py"
    path.write_text(tune.table_text(entries))
    assert runpy.run_path(str(path))["TABLE"] == entries
    path.write_text(tune.table_text({}))
    assert runpy.run_path(str(path))["TABLE"] == {}


def test_an_entry_changes_what_it_names_and_nothing_else() -> None:
    key = tuned.key_of("k", tuned.device_family((9, 0), 132), 2000, 8, 4, 16, "bfloat16")
    assert key == ("k", "sm_90x132", 2048, 8, 4, 16, "bfloat16")
    table = {key: {"inner.warps": 8, "flat": True}}
    assert tuned.tuned(Config(), key, table) == Config(64, True, Inner(8))
    other = tuned.key_of("k", "sm_80x108", 2000, 8, 4, 16, "bfloat16")
    default = Config()
    assert tuned.tuned(default, other, table) is default
    with pytest.raises(ValueError, match="Config has no field 'colour'"):
        tuned.with_fields(default, {"colour": 1})
    with pytest.raises(ValueError, match="int has no field 'warps'"):
        tuned.with_fields(default, {"block.warps": 1})


@pytest.mark.parametrize(
    ("m", "bucket"), [(0, 256), (256, 256), (362, 256), (363, 512), (2048, 2048), (65536, 65536)]
)
def test_buckets(m: int, bucket: int) -> None:
    assert tuned.token_bucket(m) == bucket


def test_the_table_fits_the_configurations() -> None:
    assert all(len(key) == 7 and entry for key, entry in TABLE.items())


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if tune.torch.cuda.is_available():
        pytest.skip("there is a device")
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
