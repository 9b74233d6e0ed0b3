"""Runs on objects instead of names: a loaded model, its tokenizer, rows in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.checkpoint import read_adapter
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.loading.load import LoadedModel
from prodial_kernels.training import Callback, FinetuneConfig, FinetuneResult, RunView, finetune
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.evaluating import assess, evaluation_data
from prodial_kernels.training.run.directory import RunError
from support.tiny_model import byte_tokenizer, tiny_mamba2
from support.tiny_run import run

OPTIONS: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "seq_len": 32, "warmup": 0, "lr": 0.01, "eval_every": 2,
    "save_every": 2, "device": "cpu",
}  # fmt: skip


def texts(place: Path) -> list[str]:
    return (place / "text.txt").read_text().split("\n\n")


def trained(output: Path, data: Any, *, resume: bool = False, **given: Any) -> FinetuneResult:
    config = FinetuneConfig(output=str(output), **{**OPTIONS, **given.pop("options", {})})
    objects = {"model": tiny_mamba2(), "tokenizer": byte_tokenizer(), **given}
    return finetune(config, data=data, progress=False, resume=resume, **objects)


def test_objects_give_what_names_give(place: Path, tmp_path: Path) -> None:
    named = run(place, tmp_path / "named", **OPTIONS)
    model = tiny_mamba2()
    found = trained(tmp_path / "objects", texts(place), model=model)
    for metrics in ("before", "after"):
        assert getattr(found, metrics) == getattr(named, metrics)
    adapters = [read_adapter(result.adapter_dir or "").tensors for result in (named, found)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    # It can be used on, and is what was written.
    assert not adapted_layers(model)
    written = (tmp_path / "named" / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "objects" / "merged" / "model.safetensors").read_bytes() == written
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written


class _Fails(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, record: Any) -> None:
        if record.position.step == self._step:
            raise RuntimeError("enough")


def test_a_run_on_objects_is_resumed_with_the_same(place: Path, tmp_path: Path) -> None:
    undisturbed = trained(tmp_path / "a", texts(place))
    model = tiny_mamba2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="enough"):
        trained(tmp_path / "b", texts(place), model=model, callbacks=[_Fails(3)])
    # The pretrained model again.
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RunError, match=r"data \(its contents have changed\)"):
        trained(tmp_path / "b", texts(place)[1:], model=model, resume=True)
    with pytest.raises(DataError, match=r"given its rows in Python; .*data=rows, resume=True"):
        trained(tmp_path / "b", None, options={"data": "rows given in Python"}, resume=True)
    resumed = trained(tmp_path / "b", texts(place), model=model, resume=True)
    assert resumed.after == undisturbed.after
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_data_set_with_splits_of_chats(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def chats(first: int, n: int) -> Any:
        return datasets.Dataset.from_list(
            [
                {"messages": [{"role": "user", "content": f"What is {i} + 1?"},
                              {"role": "assistant", "content": f"It is {i + 1}."}]}
                for i in range(first, first + n)
            ]
        )  # fmt: skip

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    splits = datasets.DatasetDict({"train": chats(0, 24), "test": chats(100, 6)})
    result = trained(tmp_path / "run", splits, tokenizer=tokenizer, options={"seq_len": 64})
    assert result.data["train"] == 24
    assert result.data["held_out"] == 6
    assert "of the splits train, test: train to train on, test held out" in result.data["notes"]
    assert result.after["n_documents"] == 6


def test_rows_in_memory_are_evaluated_on(place: Path) -> None:
    tiny = LoadedModel("tiny", tiny_mamba2().eval(), byte_tokenizer())
    assessed = [
        assess(tiny, evaluation_data(data), progress=False)
        for data in (texts(place), str(place / "text.txt"))
    ]
    assert assessed[0].metrics == assessed[1].metrics
    assert assessed[0].data == "rows given in Python (all)"


def test_dtype_and_format_of_the_model_are_its_own(place: Path, tmp_path: Path) -> None:
    in_16_bits = tiny_mamba2().bfloat16()
    result = trained(tmp_path / "bf16", texts(place), model=in_16_bits)
    assert in_16_bits.dtype == torch.bfloat16
    assert result.after["loss"] < result.before["loss"]
    packed = tiny_mamba2()
    quantize_model(packed, "int8")
    result = trained(tmp_path / "int8", texts(place), model=packed)
    assert read_adapter(result.adapter_dir or "").base_format == "int8"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": "one row"}, "a single row goes into a list"),
        ({}, "data must be a list of rows"),
        (5, "data must be .*, got int"),
        ([5], r"data\[0\]: expected a JSON object with named values, got int"),
        ([{"txt": "a"}], r"data\[0\]: unknown keys \(txt\)"),
        ([], "rows given in Python: empty"),
        (["a b", {"prompt": "a", "completion": "b"}], r"data\[1\]: this row follows the schema"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trained(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_data_frame_is_no_list_of_its_columns(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a b", "c d", "e f"]})
    with pytest.raises(DataError, match=r"give its rows: \.to_dict\('records'\)"):
        trained(tmp_path / "run", frame)


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ({"tokenizer": None}, {}, "model is handed in without its tokenizer"),
        ({"model": torch.nn.Linear(2, 2)}, {}, "of transformers, got a Linear"),
        ({}, {"model": "other"}, "model is 'other' in the configuration, and handed in beside it"),
        ({"held_out": "a.txt"}, {}, r"rows; .* configuration: FinetuneConfig\(held_out='a.txt'\)"),
        ({}, {"data": "notes.txt"}, "data is 'notes.txt' in the configuration, and handed in"),
        ({}, {"quantize": "nf4"}, r"prodial_kernels\.quantize_model\(model, 'nf4'\)"),
    ],
)
def test_what_is_named_and_handed_in_is_refused(
    tmp_path: Path, objects: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "run", ["a b", "c d"], **objects, options=options)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    adapted = tiny_mamba2()
    apply_prodial(adapted, ProdialConfig(r=2))
    for model, message in ((adapted, "carries an adapter"), (tiny_mamba2().half(), r"\.float\(\)")):
        with pytest.raises(ConfigError, match=message):
            trained(tmp_path / "run", ["a b", "c d"], model=model)


def test_a_dictionary_is_no_configuration() -> None:
    given: Any = {"model": "embedded"}
    with pytest.raises(TypeError, match=r"must be a FinetuneConfig, got dict; .*from_dict"):
        finetune(given)
