"""mamba_ssm's mixers, adapted: every path against plain linears with W' as their weight."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import cuda_stand_ins
import mamba_ssm_stand_ins as stand_ins
import pytest
import torch
from mamba_ssm_stand_ins import Mamba, Mamba2, Mamba2Simple, Model, inference_params
from models import randomise_adapters
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.ops.reference import effective_weight
from prodial_kernels.testing import assert_all_accurate

MIXERS = (Mamba, Mamba2, Mamba2Simple)
BLOCKS = {"in_proj": 4, "out_proj": 2}
CONFIG = ProdialConfig(r=3, lora_alpha=6, block_size=BLOCKS)
EVERY = ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "x_proj", "dt_proj"))
PARTIAL = ("A_log", "D", "conv1d", "dt_proj.bias", "x_proj", "norm.weight", "dt_bias")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    stand_ins.fused_calls.clear()


@pytest.fixture(autouse=True)
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this file may form W'."""

    def read(layer: ProdialLinear) -> Tensor:
        raise AssertionError("ProdialLinear.weight was read")

    monkeypatch.setattr(ProdialLinear, "weight", property(read))


class EffectiveWeight(nn.Module):
    """W -> W', with an adapter of its own."""

    def __init__(self, layer: ProdialLinear) -> None:
        super().__init__()
        for name, parameter in layer.adapter_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().double()))
        self.lora_scaling, self.diagonal = layer.lora_scaling, layer.diagonal

    def forward(self, weight: Tensor) -> Tensor:
        return effective_weight(
            weight, self.prodial_blocks, self.prodial_scale, self.prodial_a, self.prodial_b,
            self.lora_scaling, self.diagonal,
        )  # fmt: skip


def adapted(mixer: type[nn.Module], config: ProdialConfig = CONFIG, **options: Any) -> Model:
    """In fp64, where a mistake is not hidden by rounding."""
    model = Model(mixer, **options).double()
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def oracle(adapted_model: Model) -> Model:
    """In fp64 on plain linears, the fast path off, W' as a parametrisation."""
    model = copy.deepcopy(adapted_model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ProdialLinear)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    remove_prodial(model)
    model.double()
    for path, layer in layers.items():
        module = EffectiveWeight(layer)
        parametrize.register_parametrization(model.get_submodule(path), "weight", module)
    fast_path_off(model)
    for name, parameter in model.named_parameters():
        own = name.replace("parametrizations.weight.0.", "").replace(
            "parametrizations.weight.original", "base_layer.weight"
        )
        parent, _, last = own.rpartition(".")
        wrapped = f"{parent}.base_layer.{last}"
        parameter.requires_grad_(own in trained or wrapped in trained)
    return model


def fast_path_off(model: Model) -> Model:
    for layer in model.layers:
        layer.mixer.use_fast_path = layer.mixer.use_mem_eff_path = False
    return model


def eager(adapted_model: Model) -> Model:
    """The same adapters in plain PyTorch in the same dtypes, the fast path off."""
    model = fast_path_off(copy.deepcopy(adapted_model))
    for layer in (m for m in model.modules() if isinstance(m, ProdialLinear)):
        layer.impl = "reference"
    return model


