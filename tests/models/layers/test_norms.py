"""Fused norms: as close to fp64 as transformers' own, in every family, and gone when taken back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial
from prodial_kernels.models.layers import fused_norms
from prodial_kernels.models.layers.fused_norms import FusedNorms, fuse_norms, is_fused
from prodial_kernels.testing import assert_all_accurate
from prodial_kernels.training import FinetuneConfig, finetune
from support.kernels import rms_norm_kernel
from support.models import FAMILIES, build, randomise_adapters, token_ids
from support.tiny_model import write_text, write_tiny_model

# Norms of the tiny models: of the blocks, and the last one; those with a gate are other functions.
COUNTS = {
    "mamba": 3, "falcon_mamba": 9, "mamba2": 3, "jamba": 13, "bamba": 7, "zamba": 8, "zamba2": 6,
    "falcon_h1": 5, "granitemoehybrid": 7, "nemotron_h": 5,
}  # fmt: skip


def one_norm(name: str, dtype: torch.dtype) -> Any:
    """A norm of a family with a weight that is not at rest, [64]."""
    model = build(name)
    norm = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
    torch.manual_seed(3)
    norm.weight = nn.Parameter((1 + 0.3 * torch.randn(64)).to(dtype))
    return norm


def results(norm: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    weight: Any = norm.weight
    y = norm(x)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def exact(norm: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * weight
    dx, dweight = torch.autograd.grad(y, [x, weight], dy.double())
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("kernel", ["composed", "as on CUDA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "nemotron_h", "bamba"])
def test_as_close_to_fp64_as_transformers_own(
    name: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "as on CUDA":
        rms_norm_kernel.install(monkeypatch)
    norm = one_norm(name, dtype)
    x, dy = torch.randn(2, 33, 64).mul(2).to(dtype), torch.randn(2, 33, 64).to(dtype)
    # Rows that epsilon matters in.
    x[:, 0] *= 1e-3
    eager = results(norm, x, dy)
    fused = fuse_norms(norm)
    assert len(fused) == 1
    assert is_fused(norm)
    found = results(norm, x, dy)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in eager.items()}
    assert_all_accurate(found, eager, exact(norm, x, dy), dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name: str) -> None:
    model, ids = build(name), token_ids()
    apply_prodial(model, ProdialConfig(r=3, modules_to_save=_norm_names(model)))
    randomise_adapters(model)
    model.train()
    expected = _gradients(model, ids)
    fused = fuse_norms(model)
    assert (len(fused), fused.refused) == (COUNTS[name], ())
    assert str(fused) == f"norms: {COUNTS[name]} run as one kernel each"
    assert len(fuse_norms(model)) == 0, "they are fused already"
    found = _gradients(model, ids)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=2e-3, atol=2e-6, msg=key)
    fused.remove()
    for key, gradient in _gradients(model, ids).items():
        assert torch.equal(gradient, expected[key]), key


def _norm_names(model: nn.Module) -> list[str]:
    names = (name.rpartition(".")[2] for name, m in model.named_modules() if _is_norm(m))
    return sorted(set(names))


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and "weight" in module._parameters


def _gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any("norm" in name for name in found)
    return found


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("name", ["mamba", "nemotron_h"])
def test_mixed_dtypes_give_what_the_class_gives(
    name: str, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    norm = one_norm(name, weight_dtype)
    x = torch.randn(5, 64).to(x_dtype)
    expected = norm(x)
    fuse_norms(norm)
    found = norm(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    # A last norm's gradients come back in their own dtypes.
    leaf = x.clone().requires_grad_()
    norm(leaf).float().square().sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad.dtype, norm.weight.grad.dtype) == (x_dtype, weight_dtype)


def test_autocast_changes_no_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = one_norm("mamba", torch.bfloat16)
    fuse_norms(norm)
    seen = []
    composed = torch.nn.functional.rms_norm

    def watched(*args: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return composed(*args)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    # On CUDA autocast would have it give fp32.
    assert seen == [False]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "nemotron_h"])
def test_joining_the_gradients_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(name).bfloat16(), token_ids()
    apply_prodial(model, ProdialConfig(r=3))
    randomise_adapters(model.train())
    with monkeypatch.context() as patch:
        patch.setattr(fused_norms, "has_separate_norm", lambda block: False)
        apart = fuse_norms(model)
    expected, casts = _input_gradient(model, ids)
    apart.remove()
    fuse_norms(model)
    found, fewer = _input_gradient(model, ids)
    assert torch.equal(found, expected)
    # One for each block whose input is the fp32 residual, which is not what the first one gets.
    blocks = 1 if name != "nemotron_h" else 0
    assert casts - fewer == blocks, "the gradient of a rounded input becomes fp32 by itself"


class _Casts(TorchDispatchMode):
    """Counts tensors of a residual's shape that are copied into fp32."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.shape == self.shape:
            self.count += result.dtype == torch.float32
        return result


