"""Loading a model tensor by tensor: what it becomes, what is never in memory, what is refused."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.training.random_weights import RandomWeights, random_quantized
from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.models.loading.load import ModelError, load_model
from prodial_kernels.quantization import (
    FORMATS,
    QuantizedLinear,
    TensorFiles,
    load_quantized,
)
from prodial_kernels.training.config import QUANTIZE
from support.models import build, token_ids

WIDTH, DEPTH, VOCABULARY = 128, 6, 50
CPU = torch.device("cpu")


class Mixer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.out_proj = nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.A_log = nn.Parameter(torch.rand(WIDTH, 4))
        self.A_log._no_weight_decay = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(self.in_proj(x).relu()) + self.A_log.sum(1)


class Model(nn.Module):
    """With a head that is tied to the embedding, as in mamba_ssm."""

    def __init__(self, bias: bool = True, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Mixer(bias) for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def empty(dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    with torch.device("meta"):
        return Model(**options).to(dtype)


def same(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(_bytes(found[name]), _bytes(tensor)), name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_as_quantising_the_whole_model(format: str, dtype: torch.dtype) -> None:
    dense = Model()
    tensors = {**dense.state_dict(), "old.buffer": torch.zeros(1)}
    model = empty(dtype).eval()
    report = load_quantized(model, tensors, format, device="cpu", ignore=[r"^old\."])
    expected = dense.to(dtype)
    assert report == quantize_model(expected, format)
    same(model, expected)
    assert model.head.weight is model.embedding.weight
    assert model.layers[0].A_log._no_weight_decay
    assert not any(module.training for module in model.modules())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), expected(ids))
    apply_prodial(model, ProdialConfig(r=2))
    model(ids).float().sum().backward()


def test_without_a_format_everything_is_dense() -> None:
    dense, model = Model(), empty()
    report = load_quantized(model, dense.state_dict(), device="cpu")
    same(model, dense)
    assert report.errors == {}
    assert "no format" in str(report)
    # What was loaded from does not have to stay.
    assert model.embedding.weight.data_ptr() != dense.embedding.weight.data_ptr()


class DenseBytes(TorchDispatchMode):
    """The most bytes of floating-point tensors of 16 and 32 bits that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize > 1:
                self.see(tensor)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta or storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("source", ["file", "random"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_dense_model_never_exists(format: str, source: str, tmp_path: Path) -> None:
    """Beside what stays: a layer's weight and temporaries of its size, however deep the model."""
    model = empty(bias=False)
    tensors: Mapping[str, Tensor] = RandomWeights(model, device="cpu")
    if source == "file":
        dense = Model(bias=False).state_dict()
        del dense["head.weight"]
        save_file(dense, tmp_path / "model.safetensors")
        tensors = TensorFiles(tmp_path)
    with DenseBytes() as seen:
        load_quantized(model, tensors, format, device="cpu")
    weight = 4 * 2 * WIDTH * WIDTH
    kept = sum(p.nbytes for p in model.parameters())
    scales = sum(b.nbytes for b in model.buffers() if b.is_floating_point() and b.itemsize > 1)
    most = 5 * weight
    assert weight < seen.peak - kept - scales < most
    assert 2 * DEPTH * weight > 2 * most


@pytest.mark.parametrize("shards", [False, True])
def test_files(shards: bool, tmp_path: Path) -> None:
    dense = Model(bias=False)
    tensors = {n: t.clone() for n, t in dense.state_dict().items() if n != "head.weight"}
    if shards:
        names = sorted(tensors)
        files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file)
        weights = {name: file for file, part in files.items() for name in part}
        index = json.dumps({"weight_map": weights})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    model = empty(bias=False)
    load_quantized(model, TensorFiles(tmp_path), "nf4", device="cpu")
    quantize_model(dense, "nf4")
    same(model, dense)
    (tmp_path / ("b.safetensors" if shards else "model.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors is missing|holds no weights"):
        TensorFiles(tmp_path)


def test_pytorch_files(tmp_path: Path) -> None:
    """As mamba-ssm's own checkpoints are."""
    dense, model = Model(), empty()
    torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    load_quantized(model, TensorFiles(tmp_path), "int8", device="cpu")
    quantize_model(dense, "int8")
    same(model, dense)


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_checkpoints(format: str, tmp_path: Path) -> None:
    """With bitsandbytes' and DeepSeek's keys; other layers are quantised beside them."""
    stored = Model()
    quantize_model(stored, format, target_modules=["in_proj"])
    entries = {n: t.clone() for n, t in stored.state_dict().items() if n != "head.weight"}
    if format == "nf4":
        suffixes = ("absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4")
        assert {f"layers.0.in_proj.weight.{suffix}" for suffix in suffixes} <= entries.keys()
    save_file(entries, tmp_path / "model.safetensors")
    model = empty()
    report = load_quantized(model, TensorFiles(tmp_path), device="cpu")
    same(model, stored)
    assert report.errors == {}
    assert report.bytes_after < report.bytes_before / 3
    model = empty()
    load_quantized(model, TensorFiles(tmp_path), "nf4", device="cpu", target_modules=["out_proj"])
    quantize_model(stored, "nf4", target_modules=["out_proj"])
    same(model, stored)


def test_refusals() -> None:
    tensors = dict(Model().state_dict())

    def load(changed: Mapping[str, Tensor], **options: Any) -> None:
        load_quantized(empty(), changed, **{"format": "nf4", "device": "cpu", **options})

    with pytest.raises(ValueError, match="format must be one of"):
        load(tensors, format="int4")
    with pytest.raises(ValueError, match="'x_proj' matches no module"):
        load(tensors, target_modules=["x_proj"])
    with pytest.raises(ValueError, match="does not know: stray"):
        load({**tensors, "stray": torch.zeros(1)})
    for name in ("layers.1.in_proj.weight", "layers.1.in_proj.bias", "layers.0.A_log", "steps"):
        with pytest.raises(ValueError, match=f"lacks {name}"):
            load({n: t for n, t in tensors.items() if n != name})
        with pytest.raises(ValueError, match=rf"{name} has shape \[3, 3\] in the checkpoint"):
            load({**tensors, name: torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"layers\.1\.in_proj: .*not finite"):
        load({**tensors, "layers.1.in_proj.weight": torch.full((2 * WIDTH, WIDTH), torch.inf)})
    stored = Model()
    quantize_model(stored, "nf4")
    entries = dict(stored.state_dict())
    absmax = entries.pop("layers.0.in_proj.weight.absmax")
    with pytest.raises(ValueError, match=r"layers\.0\.in_proj: .* lacks its entry weight\.absmax"):
        load(entries)
    entries["layers.0.in_proj.weight.absmax"] = absmax
    del entries["layers.0.in_proj.bias"]
    with pytest.raises(ValueError, match=r"bias=False.*, the model has Linear\(.*bias=True"):
        load(entries)
    with pytest.raises(ValueError, match="holds embedding quantised, which here is a Embedding"):
        load({**tensors, "embedding.SCB": torch.zeros(1)})


def test_buffers_that_no_checkpoint_holds() -> None:
    def with_buffer() -> Model:
        model = empty()
        model.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
        return model

    tensors = Model().state_dict()
    with pytest.raises(ValueError, match="the model computes table when it is built"):
        load_quantized(with_buffer(), tensors, device="cpu")
    model = with_buffer()
    load_quantized(model, tensors, device="cpu", fill=lambda: model.table.fill_(7))
    assert model.table.tolist() == [7, 7, 7]


def test_random_weights_are_drawn_on_the_device_and_train() -> None:
    model, other = (empty(torch.bfloat16) for _ in range(2))
    for each in (model, other):
        load_quantized(each, RandomWeights(each, device="cpu"), "nf4", device="cpu")
    same(model, other)
    apply_prodial(model, ProdialConfig(r=2))
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.isfinite().all()
    logits.float().square().sum().backward()
    assert len(RandomWeights(model, device="cpu")) == len(model.state_dict())


# --- Models of transformers. --------------------------------------------------------------------

LOADED = ("mamba", "mamba2", "falcon_mamba", "zamba2", "falcon_h1")


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    # These models have none.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("prodial_kernels.models.loading.load.check_tokenizer", lambda *_: None)


@pytest.mark.parametrize("family", LOADED)
def test_transformers_models_are_what_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path, max_shard_size="20KB")
    for dtype in (torch.float32, torch.bfloat16):
        expected = load_model(str(tmp_path), device=CPU, dtype=dtype).model
        loaded = load_model(str(tmp_path), device=CPU, dtype=dtype, quantize="nf4")
        assert loaded.quantization == quantize_model(expected, "nf4")
        same(loaded.model, expected)
        buffers = dict(loaded.model.named_buffers())
        assert all(torch.equal(buffers[n], b) for n, b in expected.named_buffers())
        assert loaded.model.generation_config.to_dict() == expected.generation_config.to_dict()
        tied = expected.get_input_embeddings().weight is expected.get_output_embeddings().weight
        inputs, outputs = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        assert (inputs.weight is outputs.weight) == tied
    ids = token_ids()
    assert torch.equal(loaded.model(ids).logits, expected(ids).logits)


def test_tensors_that_are_merged_in_an_unknown_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("jamba").save_pretrained(tmp_path)
    monkeypatch.setattr("prodial_kernels.models.loading.quantized._stacks_experts", lambda _: False)
    with pytest.raises(ModelError, match="merged with others when it is loaded"):
        load_model(str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4")


def test_four_bit_checkpoints_of_bitsandbytes(tmp_path: Path) -> None:
    """Recognised by their configuration, which then says nothing of it any more."""
    model = build("mamba")
    dense = copy.deepcopy(model)
    quantize_model(model, "nf4")
    entries = {n: t.clone().contiguous() for n, t in model.state_dict().items()}
    entries.pop("lm_head.weight", None)
    model.config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    model.config.save_pretrained(tmp_path)
    save_file(entries, tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path), device=CPU, dtype=torch.float32).model
    assert any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    assert not hasattr(loaded.config, "quantization_config")
    ids = token_ids()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, dense.eval()(ids).logits)


def test_random_models_of_a_configuration() -> None:
    model, report = random_quantized(build("falcon_h1").config, CPU, torch.float32, "fp8")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == len(report.errors)
    assert model(token_ids()).logits.isfinite().all()


def test_the_formats_of_the_command_line() -> None:
    assert set(QUANTIZE) == set(FORMATS)
