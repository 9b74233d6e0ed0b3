"""Files that are missing, damaged, changed or another program's are refused, and why is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prodial_kernels import save_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files
from support.saved_adapters import expect_refusal, rewrite, rewrite_tensors, trained


def test_missing_directory_and_files(directory: Path, tmp_path: Path) -> None:
    expect_refusal(tmp_path / "nowhere", "nowhere: no such directory")
    (tmp_path / "empty").mkdir()
    expect_refusal(tmp_path / "empty", "adapter_config.json is missing")
    (directory / TENSOR_FILE).unlink()
    expect_refusal(directory, r"adapter_model\.safetensors is missing, but adapter_config")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_tensors(directory: Path, keep: int) -> None:
    path = directory / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:keep])
    expect_refusal(directory, r"adapter_model\.safetensors is damaged .*its SHA-256 is not")


def test_tampered_tensors(directory: Path) -> None:
    path = directory / TENSOR_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    expect_refusal(directory, "its SHA-256 is not")


def test_tensors_of_another_adapter(directory: Path, tmp_path: Path) -> None:
    save_adapter(trained(seed=2), tmp_path / "other")
    (directory / TENSOR_FILE).write_bytes((tmp_path / "other" / TENSOR_FILE).read_bytes())
    expect_refusal(directory, "belongs to another adapter_config.json")


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
def test_truncated_configuration(directory: Path, keep: int) -> None:
    path = directory / CONFIG_FILE
    path.write_bytes(path.read_bytes()[:keep])
    expect_refusal(directory, "adapter_config.json is not valid JSON")


def test_configuration_that_is_not_utf8(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"\xff\xfe\x00{")
    expect_refusal(directory, "adapter_config.json is not valid JSON")


def test_hand_edited_configuration(directory: Path) -> None:
    path = directory / CONFIG_FILE
    path.write_text(path.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 8.0'))
    expect_refusal(directory, "was changed after it was saved")


def test_configuration_of_another_program(directory: Path) -> None:
    path = directory / CONFIG_FILE
    path.write_text('{"peft_type": "LORA", "r": 8}')
    expect_refusal(directory, "no format_version: it is PEFT's, for 'LORA'")
    path.write_text("[1, 2]")
    expect_refusal(directory, "no format_version: it is not ProDiaL's")


@pytest.mark.parametrize("version", [0, 4, "1", True, 1.0, None])
def test_unknown_format_version(directory: Path, version: object) -> None:
    path = directory / CONFIG_FILE
    content = {**json.loads(path.read_text()), "format_version": version}
    path.write_text(json.dumps({**content, "package_version": "9.9"}))
    expect_refusal(directory, f"format_version={version!r}, written by prodial-kernels '9.9'")


def test_missing_and_unknown_fields(directory: Path) -> None:
    rewrite(directory, lambda header: header.pop("base"))
    expect_refusal(directory, r"KeyError: 'base'")


def test_unknown_configuration_option(directory: Path) -> None:
    rewrite(directory, lambda header: header["config"].update(colour="blue"))
    expect_refusal(directory, r"unknown configuration keys \['colour'\]")


def test_tensor_list_that_does_not_match_the_file(directory: Path) -> None:
    rewrite(directory, lambda header: header["tensors"].pop("head.0.bias"))
    expect_refusal(directory, "holds 'head.0.bias' as .* lists it as missing")


def test_payload_that_is_no_safetensors(directory: Path) -> None:
    header, _ = read_files(directory)
    write_files(directory, header, b"not tensors at all")
    expect_refusal(directory, "SafetensorError")


def test_missing_and_extra_keys(directory: Path) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update(stranger=tensors.pop(name)))
    expect_refusal(directory, rf"missing \['{name}'\], not in the model \['stranger'\]")


def test_wrong_shape(directory: Path) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update({name: torch.ones(47)}))
    expect_refusal(directory, rf"{name} must have shape \[48\], got \[47\]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_wrong_dtype(directory: Path, dtype: torch.dtype) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update({name: torch.ones(48, dtype=dtype)}))
    expect_refusal(directory, rf"{name} must have dtype torch.float32 or narrower, got {dtype}")
