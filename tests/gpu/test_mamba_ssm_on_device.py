"""mamba_ssm's mixers, adapted, on the real kernels of mamba-ssm and causal-conv1d.

The exact values are those of the CPU stand-ins in fp64, which know nothing of upstream's kernels.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
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

pytestmark = [
    pytest.mark.gpu,
    # Of mamba_ssm's own use of torch and Triton.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

sys.path.append(str(Path(__file__).parent.parent / "mixers"))

if torch.cuda.is_available():
    # One launch configuration per kernel of Mamba-2 instead of minutes of tuning. Read at import.
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mamba_ssm

BLOCKS = {"in_proj": 4, "out_proj": 8}
CONFIG = ProdialConfig(r=16, block_size=BLOCKS)
EVERY = ProdialConfig(r=4, target_modules=("in_proj", "out_proj", "x_proj", "dt_proj"))
MIXERS = ("Mamba", "Mamba2", "Mamba2Simple")
WIDTH = 256


@pytest.fixture(autouse=True)
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(layer: ProdialLinear) -> Tensor:
        raise AssertionError("ProdialLinear.weight was read")

    monkeypatch.setattr(ProdialLinear, "weight", property(read))


def mixer_class(name: str) -> type[nn.Module]:
    if name == "Mamba2Simple":
        from mamba_ssm.modules.mamba2_simple import Mamba2Simple

        return Mamba2Simple
    return getattr(mamba_ssm, name)


def block(name: str, config: ProdialConfig = CONFIG, **options: Any) -> nn.Module:
    """One adapted mixer in bf16, inside a module that can be adapted."""
    torch.manual_seed(0)
    parent = nn.Module()
    if name.startswith("Mamba2"):
        # Upstream's unfused convolution wants rows of in_proj's output to be multiples of 8.
        options = {"headdim": 64, **options}
    parent.mixer = mixer_class(name)(WIDTH, device="cuda", dtype=torch.bfloat16, **options)
    apply_prodial(parent, config)
    parent.cpu()
    randomise_adapters(parent)
    return parent.cuda()


class EffectiveWeight(nn.Module):
    def __init__(self, layer: ProdialLinear) -> None:
        super().__init__()
        for name, parameter in layer.adapter_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().double()))
        self.lora_scaling = layer.lora_scaling

    def forward(self, weight: Tensor) -> Tensor:
        return effective_weight(
            weight, self.prodial_blocks, self.prodial_scale, self.prodial_a, self.prodial_b,
            self.lora_scaling, "relu",
        )  # fmt: skip


def exact_step(parent: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """In fp64: plain linears with W' as parametrisation, the stand-in's sequential scan."""
    import mamba_ssm_stand_ins as stand_ins

    twin = copy.deepcopy(parent)
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, ProdialLinear)}
    remove_prodial(twin)
    twin.double().requires_grad_(False)
    for path, layer in layers.items():
        parametrize.register_parametrization(
            twin.get_submodule(path), "weight", EffectiveWeight(layer)
        )
    mixer = twin.mixer
    name = type(mixer).__name__
    mixer.use_fast_path = mixer.use_mem_eff_path = False
    if name != "Mamba":
        norm = stand_ins._GatedNorm(mixer.norm.weight.numel(), torch.float64)
        norm.weight = mixer.norm.weight
        mixer.norm = norm
        mixer.rmsnorm = True
    forward = getattr(stand_ins, name).forward
    return run(twin, lambda value: forward(mixer, value), x.double(), grad.double())


def run(parent: nn.Module, function: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of x and of everything that trains; none is missing or zero."""
    x = x.detach().clone().requires_grad_()
    trained = {n: p for n, p in parent.named_parameters() if p.requires_grad}
    y = function(x)
    gradients = torch.autograd.grad(y, [x, *trained.values()], grad)
    for name, gradient in zip(("x", *trained), gradients, strict=True):
        assert torch.isfinite(gradient).all(), f"{name} has a non-finite gradient"
        assert gradient.count_nonzero() > 0, f"{name} has a zero gradient"
    names = [name.replace("parametrizations.weight.0.", "") for name in trained]
    named = dict(zip(names, gradients[1:], strict=True))
    return {"y": y.detach(), "x": gradients[0], **named}


