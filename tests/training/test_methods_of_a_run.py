"""Runs with one of the methods, or several: asked for, resumed, written, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels import PartialTuning, ProdialConfig
from prodial_kernels.cli import commands, options
from prodial_kernels.models.adapt.inject import get_prodial_config
from prodial_kernels.training import Callback, FinetuneConfig
from prodial_kernels.training.adapted import load_adapted, merge_to_directory
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.config_file import read_config_file
from prodial_kernels.training.inspecting import inspect_adapter
from prodial_kernels.training.run.metrics import read_metrics
from support.tiny_run import run

LIST: list[dict[str, Any]] = [
    {"name": "prodial", "r": 2, "target_modules": ["in_proj"]},
    {"name": "partial-tuning", "parts": ["conv1d", "D"], "decay": 10},
    {"name": "lora", "targets": ["out_proj", "embed"], "r": 3},
]
SHORT: dict[str, Any] = {"steps": 4, "eval_every": 0, "save_every": 2}


def test_several_methods_by_a_file(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "methods:\n  - {name: prodial, r: 2, target_modules: [in_proj]}\n"
        "  - {name: partial-tuning, parts: [conv1d, D], decay: 10}\n"
        "  - {name: lora, targets: [out_proj, embed], r: 3}\n"
    )
    result = run(place, tmp_path / "run", **SHORT, **read_config_file(file))
    assert (result.method, result.rank) == ("combined", None)
    names = ["prodial", "partial-tuning", "lora"]
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    for methods in (result.methods, record["methods"]):
        assert [each["name"] for each in methods] == names
        assert methods[1]["parts"] == ["conv1d", "D"]
    text = "ProDiaL r=2 target_modules=in_proj; partial-tuning decay=10 parts=conv1d,D; LoRA "
    assert text + "targets=out_proj,embed r=3" in str(result)
    assert result.model_dir is not None
    # What was written is what was trained, read back by every command.
    adapted = load_adapted(None, result.adapter_dir, device="cpu")
    assert [m.name for m in get_prodial_config(adapted.model).methods] == names[1:]
    tokens = torch.arange(1, 30)[None]
    merged = load_adapted(str(result.model_dir), device="cpu")
    with torch.no_grad():
        ours, theirs = (m.model(tokens).logits for m in (adapted, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert inspect_adapter(str(result.adapter_dir)).trainable == result.trainable
    merge_to_directory(None, result.adapter_dir or "", tmp_path / "merged", device="cpu")
    # Nothing is left to be done, and another list is another run.
    again = {**SHORT, "resume": True}
    assert run(place, tmp_path / "run", **again, methods=LIST).after == result.after
    with pytest.raises(RuntimeError, match="because these differ: method"):
        run(place, tmp_path / "run", **again, methods=LIST[:2])


class Stopping(Callback):
    def on_step(self, run: Any, record: Any) -> None:
        if record.position.step == 3:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(place: Path, tmp_path: Path) -> None:
    whole = run(place, tmp_path / "whole", **SHORT, methods=LIST)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "run", **SHORT, methods=LIST, callbacks=[Stopping()])
    resumed = run(place, tmp_path / "run", **SHORT, methods=LIST, resume=True)
    assert resumed.after == whole.after
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]
    # Another run begins with what it trained, and needs to be told nothing.
    further = run(place, tmp_path / "further", **SHORT, init_adapter=str(tmp_path / "run"))
    assert further.methods == resumed.methods
    assert further.before["loss"] == pytest.approx(resumed.after["loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="has methods of its own, and r would contradict them"):
        run(place, tmp_path / "no", **SHORT, init_adapter=str(tmp_path / "run"), r=4)


def test_what_cannot_be_merged_is_kept_as_an_adapter(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "run", **SHORT, method="parallel-adapter")
    assert (result.method, result.model_dir) == ("parallel-adapter", None)
    assert result.agreement.relative == 0
    assert not (tmp_path / "run" / "merged").exists()
    assert "adapter = trained" in str(result)
    assert "none: not every method can be" in str(result)
    assert (
        run(place, tmp_path / "run", **SHORT, method="parallel-adapter", resume=True).model_dir
        is None
    )
    adapted = load_adapted(None, result.adapter_dir, device="cpu").model
    assert [m.name for m in get_prodial_config(adapted).methods] == ["parallel-adapter"]
    with pytest.raises(ValueError, match="parallel-adapter cannot be merged"):
        merge_to_directory(None, result.adapter_dir or "", tmp_path / "merged", device="cpu")


def test_a_method_that_does_not_fit_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"additional-scan: .*Use partial-tuning or LoRA there"):
        run(place, tmp_path / "run", **SHORT, method="additional-scan")
    assert not (tmp_path / "run").exists()


def test_words_of_the_command_line() -> None:
    assert options.chosen_methods(["lora"]) == {"method": "lora"}
    assert options.chosen_methods(["additional-scan"]) == {"method": "additional-scan"}
    words = "prodial r=4 train_scale=false affix-tuning tokens=2 mlp=true partial-lora rows=X,Z"
    assert options.chosen_methods(words.split()) == {
        "methods": [
            {"name": "prodial", "r": 4, "train_scale": False},
            {"name": "affix-tuning", "tokens": 2, "mlp": True},
            {"name": "partial-lora", "rows": ["X", "Z"]},
        ]
    }
    found = options.chosen_methods(["bitfit", "lr=0.5", "decay=1e1"])
    assert FinetuneConfig(**found).methods == ({"name": "bitfit", "decay": 10.0, "lr": 0.5},)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("additional-scam", "did you mean 'additional-scan'?"),
        ("additional-scan sates=6", "did you mean 'states'?"),
        ("additional-scan states=x", "states=x: expected a whole number such as 8, got 'x'"),
        ("additional-scan states=0", "states must be >= 1, got 0"),
        ("affix-tuning mlp=maybe", "mlp=maybe: expected true or false, got 'maybe'"),
        ("states=6", "'states=6' is an option of no method: name one before it"),
        ("prodial prodial r=2", "at most one ProdialConfig"),
        ("full bitfit", "'full'"),
        ("bitfit --r 8", "--r would have no effect beside --method"),
        ("bitfit --preset arc-easy", "--preset would have no effect beside --method"),
        ("combined", "stands for a list"),
    ],
)
def test_wrong_words(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["finetune", "--method", *words.split()]) == 1
    assert message in capsys.readouterr().err


def test_a_list_in_python() -> None:
    given = [ProdialConfig(r=2), PartialTuning("D", decay=10.0)]
    config = FinetuneConfig(methods=given)  # type: ignore[arg-type]
    assert config.method == "combined"
    assert config.adapter() == ProdialConfig.of(given)
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    one = FinetuneConfig(method="affix-tuning")
    assert one == FinetuneConfig(methods=({"name": "affix-tuning"},))
    for wrong, message in (
        ({"method": "bitfit", "methods": [{"name": "lora"}]}, "give one of the two"),
        ({"methods": "bitfit"}, "methods must be a list of methods"),
        ({"methods": [{"name": "bitfit", "sates": 1}]}, "an option of the method 'bitfit'"),
        ({"methods": [{"name": "prodial", "impl": "torch"}]}, "impl is of the whole run"),
        ({"methods": []}, "methods must hold at least one"),
    ):
        with pytest.raises(ConfigError, match=message):
            FinetuneConfig(**wrong)
