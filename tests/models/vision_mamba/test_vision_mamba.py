"""``VisionMamba``: the published model's sizes, names and structure, and adapters in it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    VisionMamba,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.config import get_preset
from prodial_kernels.models.vision_mamba.norm import AddRMSNorm
from prodial_kernels.training.step.optimizers import adapter_parameter_groups
from support.mixers.vision import images
from support.mixers.vision import tiny_vision_mamba as tiny
from support.models import randomise_adapters

CONFIG = ProdialConfig(r=3, block_size=2, modules_to_save=("head",))


def on_meta(size: str, **options: Any) -> VisionMamba:
    with torch.device("meta"):
        return VisionMamba.from_size(size, **options)


# --- What is published. ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "published", "exact"),
    [("tiny", 7, 7_148_008), ("small", 26, 25_796_584), ("base", 98, 97_598_440)],
)
def test_parameter_counts(size: str, published: int, exact: int) -> None:
    count = sum(parameter.numel() for parameter in on_meta(size).parameters())
    assert count == exact
    assert round(count / 1e6) == published


def test_names_and_shapes_of_the_published_checkpoints() -> None:
    state = {name: tuple(t.shape) for name, t in on_meta("tiny").state_dict().items()}
    outside = {n: shape for n, shape in state.items() if not n.startswith("layers.")}
    assert outside == {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "norm_f.weight": (192,),
        "head.weight": (1000, 192),
        "head.bias": (1000,),
    }
    direction = {
        "A{}_log": (384, 16), "D{}": (384,), "conv1d{}.weight": (384, 1, 4),
        "conv1d{}.bias": (384,), "x_proj{}.weight": (44, 384), "dt_proj{}.weight": (384, 12),
        "dt_proj{}.bias": (384,),
    }  # fmt: skip
    expected = {
        f"layers.23.mixer.{n.format(s)}": v for n, v in direction.items() for s in ("", "_b")
    }
    expected |= {
        "layers.23.norm.weight": (192,),
        "layers.23.mixer.in_proj.weight": (768, 192),
        "layers.23.mixer.out_proj.weight": (192, 384),
    }
    assert {n: v for n, v in state.items() if n.startswith("layers.23.")} == expected
    assert len(state) == len(outside) + 24 * len(expected)


@pytest.mark.parametrize(
    ("preset", "classes", "printed"),
    [("vim-caltech", 102, "0.65M"), ("vim-flowers", 102, "0.61M")],
)
def test_adapter_counts_of_the_paper(preset: str, classes: int, printed: str) -> None:
    """Table 3, with the classifier that is trained beside the adapter."""
    model = on_meta("tiny", num_classes=classes)
    config = replace(get_preset(preset).adapter, modules_to_save=("head",))
    assert f"{apply_prodial(model, config).trainable / 1e6:.2f}M" == printed


def test_projector_counts_of_the_paper() -> None:
    """Full fine-tuning of all ``out_proj``, and the classifier: 1.789M."""
    model = on_meta("tiny", num_classes=102)
    trained = [layer.mixer.out_proj for layer in model.layers] + [model.head]
    count = sum(p.numel() for module in trained for p in module.parameters())
    assert f"{count / 1e6:.3f}M" == "1.789M"


# --- What it computes. ----------------------------------------------------------------------------


def test_the_class_token_stands_in_the_middle() -> None:
    """Against the definition, written out: no fusion, no chunks, one token at a time."""
    model, x = tiny(), images()
    grid = model.patch_embed.proj(x).flatten(2).mT
    tokens = torch.cat([grid[:, :2], model.cls_token.expand(2, 1, 8), grid[:, 2:]], dim=1)
    residual = tokens + model.pos_embed
    for layer in model.layers:
        scale = residual.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        mixed = mixer_by_definition(layer.mixer, residual * scale * layer.norm.weight)
        residual = residual + mixed
    scale = residual.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    logits = model.head((residual * scale * model.norm_f.weight)[:, 2])
    torch.testing.assert_close(model(x), logits)


def mixer_by_definition(mixer: nn.Module, x: Tensor) -> Tensor:
    """Vim's mixer, v2, divided by two."""
    length = x.shape[1]
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    total = torch.zeros_like(u)
    for suffix, order in (("", range(length)), ("_b", range(length - 1, -1, -1))):
        conv, x_proj, dt_proj = (
            getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj")
        )
        A, D = -torch.exp(getattr(mixer, f"A{suffix}_log")), getattr(mixer, f"D{suffix}")
        window = torch.zeros(*u.shape[:1], u.shape[2], 4)
        state = torch.zeros(*u.shape[:1], *A.shape)
        for t in order:
            window = torch.cat([window[..., 1:], u[:, t, :, None]], dim=-1)
            v = nn.functional.silu((window * conv.weight[:, 0]).sum(-1) + conv.bias)
            dt, B, C = x_proj(v).split([dt_proj.in_features, A.shape[1], A.shape[1]], dim=-1)
            delta = nn.functional.softplus(dt_proj(dt))
            state = torch.exp(delta[..., None] * A) * state + (delta * v)[..., None] * B[:, None]
            y = (state * C[:, None]).sum(-1) + D * v
            total[:, t] = total[:, t] + y * nn.functional.silu(z[:, t])
    return mixer.out_proj(total / 2)