def eager_step(parent: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """In bf16 on upstream's unfused path, the projectors in plain PyTorch."""
    twin = copy.deepcopy(parent)
    for layer in (m for m in twin.modules() if isinstance(m, ProdialLinear)):
        layer.impl = "reference"
    twin.mixer.use_fast_path = twin.mixer.use_mem_eff_path = False
    return run(twin, twin.mixer, x, grad)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (batch, length, WIDTH)
    x, grad = torch.randn(2, *shape, device="cuda", generator=generator).bfloat16()
    return x, grad


@pytest.mark.parametrize("shape", [(2, 129), (1, 1), (3, 64)], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_step_equals_parametrized_linears(name: str, shape: tuple[int, int]) -> None:
    parent, (x, grad) = block(name), inputs(*shape)
    got = run(parent, parent.mixer, x, grad)
    exact = exact_step(parent, x, grad)
    assert_all_accurate(got, eager_step(parent, x, grad), exact, torch.bfloat16)


def test_longer_than_one_chunk_of_the_scan() -> None:
    """Above 2048 steps the scan keeps states for its backward; checked against upstream's own."""
    parent, (x, grad) = block("Mamba"), inputs(2, 2100)
    got, eager = run(parent, parent.mixer, x, grad), eager_step(parent, x, grad)
    for name, value in got.items():
        error = (value.double() - eager[name].double()).norm() / eager[name].double().norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.parametrize("recompute", [False, True])
def test_x_proj_dt_proj_and_partial_tuning(recompute: bool) -> None:
    parent, (x, grad) = block("Mamba", EVERY), inputs(2, 65)
    exact = exact_step(parent, x, grad)
    eager = eager_step(parent, x, grad)
    parent.mixer.prodial_recompute_xz = recompute
    assert_all_accurate(run(parent, parent.mixer, x, grad), eager, exact, torch.bfloat16)
    for name, parameter in parent.mixer.named_parameters():
        if name in ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.base_layer.bias"):
            parameter.requires_grad_()
    got = run(parent, parent.mixer, x, grad)
    eager = eager_step(parent, x, grad)
    for name in got.keys() - exact.keys():
        error = (got[name].double() - eager[name].double()).norm() / eager[name].double().norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.parametrize("name", MIXERS)
def test_every_tensor_may_be_the_only_one_that_trains(name: str) -> None:
    parent, (x, grad) = block(name), inputs(2, 33)
    full = run(parent, parent.mixer, x, grad)
    trained = {n: p for n, p in parent.named_parameters() if p.requires_grad}
    for chosen, parameter in trained.items():
        parent.requires_grad_(False)
        parameter.requires_grad_()
        (alone,) = torch.autograd.grad(parent.mixer(x), parameter, grad)
        # Of the gradient's size: the rank-r product H is kept or made again, from the scan's
        # output before or after it was rounded.
        error = (alone - full[chosen]).abs().max() / full[chosen].abs().max()
        assert error < 0.02, f"{chosen}: {error:.3f}"


@pytest.mark.parametrize("name", MIXERS)
def test_dropout_trains_and_checkpointing_repeats_it(name: str) -> None:
    parent = block(name, ProdialConfig(r=16, lora_dropout=0.3))
    x, grad = inputs(2, 65)
    without = block(name, ProdialConfig(r=16)).mixer(x)
    results = []
    for wrap in (False, True):
        torch.manual_seed(5)

        def forward(value: Tensor, wrap: bool = wrap) -> Tensor:
            mixer = parent.mixer
            return checkpoint(mixer, value, use_reentrant=False) if wrap else mixer(value)

        results.append(run(parent, forward, x, grad))
    assert torch.equal(results[0]["y"], results[1]["y"])
    for key, value in results[0].items():
        # Upstream's scan backward adds with atomics: two runs differ in the last places.
        other = results[1][key]
        assert (value - other).norm() < 1e-2 * value.norm(), key
    assert not torch.equal(results[0]["y"], without)


def language_model(
    layer: str, dtype: torch.dtype = torch.float32, config: ProdialConfig = CONFIG, depth: int = 2
) -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    options = MambaConfig(d_model=WIDTH, n_layer=depth, vocab_size=512, ssm_cfg={"layer": layer})
    model = mamba_ssm.MambaLMHeadModel(options, device="cuda", dtype=dtype)
    apply_prodial(model, config)
    model.cpu()
    randomise_adapters(model)
    return model.cuda()


def token_ids(batch: int = 2, length: int = 19) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (batch, length), generator=generator).cuda()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_train_eval_decoded_and_merged_logits_agree(layer: str) -> None:
    from mamba_ssm.utils.generation import InferenceParams

    model, ids = language_model(layer), token_ids()
    close = {"rtol": 2e-3, "atol": 2e-3} if layer == "Mamba1" else {"rtol": 2e-2, "atol": 2e-2}
    trained = model.train()(ids).logits.detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained, **close)
        cache = InferenceParams(max_seqlen=32, max_batch_size=2)
        decoded = [model(ids[:, :7], inference_params=cache).logits]
        for position in range(7, ids.shape[1]):
            cache.seqlen_offset = position
            decoded.append(model(ids[:, position : position + 1], inference_params=cache).logits)
        torch.testing.assert_close(torch.cat(decoded, dim=1), trained, **close)
        merged = merge_prodial(copy.deepcopy(model))
        torch.testing.assert_close(merged(ids).logits, trained, **close)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "cuda-graph"])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_generation(layer: str, graph: bool) -> None:
    model = language_model(layer).eval()
    prompt = token_ids(2, 7)
    options = {"max_length": 15, "top_k": 1, "cg": graph}
    tokens = model.generate(prompt, **options)
    with torch.no_grad():
        greedy = model(tokens).logits[:, 6:-1].topk(2).values
    settled = (greedy[..., 0] - greedy[..., 1]) > 1e-2
    merged = merge_prodial(model).generate(prompt, **options)
    # A tie may fall either way, and every token after it.
    sure = settled.cumprod(dim=1).bool()
    assert sure.any()
    assert torch.equal(tokens[:, 7:][sure], merged[:, 7:][sure])


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_no_adapter_tensor_of_any_layer_is_dead(layer: str) -> None:
    model = language_model(layer, torch.bfloat16, depth=4)
    model(token_ids()).logits.float().square().mean().backward()
    adapters = {n: p for n, p in model.named_parameters() if "prodial_" in n}
    assert len(adapters) == 4 * 2 * 4
    for name, parameter in adapters.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_cuda_graph_of_a_whole_step(layer: str) -> None:
    model, ids = language_model(layer, torch.bfloat16), token_ids()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        logits = model(ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    start = copy.deepcopy(model.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def losses(run: Any) -> list[float]:
        model.load_state_dict(start)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        return [float(run()) for _ in range(4)]

    def replay() -> Tensor:
        graph.replay()
        return captured

    eager, replayed = losses(step), losses(replay)
    assert replayed == pytest.approx(eager, rel=1e-2)
    assert replayed[-1] < replayed[0]


def test_peak_memory_is_within_a_tenth_of_the_frozen_fast_path() -> None:
    from mamba_ssm.models.config_mamba import MambaConfig

    options = MambaConfig(d_model=768, n_layer=6, vocab_size=512)
    model = mamba_ssm.MambaLMHeadModel(options, device="cuda", dtype=torch.bfloat16)
    model.requires_grad_(False)
    ids = token_ids(8, 2048)

    def peak() -> float:
        def step() -> None:
            hidden = model.backbone.embedding(ids).requires_grad_()
            for parameter in model.parameters():
                parameter.grad = None
            residual = None
            for layer in model.backbone.layers:
                hidden, residual = layer(hidden, residual)
            (hidden + residual).sum().backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    frozen = peak()
    apply_prodial(model, ProdialConfig(r=16))
    ours = peak()
    for layer in model.backbone.layers:
        layer.mixer.prodial_recompute_xz = True
    lean = peak()
    assert ours <= 1.10 * frozen, f"{ours / frozen:.3f} of the frozen fast path"
    assert lean <= 0.90 * frozen, f"{lean / frozen:.3f} with recompute_xz"


def test_mamba2_packed_sequences_equal_separate_ones() -> None:
    parent = block("Mamba2")
    x, _ = inputs(1, 96)
    seq_idx = (torch.arange(96, device="cuda")[None] >= 40).int()
    packed = parent.mixer(x, seq_idx=seq_idx)
    apart = torch.cat([parent.mixer(x[:, :40]), parent.mixer(x[:, 40:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=2e-2, atol=2e-2)
    flat = parent.mixer(x.flatten(0, 1), seqlen=96)
    torch.testing.assert_close(flat, parent.mixer(x).flatten(0, 1))


def test_mamba2_with_a_gated_mlp_inside() -> None:
    parent, (x, grad) = block("Mamba2", d_ssm=WIDTH, headdim=32), inputs(2, 33)
    got = run(parent, parent.mixer, x, grad)
    exact, eager = exact_step(parent, x, grad), eager_step(parent, x, grad)
    assert_all_accurate(got, eager, exact, torch.bfloat16)


@pytest.mark.slow  # upstream tunes Mamba-3's kernels for five minutes
def test_mamba3_calls_its_projectors() -> None:
    parent, (x, grad) = block("Mamba3"), inputs(2, 64)
    # The first step is the tuning's: it runs every candidate on the live buffers.
    run(parent, parent.mixer, x, grad)
    got = run(parent, parent.mixer, x, grad)
    twin = copy.deepcopy(parent)
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, ProdialLinear)}
    remove_prodial(twin)
    twin.requires_grad_(False)
    for path, layer in layers.items():
        module = EffectiveWeight(layer).float()
        parametrize.register_parametrization(twin.get_submodule(path), "weight", module)
    expected = run(twin, twin.mixer, x, grad)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 0.05, f"{name}: {error:.3f}"
