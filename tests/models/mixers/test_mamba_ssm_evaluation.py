"""mamba_ssm's adapted mixers outside training: evaluated, decoded, merged, switched off."""

from __future__ import annotations

import pytest
import torch

from prodial_kernels import ProdialConfig, ProdialLinear, merge_prodial
from support.mixers import cuda_stand_ins
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_mamba_ssm import CONFIG, EVERY, adapted, token_ids
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Model, inference_params

pytestmark = pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")


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


def test_mamba2_prefill_and_eval() -> None:
    model = adapted(Mamba2)
    expected = model(token_ids())
    stand_ins.fused_calls.clear()
    torch.testing.assert_close(model(token_ids(), inference_params=inference_params()), expected)
    assert not stand_ins.fused_calls
    torch.testing.assert_close(model.eval()(token_ids()), expected)
    assert len(stand_ins.fused_calls) == 2
    torch.testing.assert_close(merge_prodial(model)(token_ids()), expected)


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