def _input_gradient(model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """Of the embeddings, with how often something of their shape becomes fp32 in backward."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean()
    with _Casts(embedded.shape) as casts:
        output.backward()
    assert embedded.grad is not None
    return embedded.grad, casts.count


def test_transformers_own_checkpointing_stays() -> None:
    model, ids = build("mamba2"), token_ids()
    apply_prodial(model, ProdialConfig(r=2, lora_dropout=0.0))
    randomise_adapters(model.train())
    fuse_norms(model)
    calls = []
    model.backbone.layers[0].norm.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    expected = model.backbone.layers[0].mixer.in_proj.prodial_b.grad.clone()
    assert len(calls) == 1
    model.zero_grad(set_to_none=True)
    # By its newer name where it has one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    assert len(calls) == 3
    assert torch.equal(model.backbone.layers[0].mixer.in_proj.prodial_b.grad, expected)


def test_what_only_looks_like_one_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba import modeling_mamba

    kind: Any = modeling_mamba.MambaRMSNorm

    class Shifted(kind):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1e-3 * self.weight

    class Wider(kind):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).float()

    class Gated(kind):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states)

    model = nn.ModuleDict({"shifted": Shifted(8), "wider": Wider(8), "gated": Gated(8)})
    model["own"] = Shifted(8)
    for cls in (Shifted, Wider, Gated):
        monkeypatch.setattr(cls, "__module__", kind.__module__)
    model["torch"] = nn.RMSNorm(8)
    # A buffer that takes part, in a class whose own does not.
    from transformers.models.falcon_mamba import modeling_falcon_mamba

    weightless: Any = modeling_falcon_mamba.FalconMambaWeightlessRMSNorm

    class Weighted(weightless):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    monkeypatch.setattr(Weighted, "__module__", weightless.__module__)
    model["weighted"] = Weighted(8)
    biased = kind(8)
    biased.bias = nn.Parameter(torch.zeros(8))
    model["biased"] = biased
    hooked = model["hooked"] = kind(8)
    hooked.forward = hooked.forward
    fused = fuse_norms(model)
    assert (len(fused), fused.refused) == (0, ("shifted", "wider", "own", "weighted"))
    assert str(fused).endswith("4 of another formula are left as they are: shifted, wider, own, …")
    # Code that a checkpoint brings along is not transformers'.
    monkeypatch.setattr(Shifted, "__module__", "transformers_modules.somebody")
    assert fuse_norms(model).refused == ("wider", "weighted")


def test_no_random_number_is_drawn() -> None:
    model = build("mamba")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fuse_norms(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_taken_back_copied_pickled_and_merged() -> None:
    model, ids = build("mamba2").eval(), token_ids()
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    apply_prodial(model, ProdialConfig(r=2))
    fused = fuse_norms(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_fused(twin.backbone.norm_f)
            assert torch.equal(twin(input_ids=ids).logits, expected)
    fused.remove()
    fused.remove()
    merge_prodial(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names
    assert not any(map(is_fused, model.modules()))


def test_a_model_without_storage_will_do() -> None:
    import transformers

    with torch.device("meta"):
        config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=8)
        model = transformers.MambaForCausalLM(config).bfloat16()
        assert len(fuse_norms(model)) == 3
    assert next(model.parameters()).is_meta


def test_compiles_without_a_break() -> None:
    norm = one_norm("mamba", torch.bfloat16)
    fuse_norms(norm)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, norm(x), rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert x.grad is not None


def test_a_run_trains_with_them_and_leaves_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prodial_kernels.models.layers import recompute
    from prodial_kernels.training import finetuning

    write_tiny_model(tmp_path / "model")
    write_text(tmp_path / "text.txt", documents=50)
    calls = []
    composed = torch.nn.functional.rms_norm

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return composed(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", counted)
    written = []
    write = finetuning.write_model

    def noting(model: nn.Module, *args: Any, **options: Any) -> Any:
        written.append(any(map(is_fused, model.modules())))
        return write(model, *args, **options)

    monkeypatch.setattr(finetuning, "write_model", noting)
    config = FinetuneConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "text.txt"), steps=1, batch_size=2,
        seq_len=32, eval_tokens=64, output=str(tmp_path / "plain"), device="cpu",
    )  # fmt: skip
    finetune(config)
    assert not calls
    assert "norms:" not in capsys.readouterr().err
    monkeypatch.setattr(recompute, "KERNEL_ON", (*fused_norms.KERNEL_ON, "cpu"))
    finetune(FinetuneConfig(**{**config.to_dict(), "output": str(tmp_path / "fused")}))
    assert calls.count(True) == 3
    assert "norms: 3 run as one kernel each" in capsys.readouterr().err
    assert written == [False, False]


def test_of_another_library_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.LayerNorm(8))
    assert len(fuse_norms(model)) == 0
    assert len(FusedNorms()) == 0