def test_stochastic_depth() -> None:
    model = tiny(drop_path=0.4)
    assert [layer.drop_path.probability for layer in model.layers] == [0.0, 0.0, 0.2]
    assert model.drop_path.probability == 0.4
    expected = tiny()(images(64))
    outputs = model(images(64))
    untouched = (outputs - expected).abs().amax(1) < 1e-6
    assert not untouched.any(), "what is kept is scaled up"
    assert len(torch.unique(model.drop_path(torch.ones(99, 2)), dim=0)) == 2
    model.eval()
    torch.testing.assert_close(model(images(64)), expected)


def test_add_norm_keeps_the_residual_wide() -> None:
    norm = AddRMSNorm(8).bfloat16()
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    normed, total = norm(x, None)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    _, total = norm(x, torch.full((2, 3, 8), 1e-3))
    assert torch.equal(total, x.float() + 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    output = tiny().to(dtype)(images().to(dtype))
    assert output.dtype is dtype
    torch.testing.assert_close(output.float(), tiny()(images()), rtol=0.1, atol=0.1)


def test_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    output.sum().backward()
    torch.testing.assert_close(output.float(), tiny()(images()), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


# --- Checkpoints. ---------------------------------------------------------------------------------


def test_loads_a_checkpoint_of_another_task() -> None:
    pretrained, model = tiny(), tiny(num_classes=7)
    head = copy.deepcopy(model.head.state_dict())
    model.load_pretrained({"model": pretrained.state_dict()})
    assert torch.equal(model.features(images()), pretrained.features(images()))
    assert all(torch.equal(t, head[name]) for name, t in model.head.state_dict().items())
    same = VisionMamba(8, depth=3, num_classes=5, image_size=8, patch_size=4, d_state=4)
    same.load_pretrained(pretrained.state_dict())
    assert torch.equal(same(images()), pretrained(images()))


def test_positions_are_interpolated_around_the_class_token() -> None:
    pretrained, model = tiny(), tiny(image_size=16)
    token = pretrained.pos_embed[:, 2].clone()
    with torch.no_grad():
        pretrained.pos_embed.fill_(0.25)[:, 2] = token
    model.load_pretrained(pretrained.state_dict())
    assert model.pos_embed.shape == (1, 17, 8)
    assert torch.equal(model.pos_embed[:, 8], token)
    others = torch.cat([model.pos_embed[:, :8], model.pos_embed[:, 9:]], dim=1)
    torch.testing.assert_close(others, torch.full_like(others, 0.25))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    state = tiny().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_f\.weight"):
        tiny().load_pretrained({name: t for name, t in state.items() if name != "norm_f.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny(d_state=5).load_pretrained(state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VisionMamba.from_size("huge"),
            "size must be one of 'tiny', 'small', 'base', got 'huge'",
        ),
        (lambda: tiny(image_size=3), "image_size=3 must be at least patch_size=4"),
        (lambda: tiny(drop_path=1.0), r"drop_path must be in \[0, 1\), got 1.0"),
        (lambda: tiny()(images(side=12)), r"must be \[batch, 3, 8, 8\], got \[2, 3, 12, 12\]"),
        (lambda: tiny()(images()[0]), r"must be \[batch, 3, 8, 8\], got \[3, 8, 8\]"),
        (lambda: tiny(scan="triton")(images()), "scan must be one of"),
    ],
)
def test_errors(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- Adapters. ------------------------------------------------------------------------------------


def test_adapters_train_and_merge() -> None:
    model = tiny()
    before = model(images())
    report = apply_prodial(model, CONFIG)
    assert report.rows[0].count == 3
    torch.testing.assert_close(model(images()), before)
    randomise_adapters(model)
    output = model(images())
    output.square().sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 4 + 2
    assert all(g is not None and g.count_nonzero() for g in trained.values())
    merged = merge_prodial(copy.deepcopy(model))
    assert not any(isinstance(module, ProdialLinear) for module in merged.modules())
    torch.testing.assert_close(merged(images()), output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(remove_prodial(model)(images()), before)


def test_adapters_learn() -> None:
    """Eight random images with random labels are learnt by heart."""
    model, x = tiny(), images(8)
    labels = torch.arange(8) % 5
    apply_prodial(model, CONFIG)
    optimizer = torch.optim.AdamW(adapter_parameter_groups(model, weight_decay=0.0), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_compiles_without_graph_breaks() -> None:
    model = tiny(depth=2)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    expected = model(images())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(images())
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
