"""Methods beside ProDiaL: start, gradients, decoding, files, merging, undoing; also together."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    AdditionalScan,
    BitFit,
    Full,
    LinearProbe,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    ProdialConfig,
    adapter_disabled,
    adapter_parameter_groups,
    add_adapter,
    apply_methods,
    apply_prodial,
    load_adapter,
    merge_prodial,
    plan,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.models.adapt.inject import get_prodial_config
from prodial_kernels.training.step.optimizers import make_optimizer, set_learning_rate
from support.mixers import cuda_stand_ins
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Model, inference_params
from support.mixers.method_oracle import Oracle, move
from support.models import build, decoded, token_ids

LISTS: dict[str, list[Any]] = {
    "lora": [Lora(("in_proj", "out_proj", "x_proj", "dt_proj", "embed"), r=2, alpha=3)],
    "lora-x": [Lora(("x_proj",), r=3)],
    "partial-lora": [PartialLora(("X", "Z", "d", "B", "C"), r=2, alpha=3)],
    "partial-lora-x": [PartialLora(("X",), r=2)],
    "parallel-adapter": [ParallelAdapter(r=5, scale=0.5)],
    "partial-tuning": [PartialTuning(("A_log", "D", "dt_bias", "conv1d", "conv1d_bias"))],
    "additional-scan": [AdditionalScan(2)],
    "additional-scan-prefix": [AdditionalScan(3, "prefix", "s4d")],
    "bitfit": [BitFit()],
    "together": [
        ProdialConfig(r=2, lora_alpha=3, block_size={"in_proj": 4, "out_proj": 2}),
        Lora(("in_proj", "x_proj"), r=3),
        PartialLora(("X", "C"), r=2),
        AdditionalScan(2, "prefix", decay=3.0),
        PartialTuning(("A_log", "conv1d"), decay=10.0, lr=2.0),
        ParallelAdapter(r=2),
    ],
}
# What trains behind the first layer's scan alone needs no backward of that scan.
SCANS = {"parallel-adapter": 1}


def transformers_model(methods: list[Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    model = build("mamba", time_step_rank=3).to(dtype)
    apply_methods(model, methods)
    return model


def loss_of(model: nn.Module) -> Tensor:
    ids = token_ids()
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def weighted(model: nn.Module) -> Tensor:
    logits: Tensor = model(token_ids() % 11)
    return (
        logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    ).sum()


def gradients(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(result, list(named.values()))
    plain = [name.replace("base_layer.", "") for name in named]
    return {"result": result.detach(), **dict(zip(plain, found, strict=True))}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.count_nonzero(), f"{name} has a zero gradient"
        # A, D and the step's bias go through fp32, upstream too.
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "block"])
@pytest.mark.parametrize("name", LISTS)
def test_every_gradient_in_transformers(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers_model(LISTS[name])
    move(model)
    expected = Oracle(build("mamba", time_step_rank=3), model, LISTS[name]).run(loss_of)
    if fused:
        cuda_stand_ins.install(monkeypatch)
    assert_equal(gradients(model, loss_of(model)), expected)
    if fused:
        assert cuda_stand_ins.calls["scan_bwd"] == SCANS.get(name, 2)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("name", LISTS)
def test_every_gradient_in_mamba_ssm(name: str) -> None:
    methods = LISTS[name]
    model = Model(Mamba, bias=True).double()
    apply_methods(model, methods)
    move(model)
    expected = Oracle(Model(Mamba, bias=True), model, methods).run(weighted)
    assert_equal(gradients(model, weighted(model)), expected)
    assert cuda_stand_ins.calls["scan_bwd"] == SCANS.get(name, 2)


@pytest.mark.parametrize("name", LISTS)
def test_starts_as_the_pretrained_model_with_a_gradient(name: str) -> None:
    plain, model = build("mamba", time_step_rank=3).double(), transformers_model(LISTS[name])
    torch.testing.assert_close(loss_of(model), loss_of(plain), rtol=0, atol=1e-12)
    loss_of(model).backward()
    groups: dict[str, list[bool]] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            owner = path.rpartition(".")[0]
            groups.setdefault(owner, []).append(bool(parameter.grad.count_nonzero()))
    for owner, alive in groups.items():
        # New columns of A have none before C has moved.
        if not owner.endswith(".mixer") or "scan" not in name:
            assert any(alive), f"nothing in {owner} would ever move"


@pytest.mark.parametrize("name", LISTS)
def test_decoding_token_by_token_agrees(name: str) -> None:
    model = transformers_model(LISTS[name]).eval()
    move(model)
    with torch.no_grad():
        whole = model(input_ids=token_ids()).logits
        torch.testing.assert_close(decoded(model, token_ids()), whole)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("name", ["additional-scan", "together"])
def test_mamba_ssm_steps_with_more_states(name: str) -> None:
    model = Model(Mamba, bias=True).double()
    apply_methods(model, LISTS[name])
    move(model)
    ids = token_ids() % 11
    with torch.no_grad():
        whole = model.eval()(ids)
        params = inference_params()
        parts = [model(ids[:, :3], inference_params=params)]
        for position in range(3, ids.shape[1]):
            params.seqlen_offset = position
            parts.append(model(ids[:, position : position + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", LISTS)
def test_saved_loaded_switched_off_copied_and_removed(name: str, tmp_path: Path) -> None:
    plain = build("mamba", time_step_rank=3)
    before = copy.deepcopy(plain.state_dict())
    model = copy.deepcopy(plain)
    report = apply_methods(model, LISTS[name])
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    move(model)
    moved = loss_of(model.eval())
    save_adapter(model, tmp_path)
    other = copy.deepcopy(plain).eval()
    load_adapter(other, tmp_path)
    assert torch.equal(loss_of(other), moved)
    assert get_prodial_config(other) == get_prodial_config(model)
    load_adapter(other, tmp_path)  # fills the one that is there
    with adapter_disabled(model):
        torch.testing.assert_close(loss_of(model), loss_of(plain.eval()), rtol=0, atol=0)
    assert torch.equal(loss_of(model), moved)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(again), moved)
    remove_prodial(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {k: v for k, v in vars(model.backbone.layers[0].mixer).items() if k[:1] != "_"} == {
        k: v for k, v in vars(plain.backbone.layers[0].mixer).items() if k[:1] != "_"
    }


@pytest.mark.parametrize("name", [n for n in LISTS if n not in ("parallel-adapter", "together")])
def test_merged_into_a_plain_model_that_loads(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = transformers_model(LISTS[name]).eval()
    move(model)
    moved = loss_of(model)
    merge_prodial(model)
    torch.testing.assert_close(loss_of(model), moved)
    assert not any("prodial" in n for n in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loss_of(loaded), moved)


def test_pretrained_states_never_see_the_new_ones() -> None:
    """Whatever the new states are, the output changes by their own term alone."""
    methods = [AdditionalScan(2)]
    model = transformers_model(methods).eval()
    move(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scan_C"):
                parameter.zero_()
    plain = build("mamba", time_step_rank=3).double().eval()
    torch.testing.assert_close(loss_of(model), loss_of(plain), rtol=0, atol=1e-12)


def test_groups_have_their_multipliers() -> None:
    model = transformers_model(LISTS["together"])
    with pytest.raises(ValueError, match=r"multiplies the learning rate by 2: give lr"):
        adapter_parameter_groups(model, weight_decay=0.1)
    groups = adapter_parameter_groups(model, weight_decay=0.1, lr=0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    by_kind = {
        (round(group["weight_decay"], 6), group.get("lr_scale", 1.0)): {
            names[id(p)].rpartition("prodial_")[2] for p in group["params"]
        }
        for group in groups
    }
    assert by_kind[1.0, 2.0] == {"offset_A_log", "offset_weight"}
    assert by_kind[0.3, 1.0] == {"added_scan_A_log", "added_scan_B", "added_scan_C"}
    assert by_kind[0.0, 1.0] == {"scale"}
    assert sum(len(group["params"]) for group in groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    assert [group.get("lr") for group in groups if "lr_scale" in group] == [0.02]
    optimizer = make_optimizer("adamw", groups, lr=0.01, device=torch.device("cpu"))
    set_learning_rate(optimizer, 0.5)
    rates = {round(group["weight_decay"], 6): group["lr"] for group in optimizer.param_groups}
    assert rates == {0.1: 0.5, 0.0: 0.5, 0.3: 0.5, 1.0: 1.0}


def test_narrow_models_train_in_fp32() -> None:
    model = build("mamba", time_step_rank=3).bfloat16()
    apply_methods(model, LISTS["together"])
    model.to(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    loss_of(model).backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("method", [Full(), LinearProbe()], ids=["full", "linear-probe"])
def test_baselines_train_the_model_itself(method: Any, tmp_path: Path) -> None:
    model = build("mamba", time_step_rank=3)
    apply_methods(model, [method])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    every = {n for n, _ in model.named_parameters()}
    # The tied head is the embedding.
    assert trained == (every if method.name == "full" else {"backbone.embeddings.weight"})
    move(model)
    loss_of(model).backward()
    save_adapter(model, tmp_path)
    other = build("mamba", time_step_rank=3)
    load_adapter(other, tmp_path)
    assert torch.equal(loss_of(other), loss_of(model))
    assert trained == {n for n, p in other.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "methods", "message"),
    [
        ("mamba2", [AdditionalScan(2)], r"no Mamba-1 mixer"),
        ("falcon_mamba", [AdditionalScan(2)], r"norms B and C over all states"),
        ("mamba", [AdditionalScan(5)], r"choose at most 4"),
        ("mamba2", [Lora(("x_proj",))], r"no mixer of this model has a layer 'x_proj'"),
        ("mamba", [Lora(("x_proj",), dropout=0.1)], r"a weight cannot express dropout"),
        ("mamba", [Lora(("in_porj",))], r"matches nothing"),
        ("mamba", [Lora(("in_proj",)), Lora(("in_proj",), r=2)], r"train the same tensor"),
        ("mamba", [PartialTuning(("cls_token",))], r"take it out of parts"),
        (
            "mamba",
            [ProdialConfig(target_modules=("in_proj", "x_proj")), Lora(("x_proj",))],
            r"a ProDiaL adapter",
        ),
        (
            "mamba",
            [ProdialConfig(target_modules=("in_proj", "x_proj")), AdditionalScan(2)],
            r"a ProDiaL adapter",
        ),
        (
            "mamba",
            [ProdialConfig(train_ssm=("D",)), PartialTuning(("D",))],
            r"in train_ssm='D' and in a method",
        ),
        (
            "mamba",
            [ProdialConfig(lora_dropout=0.1), Lora(("in_proj",))],
            r"another low-rank term has another one",
        ),
    ],
)
def test_refused_with_the_model_unchanged(family: str, methods: list[Any], message: str) -> None:
    model = build(family)
    before = [(type(m), set(vars(m))) for m in model.modules()]
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        apply_methods(model, methods)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert [n for n, _ in model.named_parameters()] == names


def test_what_else_is_refused(tmp_path: Path) -> None:
    model = transformers_model([ParallelAdapter()])
    with pytest.raises(ValueError, match=r"parallel-adapter cannot be merged"):
        merge_prodial(model)
    with pytest.raises(ValueError, match=r"has methods=\['parallel-adapter'\]"):
        add_adapter(model, "second", ProdialConfig())
    with pytest.raises(ValueError, match=r"use save_adapter"):
        model.save_pretrained(tmp_path / "whole")
    save_adapter(model, tmp_path / "one")
    other = transformers_model([ParallelAdapter(r=3)])
    with pytest.raises(AdapterError, match=r"another configuration"):
        load_adapter(other, tmp_path / "one")


@pytest.mark.parametrize("family", ["mamba2", "bamba", "jamba", "zamba2"])
def test_mamba_2_and_hybrids_train_what_makes_sense(family: str) -> None:
    methods: list[Any] = [
        Lora(("in_proj", "out_proj"), r=2), PartialTuning(("A_log", "D", "dt_bias", "conv1d")),
        ParallelAdapter(r=2),
    ]  # fmt: skip
    if family == "mamba2":
        methods.append(PartialLora(("X", "Z", "d", "B", "C"), r=2))
    plain, model = build(family), build(family)
    apply_methods(model, methods)
    torch.testing.assert_close(loss_of(model), loss_of(plain), rtol=1e-5, atol=1e-6)
    move(model)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.count_nonzero(), name


@pytest.mark.usefixtures("stand_in_kernels")
def test_mamba_2_of_mamba_ssm() -> None:
    methods: list[Any] = [PartialLora(("X", "d"), r=2), ParallelAdapter(r=2)]
    model = Model(Mamba2).double()
    apply_methods(model, methods)
    move(model)
    loss = weighted(model)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained)
    for layer in model.layers:
        layer.mixer.use_mem_eff_path = False
    torch.testing.assert_close(weighted(model), loss)


def test_the_memory_plan_counts_what_methods_train() -> None:
    from prodial_kernels.training.memory.shapes import describe_model

    config = ProdialConfig.of(LISTS["together"])
    plain, model = build("mamba", time_step_rank=3), build("mamba", time_step_rank=3)
    apply_prodial(model, config)
    made = plan(plain.config, adapter=config, batch_size=2, seq_len=16, dtype=torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    lines = {line.what: line.bytes for line in made.plan.peak.rows}
    assert lines["adapter"] == sum(p.nbytes for p in trained)
    assert lines["optimiser"] == 2 * lines["adapter"]
    again = plan(model, batch_size=2, seq_len=16)
    assert {line.what: line.bytes for line in again.plan.peak.rows} == lines
    shape = describe_model(model, kernels=True).layers[0]
    # Two LoRA terms and the adapter's own on in_proj; more states in the scan.
    assert (shape.rank, shape.state, shape.dt_rank, shape.trains_a) == (2 + 3 + 2, 6, 3, True)
    assert describe_model(plain, kernels=True).layers[0].state == 4


def test_merging_keeps_what_is_no_weight(tmp_path: Path) -> None:
    model = transformers_model(LISTS["together"]).eval()
    move(model)
    moved = loss_of(model)
    merge_prodial(model, keep=True)
    torch.testing.assert_close(loss_of(model), moved)
    assert get_prodial_config(model).listed() == [ParallelAdapter(r=2)]
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "prodial_added_parallel_a", "prodial_added_parallel_b"
    }  # fmt: skip
    save_adapter(model, tmp_path)
    merged = copy.deepcopy(model)
    remove_prodial(merged)
    load_adapter(merged, tmp_path)
    assert torch.equal(loss_of(merged), loss_of(model))
    assert merged.config.state_size == 6


def test_what_people_read_names_the_methods(tmp_path: Path) -> None:
    from prodial_kernels.training.inspecting import inspect_adapter

    model = transformers_model([Lora(("in_proj", "x_proj"), r=2), AdditionalScan(2, decay=3.0)])
    save_adapter(model, tmp_path)
    page = str(inspect_adapter(tmp_path))
    assert "lora (targets=in_proj x_proj, r=2, alpha=2.0)" in page
    assert "additional-scan (decay=3.0, states=2)" in page
    assert "backbone.layers.1.mixer.x_proj.scan_C" in page
    card = (tmp_path / "README.md").read_text()
    assert "additional-scan (decay=3.0, states=2)" in card
    assert "lora_alpha" not in card
