"""A whole frozen model in 4 or 8 bits: every family, loaded, trained on, saved and merged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    quantize_model,
)
from prodial_kernels.checkpoint import AdapterError, load_adapter, read_adapter, save_adapter
from prodial_kernels.models.loading.load import ModelError, load_model
from prodial_kernels.quantization import FORMATS, QuantizedLinear
from prodial_kernels.quantization.model import make_dense
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.modules.selection import select_everything
from support.mixers.adapted_families import EffectiveWeight, assert_alive_and_equal
from support.models import (
    FAMILIES,
    Step,
    build,
    decoded,
    randomise_adapters,
    token_ids,
    training_step,
)


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    # These models have none.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("prodial_kernels.models.loading.load.check_tokenizer", lambda *_: None)


CPU = torch.device("cpu")
MIXTURES = ("granitemoehybrid", "jamba", "nemotron_h")
# Layers beside the projectors, of those that a family has.
MORE = ("q_proj", "o_proj", "up_proj", "down_proj", "gate_proj", "input_linear", "output_linear")
NEVER = ("router", "gate", "norm", "conv1d", "A_log", "dt_bias", "x_proj", "dt_proj", ".D")


def stored(name: str, format: str = "nf4", **options: Any) -> nn.Module:
    model = build(name, **options)
    quantize_model(model, format, target_modules="all")
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with plain layers, which hold what the stored weights stand for."""
    twin = copy.deepcopy(model)
    make_dense(twin)
    return twin


def adapter_for(model: nn.Module) -> ProdialConfig:
    """On both projectors and on attention and MLP where they are linear layers."""
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    }
    targets = "|".join(("in_proj", "out_proj", *(name for name in MORE if name in names)))
    # Not the weights of a mixture's experts, which have such names too.
    pattern = rf"(?!.*\.experts\.).*\.({targets})"
    return ProdialConfig(r=2, lora_alpha=4, target_modules=pattern, allow_partial=True)


def oracle(adapted: nn.Module, dense: nn.Module, ids: Tensor) -> Step:
    """The step on plain layers whose weights are computed from the dequantised ones."""
    dense = dense.requires_grad_(False)
    for path, layer in adapted.named_modules():
        if isinstance(layer, ProdialLinear):
            parametrize.register_parametrization(
                dense.get_submodule(path), "weight", EffectiveWeight(layer)
            )
    step = training_step(dense, ids)
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return Step(step.logits, renamed)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_and_gradients_are_those_of_the_dequantised_model(name: str) -> None:
    model, ids = stored(name), token_ids()
    dense = dense_twin(model)
    assert not any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in dense.modules())
    apply_prodial(model, adapter_for(model))
    randomise_adapters(model)
    assert_alive_and_equal(training_step(model, ids), oracle(model, dense, ids))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_in_every_format(name: str, format: str) -> None:
    model, ids = stored(name, format), token_ids()
    expected = dense_twin(model)
    torch.testing.assert_close(
        decoded(model, ids), decoded(expected, ids), rtol=1e-4, atol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_stored_and_what_is_not(name: str) -> None:
    model = build(name)
    before = sum(p.nbytes for p in model.parameters())
    report = quantize_model(model, "nf4", target_modules="all")
    left = {path: p for path, p in model.named_parameters() if p.ndim > 1}
    # Zamba's own per-head matrices of the recurrence are no linear layers.
    assert all(any(part in path for part in NEVER) for path in left)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    after = sum(p.nbytes for p in model.parameters())
    assert report.bytes_before == before - after
    assert report.bytes_before == sum(kind.bytes_before for kind in report.kinds.values())
    expected = {"projectors"} | ({"experts"} if name in MIXTURES else set())
    assert expected <= report.kinds.keys()
    for kind, own in report.kinds.items():
        assert own.error is not None
        # NF4 of normal numbers.
        assert 0.05 < own.error.relative_rms < 0.13, kind
        assert f"  {kind}: {own.layers} layers" in str(report)


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_as_quantised_in_memory(name: str, tmp_path: Path) -> None:
    """From the files that transformers writes, where experts are one by one."""
    build(name).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = load_model(str(tmp_path), device=CPU, dtype=torch.float32).model
    report = quantize_model(expected, "nf4", target_modules="all")
    loaded = load_model(
        str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4", quantize_modules="all"
    )
    found = loaded.quantization
    assert found is not None
    assert found.errors == report.errors
    assert (found.bytes_before, found.bytes_after) == (report.bytes_before, report.bytes_after)
    assert found.kinds == report.kinds
    own, wanted = loaded.model.state_dict(), expected.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], wanted[key]) for key in own)
    assert torch.equal(loaded.model(token_ids()).logits, expected(token_ids()).logits)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_stay_dense_where_only_projectors_are_stored(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    expected = load_model(str(tmp_path), device=CPU, dtype=torch.float32).model
    quantize_model(expected, "nf4")
    loaded = load_model(str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4").model
    own, wanted = loaded.state_dict(), expected.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], wanted[key]) for key in own)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build("nemotron_h").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if ".experts.1.up_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, file, metadata={"format": "pt"})
    for modules in ("projectors", "all"):
        with pytest.raises(ModelError, match=r"the checkpoint lacks .*experts.up_proj\[1\]"):
            load_model(
                str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4",
                quantize_modules=modules,
            )  # fmt: skip


