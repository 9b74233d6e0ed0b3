"""``prodial inspect MODEL``: what targets would do, from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from prodial_kernels import ProdialConfig, apply_prodial, save_adapter
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.cli.commands import main
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.inspecting import inspect_model
from support.models import build


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model, and no weights."""
    path = tmp_path_factory.mktemp("model")
    build("bamba").config.save_pretrained(path)
    return path


def test_targets_for_both_methods(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place), "--r", "2", "--target-modules", "out_proj", "q_proj"]) == 0
    printed = capsys.readouterr().out
    assert "dead when fused  BambaMixer hands out_proj.weight to its fused kernel" in printed
    assert "model.layers.*.mamba.out_proj ×2" in printed
    assert "adapters on 3 of 18 linear layers" in printed


def test_what_our_adapter_refuses_is_said(place: Path) -> None:
    inspection = inspect_model(str(place), {"target_modules": ("x_proj", "q_proj")})
    assert inspection.report is None
    assert "['x_proj'] matches nothing" in str(inspection.refused)
    (checked,) = inspection.checked
    assert [f.status for f in checked.diagnosis.findings] == ["adapted", "absent"]


def test_placements_are_checked_as_the_layers_that_they_mean(place: Path) -> None:
    inspection = inspect_model(str(place), {"target_modules": ("attention",), "r": 2})
    assert inspection.checked[0].targets == "q_proj k_proj v_proj o_proj"
    assert inspection.report is not None
    assert inspection.report.adapted[0] == 4


def test_published_lists(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place), "--list", "llamafactory", "--json"]) == 0
    (checked,) = json.loads(capsys.readouterr().out)["checked"]
    dead = [f["module"] for f in checked["diagnosis"]["findings"] if "dead" in f["status"]]
    assert dead == ["model.layers.*.mamba.out_proj"]
    assert len(inspect_model(str(place), {}, lists=("all",)).checked) == 2
    none = inspect_model(str(place), {}, lists=("peft",))
    assert (none.report, none.checked, none.unlisted) == (None, [], ["peft"])
    assert "no list of  peft" in str(none)
    with pytest.raises(ConfigError, match=r"'trl', 'unsloth'.*did you mean 'unsloth'"):
        inspect_model(str(place), {}, lists=("unslot",))


def test_targets_of_an_adapter(place: Path, tmp_path: Path) -> None:
    lora = get_peft_model(build("bamba"), LoraConfig(r=2, target_modules=["out_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    (checked,) = inspect_model(str(place), {}, adapter=tmp_path / "lora").checked
    assert [f.status for f in checked.diagnosis.findings] == ["dead when fused"]
    own = build("bamba")
    apply_prodial(own, ProdialConfig(r=2))
    save_adapter(own, tmp_path / "own")
    (checked,) = inspect_model(str(place), {}, adapter=tmp_path / "own").checked
    assert [f.status for f in checked.diagnosis.findings] == ["adapted", "adapted"]
    with pytest.raises(AdapterError, match="holds no adapter whose targets can be read"):
        inspect_model(str(place), {}, adapter=tmp_path)


def test_widths_that_cost_are_named(tmp_path: Path) -> None:
    import transformers

    transformers.Mamba2Config(
        hidden_size=416, num_heads=13, head_dim=64, n_groups=1, state_size=16,
        num_hidden_layers=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    inspection = inspect_model(str(tmp_path), {})
    width = 2 * 832 + 2 * 16 + 13
    assert [note for note in inspection.notes if f"a width of {width} is no multiple of 8" in note]
    assert "up to 7.6 times" in str(inspection)