def step(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Logits and every gradient asked for, the embedded input's among them."""
    model.embedding.weight.requires_grad_()
    model.zero_grad()
    logits = model(ids, **kwargs)
    grad = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    logits.backward(grad.to(logits.dtype))
    named = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.count_nonzero() > 0, f"{name} has a zero gradient"
            own = name.replace("parametrizations.weight.0.", "").replace("base_layer.", "")
            named[own] = parameter.grad.clone()
    return named


def assert_right(model: Model, ids: Tensor, **kwargs: Any) -> None:
    """Logits and gradients as the oracle's: equal in fp64, else by the accuracy rule."""
    dtype = model.embedding.weight.dtype
    exact = step(oracle(model), ids, **kwargs)
    got = step(model, ids, **kwargs)
    if dtype != torch.float64:
        assert_all_accurate(got, step(eager(model), ids, **kwargs), exact, dtype)
        return
    assert got.keys() == exact.keys()
    for name, value in got.items():
        # A, D and the bias of delta go through fp32 here and upstream.
        error = (value - exact[name]).norm() / exact[name].norm()
        assert error < 1e-6, f"{name}: relative error {error:.1e}"


def token_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_step_equals_parametrized_linears(
    mixer: type[nn.Module], bias: bool, shape: tuple[int, int]
) -> None:
    assert_right(adapted(mixer, bias=bias), token_ids(*shape))
    if mixer is Mamba:
        assert cuda_stand_ins.calls["scan_bwd"] == 2
        assert not stand_ins.fused_calls
    else:
        assert len(stand_ins.fused_calls) == 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_unfused_paths(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, EVERY if mixer is Mamba else CONFIG, bias=True)
    assert_right(fast_path_off(model), token_ids())
    assert not cuda_stand_ins.calls
    assert not stand_ins.fused_calls


def test_reference_impl_leaves_autograd_to_upstream() -> None:
    config = ProdialConfig(r=3, lora_alpha=6, block_size=BLOCKS, impl="reference")
    assert_right(adapted(Mamba, config), token_ids())
    assert not cuda_stand_ins.calls


def test_x_proj_and_dt_proj_as_targets() -> None:
    assert_right(adapted(Mamba, EVERY), token_ids())
    assert cuda_stand_ins.calls["scan_bwd"] == 2


@pytest.mark.parametrize("targets", [("in_proj",), ("out_proj",), ("dt_proj",), ("x_proj",)])
def test_any_subset_of_targets(targets: tuple[str, ...]) -> None:
    assert_right(
        adapted(Mamba, ProdialConfig(r=2, target_modules=targets, diagonal="free")), token_ids()
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_partial_tuning_beside_adapters(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, EVERY if mixer is Mamba else CONFIG)
    for name, parameter in model.named_parameters():
        if any(part in name for part in PARTIAL) and "base_layer.weight" not in name:
            parameter.requires_grad_()
    assert_right(model, token_ids())


def test_only_what_is_asked_for_is_computed() -> None:
    """Every single tensor may be the only one that trains."""
    model = adapted(Mamba, EVERY, depth=1, bias=True)
    full = copy.deepcopy(model)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_("base_layer.weight" not in name)
    expected = step(full, token_ids())
    mixer = {
        n for n, _ in model.named_parameters() if "mixer" in n and "base_layer.weight" not in n
    }
    assert len(mixer) > 20
    for name in sorted(mixer):
        twin = copy.deepcopy(model).requires_grad_(False)
        twin.get_parameter(name).requires_grad_()
        cuda_stand_ins.calls.clear()
        logits = twin(token_ids())
        logits.backward(torch.linspace(-1, 1, logits.numel()).reshape(logits.shape))
        got = twin.get_parameter(name).grad
        torch.testing.assert_close(got, expected[name.replace("base_layer.", "")])
        assert cuda_stand_ins.calls["scan_bwd"] == ("out_proj" not in name), name
        assert cuda_stand_ins.calls["conv_bwd"] == ("in_proj" in name or "conv" in name), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_model_with_fp32_masters(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, depth=1, width=32).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.float()
    assert_right(model, token_ids(2, 33))


@pytest.mark.parametrize("targets", [CONFIG.target_modules, EVERY.target_modules], ids=len)
def test_triton_projectors(targets: tuple[str, ...]) -> None:
    """The kernels inside the block, on the CPU under the interpreter."""
    config = ProdialConfig(
        r=3, lora_alpha=6, target_modules=targets, diagonal="free", impl="triton"
    )
    model = adapted(Mamba, config, depth=1, width=32).half()
    for parameter in (model.layers[0].mixer.A_log, model.layers[0].mixer.D):
        parameter.data = parameter.data.float()
    assert_right(model, token_ids(2, 33))
    model.layers[0].mixer.prodial_recompute_xz = True
    assert_right(model, token_ids(2, 33))


def test_recomputing_xz_changes_nothing() -> None:
    model = adapted(Mamba, EVERY)
    expected = step(model, token_ids())
    for layer in model.layers:
        layer.mixer.prodial_recompute_xz = True
    for name, value in step(model, token_ids()).items():
        assert torch.equal(value, expected[name]), name


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the first mixer keeps for backward besides its parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.layers[0].mixer(x)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_what_mamba_keeps_for_backward() -> None:
    model = adapted(Mamba, depth=1, width=64, d_state=2)
    x = torch.randn(2, 50, 64, dtype=torch.float64, requires_grad=True)
    # X, xz, the scan's output; x_proj's output and H of in_proj; states, A and the like.
    tokens, constant = 2 * 50 * 8, 8 * (2 * 128 * 4 + 128 * 2 + 8 * 128)
    assert kept_bytes(model, x) <= tokens * (64 + 256 + 128 + 7 + 3) + constant
    model.layers[0].mixer.prodial_recompute_xz = True
    assert kept_bytes(model, x) <= tokens * (64 + 128 + 7 + 3) + constant


@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout_is_the_same_in_forward_and_backward(mixer: type[nn.Module]) -> None:
    """With the mask fixed the block is smooth: its gradient is the slope along any direction."""
    config = ProdialConfig(r=3, lora_alpha=6, lora_dropout=0.5, block_size=BLOCKS)
    model = adapted(mixer, config, depth=1)
    weights = torch.randn(2, 7, 11, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return (model(token_ids()) * weights).sum()

    value = loss()
    value.backward()
    assert not torch.equal(value, (model.eval()(token_ids()) * weights).sum())
    model.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            direction = torch.randn_like(parameter)
            slope = (parameter.grad * direction).sum()
            with torch.no_grad():
                parameter.add_(1e-5 * direction)
                above = loss()
                parameter.sub_(2e-5 * direction)
                below = loss()
                parameter.add_(1e-5 * direction)
            torch.testing.assert_close((above - below) / 2e-5, slope, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing(mixer: type[nn.Module], use_reentrant: bool) -> None:
    block = adapted(mixer, depth=1).layers[0].mixer
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for wrap in (False, True):
        block.zero_grad()
        x.grad = None
        y = checkpoint(block, x, use_reentrant=use_reentrant) if wrap else block(x)
        y.sum().backward()
        adapters = [p.grad.clone() for p in block.parameters() if p.requires_grad]
        results.append([y, x.grad.clone(), *adapters])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("config", [CONFIG, EVERY], ids=["in-out", "every"])
def test_train_eval_decoded_and_merged_agree(config: ProdialConfig) -> None:
    model, ids = adapted(Mamba, config, bias=True), token_ids()
    trained = model.train()(ids).detach()
    assert cuda_stand_ins.calls["scan_fwd"] == 2
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), trained)
        assert cuda_stand_ins.calls["scan_fwd"] == 4, "evaluation takes the fast kernels too"
        params = inference_params()
        decoded = [model(ids[:, :3], inference_params=params)]
        for position in range(3, ids.shape[1]):
            params.seqlen_offset = position
            decoded.append(model(ids[:, position : position + 1], inference_params=params))
        torch.testing.assert_close(torch.cat(decoded, dim=1), trained)
        model.layers[0].mixer.allocate_inference_cache(2, 8)
        merge_prodial(model)
        torch.testing.assert_close(model(ids), trained)
    assert len(stand_ins.fused_calls) == 2, "a merged model has upstream's path"


@pytest.mark.parametrize("mixer", [Mamba2, Mamba2Simple])
def test_mamba2_sequences_side_by_side(mixer: type[nn.Module]) -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2]]).expand(2, -1).int().contiguous()
    model = adapted(mixer)
    assert_right(model, token_ids(), seq_idx=seq_idx)
    logits = model(token_ids(), seq_idx=seq_idx)
    torch.testing.assert_close(logits[:, 3:5], model(token_ids()[:, 3:5]))


