"""Files that no save has written end in an AdapterError, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels import load_adapter, save_adapter
from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE
from support.saved_adapters import Model, expect_refusal, rewrite, rewrite_tensors, trained

LAYER = "layers.0.in_proj"


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        *parents, last = path
        for parent in parents:
            header = header[parent]
        header[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(_set(key, value=value) for key in ("tensors", "base", "config")
          for value in (None, [], "x", 7, True)),
        *(_set("base", key, value=value) for key in ("layers", "tensors")
          for value in (None, [], "x", {})),
        *(_set("base", "layers", LAYER, value=value) for value in (None, [], "x", {})),
        *(_set("base", "layers", LAYER, "shape", value=value) for value in (None, 7, [], ["x"])),
        _set("base", "layers", LAYER, "samples", value=[]),
        *(_set("base", "tensors", f"{LAYER}.weight", value=value) for value in (None, [], "x", {})),
        *(_set("base", "tensors", f"{LAYER}.weight", key, value=value)
          for key in ("hash", "dtype", "shape") for value in (None, 7, [], "x")),
        *(_set("tensors", f"{LAYER}.prodial_a", value=value) for value in (None, {}, "x")),
        *(_set("base_model", value=value) for value in (7, {}, [], "", True, "a\x1b[31mb", "a\nb")),
        *(_set("package_version", value=value) for value in (7, {}, "\x1b]0;x\x07")),
        *(_set("config", "lora_alpha", value=value)
          for value in (float("nan"), float("inf"), 1e308, 10**400, "4", True)),
        *(_set("config", "n_blocks", value=value) for value in (True, {"in_proj": {}}, "4", 0, -4)),
        *(_set("config", "target_modules", value=value)
          for value in ("(a+)+b", "(", [], [1], {}, None)),
        *(_set("config", "r", value=value) for value in (4_000_000, 10**30, -1, "4", 4.0)),
    ],
)  # fmt: skip
def test_other_contents(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(directory, change)
    before = torch.get_rng_state()
    model = Model()
    torch.set_rng_state(before)
    expect_refusal(directory, "adapter", model)
    assert torch.equal(torch.get_rng_state(), before)
    expect_refusal(directory, "adapter", trained(seed=3))


def test_a_claimed_rank_is_compared_before_it_is_allocated(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(directory, _set("config", "r", value=4_000_000))
    monkeypatch.setattr("prodial_kernels.checkpoint.adapter.apply_prodial", None)
    expect_refusal(directory, r"prodial_a must have shape \[4000000, 12\], got \[4, 12\]", Model())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["a", "b", "blocks", "scale"])
def test_values_that_no_training_leaves(directory: Path, part: str, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.prodial_{part}"].view(-1)[-1] = value

    rewrite_tensors(directory, change)
    expect_refusal(directory, rf"{LAYER}\.prodial_{part} holds NaN or inf")
    with pytest.raises(AdapterError, match="holds NaN or inf"):
        read_adapter(directory)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8])
def test_dtypes_that_are_not_trained(directory: Path, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.prodial_a"] = tensors[f"{LAYER}.prodial_a"].to(dtype)

    rewrite_tensors(directory, change)
    expect_refusal(directory, "prodial_a must have dtype torch.float32 or narrower")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_encodings(directory: Path, encoding: str) -> None:
    path = directory / CONFIG_FILE
    path.write_bytes(path.read_text().encode(encoding))
    expect_refusal(directory, "is not valid JSON")


def test_deep_nesting(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"[" * 100_000)
    expect_refusal(directory, "is not valid JSON")
    # A save over it is not stopped by it.
    save_adapter(trained(), directory)
    load_adapter(Model(), directory)


def test_a_name_that_is_not_printable_is_not_written(directory: Path) -> None:
    with pytest.raises(AdapterError, match="base_model must be a name in printable letters"):
        save_adapter(trained(), directory, base_model="a\x1b[2Jb")
    model = trained()
    # Of the model itself, nobody chose it; and a run's end is no time to refuse.
    model.name_or_path = "a\x1b[2Jb"
    save_adapter(model, directory)
    assert read_adapter(directory).base_model is None
