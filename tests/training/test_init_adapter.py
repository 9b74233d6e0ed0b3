"""``init_adapter``: a run that begins with a saved adapter and has its settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.cli import commands
from prodial_kernels.training import Callback, FinetuneResult
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.run.directory import RunError
from prodial_kernels.training.start.initial_adapter import with_settings_of_adapter
from support.tiny_model import write_tiny_model
from support.tiny_run import run

OPTIONS: dict[str, Any] = {"steps": 4, "eval_every": 0, "save_every": 2, "warmup": 0}


@pytest.fixture(scope="module")
def first(place: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    return run(
        place, tmp_path_factory.mktemp("first") / "run", **OPTIONS, r=3, n_blocks=4, diagonal="free"
    )


def tensors(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return read_adapter(result.adapter_dir or "").tensors


def test_a_run_goes_on_where_the_adapter_is(
    place: Path, tmp_path: Path, first: FinetuneResult
) -> None:
    second = run(place, tmp_path / "second", **OPTIONS, init_adapter=str(first.output))
    assert second.before["bits_per_byte"] == pytest.approx(first.after["bits_per_byte"], rel=1e-6)
    assert second.after["bits_per_byte"] < second.before["bits_per_byte"]
    saved = read_adapter(second.adapter_dir or "")
    assert saved.config == read_adapter(first.adapter_dir or "").config
    assert (saved.config.r, saved.config.n_blocks, saved.config.diagonal) == (3, 4, "free")
    # With a learning rate that changes next to nothing it is the adapter.
    still = run(place, tmp_path / "still", **OPTIONS, lr=1e-30, init_adapter=str(first.adapter_dir))
    for name, tensor in tensors(still).items():
        torch.testing.assert_close(tensor, tensors(first)[name], rtol=0, atol=1e-20)


class _Fails(Callback):
    def on_step(self, run: Any, record: Any) -> None:
        if record.position.step == 3:
            raise RuntimeError("enough")


def test_it_is_resumed_bit_for_bit_with_the_same_adapter_alone(
    place: Path, tmp_path: Path, first: FinetuneResult
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(first.adapter_dir or "", adapter)
    options = {**OPTIONS, "init_adapter": str(adapter)}
    undisturbed = run(place, tmp_path / "a", **options)
    with pytest.raises(RuntimeError, match="enough"):
        run(place, tmp_path / "b", **options, callbacks=[_Fails()])
    shutil.rmtree(adapter)
    shutil.copytree(undisturbed.adapter_dir or "", adapter)
    with pytest.raises(RunError, match=r"init_adapter \(its contents have changed\)"):
        run(place, tmp_path / "b", **options, resume=True)
    shutil.rmtree(adapter)
    with pytest.raises(AdapterError):
        run(place, tmp_path / "b", **options, resume=True)
    shutil.copytree(first.adapter_dir or "", adapter)
    resumed = run(place, tmp_path / "b", **options, resume=True)
    assert resumed.after == undisturbed.after
    assert all(torch.equal(tensors(resumed)[n], t) for n, t in tensors(undisturbed).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, r"contradict them: r 4 \(the adapter: 3\)"),
        ({"block_size": 8}, r"block_size 8 \(the adapter: None\)"),
        ({"preset": "arc-easy"}, r"with preset 'arc-easy', contradict them: .*diagonal 'relu'"),
        ({"method": "lora"}, "method 'lora' contradicts init_adapter"),
        ({"method": "full"}, "leave out init_adapter"),
        ({"quantize": "nf4"}, "quantize 'nf4' contradicts init_adapter, .* on dense weights"),
    ],
)
def test_options_that_contradict_it_are_refused(
    place: Path, first: FinetuneResult, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings_of_adapter(
            FinetuneConfig(
                model=str(place / "model"), init_adapter=str(first.adapter_dir), **options
            )
        )


def test_options_that_agree_with_it_are_not(place: Path, first: FinetuneResult) -> None:
    config = FinetuneConfig(init_adapter=str(first.output), r=3, n_blocks=4, quantize="auto")
    settled = with_settings_of_adapter(config)
    # Its model, too, and it can be said once more.
    assert settled.model == str(place / "model")
    assert settled.quantize is None
    assert with_settings_of_adapter(settled.resolved()) == settled.resolved()


def test_a_pure_lora_stays_one(place: Path, tmp_path: Path) -> None:
    lora = run(place, tmp_path / "lora", **OPTIONS, method="lora", r=2)
    settled = with_settings_of_adapter(FinetuneConfig(init_adapter=str(lora.output)))
    assert (settled.method, settled.r) == ("lora", 2)


def test_an_adapter_of_another_model_is_refused(
    place: Path, tmp_path: Path, first: FinetuneResult
) -> None:
    from transformers import Mamba2ForCausalLM

    write_tiny_model(tmp_path / "other")
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="in_proj"):
        run(
            place, tmp_path / "run", **OPTIONS, model=str(tmp_path / "other"),
            init_adapter=str(first.output),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_command_line_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--init-adapter", str(tmp_path), "--output", str(tmp_path / "run")]
    assert commands.main(arguments) == 1
    assert "--init-adapter" in capsys.readouterr().err