def test_mamba2_flattened_tokens() -> None:
    mixer = adapted(Mamba2).layers[0].mixer
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.flatten(0, 1), seqlen=7), mixer(x).flatten(0, 1))
    torch.testing.assert_close(mixer(x.flatten(0, 1), 7), mixer(x).flatten(0, 1))


def test_mamba2_prefill_and_eval() -> None:
    model = adapted(Mamba2)
    expected = model(token_ids())
    stand_ins.fused_calls.clear()
    torch.testing.assert_close(model(token_ids(), inference_params=inference_params()), expected)
    assert not stand_ins.fused_calls
    torch.testing.assert_close(model.eval()(token_ids()), expected)
    assert len(stand_ins.fused_calls) == 2
    torch.testing.assert_close(merge_prodial(model)(token_ids()), expected)


def test_mamba2_without_a_norm() -> None:
    assert_right(adapted(Mamba2, rmsnorm=False), token_ids())
    assert len(stand_ins.fused_calls) == 2


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_mamba2_keeps_what_the_frozen_path_keeps_and_the_inputs_of_in_proj(impl: str) -> None:
    config = ProdialConfig(r=2, impl=impl)
    model = adapted(Mamba2, config, depth=1, width=64).half()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.float()
    x = torch.randn(2, 50, 64, dtype=torch.float16, requires_grad=True)
    ours = kept_bytes(model, x)
    frozen = kept_bytes(remove_prodial(model).requires_grad_(False), x)
    # X, and each projector's H padded to 16 columns at most; what is left is the adapter's small
    # operands.
    assert ours - frozen <= 2 * 50 * (64 + 2 * 16) * 2 + 2000


def test_mamba2_of_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = stand_ins.MambaSplitConv1dScanCombinedFn
    forward = rule.forward

    def keeps_one_more(ctx: Any, *arguments: Any) -> Tensor:
        y = forward(ctx, *arguments)
        ctx.save_for_backward(*ctx.saved_tensors, None)
        return y

    monkeypatch.setattr(rule, "forward", staticmethod(keeps_one_more))
    with pytest.raises(RuntimeError, match=r"keeps other tensors than that of mamba_ssm 2\.3"):
        adapted(Mamba2)(token_ids())


