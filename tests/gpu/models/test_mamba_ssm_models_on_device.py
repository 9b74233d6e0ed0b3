"""mamba_ssm's language models, adapted: logits, generation, CUDA graphs, peak memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial
from support.captured.on_device import captured
from support.mamba_ssm_loaded import MARKS, language_model, token_ids

pytestmark = MARKS


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
    graph, captured_loss = captured(step, warm_ups=2)

    def losses(run: Any) -> list[float]:
        model.load_state_dict(start)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        return [float(run()) for _ in range(4)]

    def replay() -> Tensor:
        graph()
        return captured_loss

    eager, replayed = losses(step), losses(replay)
    assert replayed == pytest.approx(eager, rel=1e-2)
    assert replayed[-1] < replayed[0]


def test_peak_memory_is_within_a_tenth_of_the_frozen_fast_path() -> None:
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    options = MambaConfig(d_model=768, n_layer=6, vocab_size=512)
    model = MambaLMHeadModel(options, device="cuda", dtype=torch.bfloat16)
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