def test_what_is_trained_stays_dense(tmp_path: Path) -> None:
    build("nemotron_h").save_pretrained(tmp_path)
    loaded = load_model(
        str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4", quantize_modules="all",
        keep_dense=("lm_head", "A_log"),
    ).model  # fmt: skip
    assert type(loaded.get_output_embeddings()) is nn.Linear
    assert isinstance(loaded.get_input_embeddings(), QuantizedEmbedding)
    apply_prodial(loaded, ProdialConfig(r=2, modules_to_save=("lm_head",)))
    step = training_step(loaded, token_ids())
    assert step.gradients["lm_head.weight"] is not None


def test_a_tied_weight_that_is_trained_keeps_both_dense() -> None:
    model = build("mamba")
    quantize_model(model, "nf4", target_modules="all", exclude=("lm_head",))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_tied_weights_are_stored_once() -> None:
    model = stored("mamba")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.tied
    assert embedding.table is head
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 2 * 2 + 1
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings().table is twin.get_output_embeddings()
    cast = twin.to(torch.bfloat16)
    assert cast.get_input_embeddings()(token_ids()).dtype == torch.bfloat16
    # An adapter on the head is not in the embedding.
    apply_prodial(model, ProdialConfig(r=2, target_modules=("lm_head",)))
    randomise_adapters(model)
    assert torch.equal(
        model.get_input_embeddings()(token_ids()), twin.float().get_input_embeddings()(token_ids())
    )


@pytest.mark.parametrize("name", ["mamba", "zamba2", *MIXTURES])
def test_saved_models_are_dense_and_the_same(name: str, tmp_path: Path) -> None:
    model, ids = stored(name).eval(), token_ids()
    expected = dense_twin(model)(ids).logits
    model.save_pretrained(tmp_path / "stored")
    loaded = load_model_at(tmp_path / "stored")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-6)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == getattr(build(name).config, "tie_word_embeddings", False)
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    adapted = model.eval()(ids).logits
    merge_prodial(model)
    torch.testing.assert_close(model.eval()(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    again = load_model_at(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def load_model_at(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_an_adapter_belongs_to_what_is_stored(tmp_path: Path) -> None:
    model, ids = stored("nemotron_h"), token_ids()
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    expected = model.eval()(ids).logits
    save_adapter(model, tmp_path)
    names = read_adapter(tmp_path).base_stored
    assert {"lm_head.weight", "model.embeddings.weight"} <= set(names)
    assert any(name.endswith("experts.up_proj") for name in names)
    again = stored("nemotron_h")
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(ids).logits, expected)
    # What is not adapted counts too: it was trained beside other weights.
    other = build("nemotron_h")
    quantize_model(other, "nf4")
    with pytest.raises(AdapterError, match=r"trained on other weights.*--quantize-modules all"):
        load_adapter(other, tmp_path)
    apply_prodial(other, ProdialConfig(r=2))
    save_adapter(other, tmp_path / "less")
    with pytest.raises(AdapterError, match=r"here it is stored.*--quantize-modules projectors"):
        load_adapter(stored("nemotron_h"), tmp_path / "less")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"exclude": ("lm_heads",), "target_modules": "all"}, "exclude 'lm_heads' matches no"),
        ({"exclude": ("lm_head",)}, "for target_modules='all' alone"),
    ],
)
def test_refusals(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        quantize_model(build("mamba"), "nf4", **options)


def test_layers_with_hooks_are_not_replaced() -> None:
    model = build("mamba")
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm_head has hooks"):
        select_everything(model)


def test_only_experts_with_tokens_are_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored("nemotron_h", n_routed_experts=8, num_experts_per_tok=1)
    seen: list[Sequence[int]] = []
    original = QuantizedStack.unpack_some

    def watched(self: QuantizedStack, ids: Tensor, known: list[int], out: Tensor) -> Tensor:
        assert ids.tolist() == known
        assert len(known) == len(out) == 1
        seen.append(known)
        return original(self, ids, known, out)

    monkeypatch.setattr(QuantizedStack, "unpack_some", watched)
    monkeypatch.setattr("prodial_kernels.quantization.modules.routing.GROUP_BYTES", 1)
    routed: list[Tensor] = []
    experts = next(m for m in model.modules() if isinstance(m, QuantizedExperts))
    handle = experts.register_forward_pre_hook(lambda _, args: routed.append(args[1]))
    model(input_ids=token_ids(1, 3), use_cache=False)
    handle.remove()
    chosen = sorted(set(routed[0].flatten().tolist()))
    assert len(chosen) < 8
    # Up and down, each expert by itself.
    assert seen == [[expert] for expert in chosen] * 2