def test_mamba2_with_a_gated_mlp_inside_takes_the_unfused_kernels() -> None:
    assert_right(adapted(Mamba2, d_ssm=8), token_ids())
    assert not stand_ins.fused_calls


def test_mamba2_over_a_process_group_is_refused() -> None:
    model = Model(Mamba2, process_group=object())
    with pytest.raises(ValueError, match="tensor-parallel projectors cannot be adapted"):
        apply_prodial(model, CONFIG)
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())


@pytest.mark.parametrize("undo", [merge_prodial, remove_prodial])
@pytest.mark.parametrize("mixer", MIXERS)
def test_undoing_restores_class_and_attributes(
    mixer: type[nn.Module], undo: Callable[[Model], Model]
) -> None:
    model = Model(mixer).double()
    before = set(vars(model.layers[0].mixer))
    logits = model(token_ids())
    apply_prodial(model, CONFIG)
    assert isinstance(model.layers[0].mixer, mixer)
    assert type(model.layers[0].mixer) is not mixer
    undo(model)
    assert type(model.layers[0].mixer) is mixer
    assert set(vars(model.layers[0].mixer)) == before
    torch.testing.assert_close(model(token_ids()), logits)


@pytest.mark.parametrize("undo", [merge_prodial, remove_prodial])
def test_decoding_graphs_captured_with_other_weights_are_dropped(
    undo: Callable[[Model], Model],
) -> None:
    model = Model(Mamba)
    model._decoding_cache = "a graph"
    apply_prodial(model, CONFIG)
    assert model._decoding_cache is None
    model._decoding_cache = "a graph"
    undo(model)
    assert model._decoding_cache is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("mixer", MIXERS)
def test_copies_are_independent(
    mixer: type[nn.Module], duplicate: Callable[[Model], Model]
) -> None:
    model = adapted(mixer)
    expected = step(model, token_ids())
    twin = duplicate(model)
    remove_prodial(model)
    for name, value in step(twin, token_ids()).items():
        assert torch.equal(value, expected[name]), name
    remove_prodial(twin)
    assert type(twin.layers[0].mixer) is mixer


def test_merged_layer_in_training_is_refused() -> None:
    model = adapted(Mamba)
    model.layers[0].mixer.out_proj.merge()
    with pytest.raises(RuntimeError, match=r"merged, so its adapter would get no gradient"):
        model(token_ids())
    expected = adapted(Mamba)(token_ids())
    torch.testing.assert_close(model.eval()(token_ids()), expected)


def test_disabled_adapters_give_the_pretrained_model() -> None:
    model = adapted(Mamba, EVERY)
    for layer in (m for m in model.modules() if isinstance(m, ProdialLinear)):
        layer.enable_adapter(False)
    expected = Model(Mamba).double()(token_ids())
    torch.testing.assert_close(model(token_ids()), expected)


def test_autocast() -> None:
    model = adapted(Mamba, EVERY).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(token_ids())
    logits.float().sum().backward()
    expected = model(token_ids())
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.3)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ self.out_proj.weight.t() for _ in range(2)) + self.in_proj(x)


class ReadsItsDevice(ReadsTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x.to(self.out_proj.weight.device)) + self.in_proj(x)


class RewrittenMamba(Mamba):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.in_proj.weight.t()


def test_unknown_mixers_that_would_bypass_an_adapter_are_refused() -> None:
    model = nn.Sequential(ReadsTheWeight())
    message = (
        r"0, a test_mamba_ssm.ReadsTheWeight, reads out_proj\.weight in forward\(\) instead of"
    )
    with pytest.raises(ValueError, match=message):
        apply_prodial(model, CONFIG)
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
    apply_prodial(model, ProdialConfig(target_modules=("in_proj",)))
    apply_prodial(nn.Sequential(ReadsItsDevice()), CONFIG)
    with pytest.raises(ValueError, match=r"RewrittenMamba, reads in_proj\.weight in forward"):
        apply_prodial(nn.Sequential(RewrittenMamba(8)), CONFIG)


def test_every_mixer_is_adapted_where_only_some_hold_an_adapter() -> None:
    config = ProdialConfig(r=2, target_modules=r"layers\.0\.mixer\.out_proj", allow_partial=True)
    model = adapted(Mamba, config)
    assert_right(model, token_ids())
    kinds = [type(layer.mixer) is Mamba for layer in model.layers]
    assert kinds == [False, True]


def test_fused_calls_per_step() -> None:
    """One convolution and one scan more in backward, as upstream's recomputation has it."""
    step(adapted(Mamba, depth=3), token_ids())
    assert cuda_stand_ins.calls == {"conv_fwd": 6, "conv_bwd": 3, "scan_fwd": 3, "scan_bwd": 3}
    assert len(list(itertools.chain(stand_ins.fused_calls))) == 0
