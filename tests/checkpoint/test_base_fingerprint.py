"""The base model's fingerprint: the same weights in any dtype, and no others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from saved_adapters import Model, expect_refusal, trained

from prodial_kernels import load_adapter, merge_prodial, save_adapter
from prodial_kernels.checkpoint import AdapterError, model_fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_the_same_base_in_another_dtype(
    tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
) -> None:
    """Whichever way the two came from the same weights, including through a narrower dtype."""

    def base() -> Model:
        model = Model()
        with torch.no_grad():
            # Down to what fp16 keeps only as multiples of 2^-24, and to zero.
            model.layers[0].in_proj.weight *= torch.logspace(-9, 0, 12)
            model.layers[1].out_proj.weight[::2] = 0.0
        return model

    save_adapter(trained(model=base().to(saved)), tmp_path)
    for through in (torch.float32, saved, loaded):
        load_adapter(base().to(through).to(loaded), tmp_path)


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_another_or_a_trained_base(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    source = trained(model=Model().to(saved))
    save_adapter(source, tmp_path)
    expect_refusal(tmp_path, "other weights than this model's: .* in 6 of 6 tensors",
                   Model(seed=1).to(loaded))  # fmt: skip

    fine_tuned = Model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fine_tuned.parameters():
            # A hundred steps of 1e-5 in random directions, on weights of 0.2.
            parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    if {saved, loaded} != {torch.bfloat16, torch.float16}:
        # Between those two, an ulp of bf16 is what the same base may differ by.
        expect_refusal(tmp_path, "other weights than this model's", fine_tuned.to(loaded))

    merged = merge_prodial(copy.deepcopy(source)).to(loaded)
    expect_refusal(tmp_path, "not a fine-tuned or merged one", merged)


def test_one_changed_layer_is_named(directory: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].in_proj.weight += 1e-6
    expect_refusal(directory, r"in 1 of 6 tensors, first in layers\.1\.in_proj\.weight", model)


def test_model_fingerprint() -> None:
    assert model_fingerprint(Model()) == model_fingerprint(Model())
    assert model_fingerprint(Model()) != model_fingerprint(Model(seed=1))
    assert model_fingerprint(Model()) != model_fingerprint(Model().to(torch.bfloat16))
    moved = Model()
    moved.head[1].running_mean += 1
    assert model_fingerprint(moved) != model_fingerprint(Model())
    with pytest.raises(AdapterError, match="meta device"):
        model_fingerprint(Model().to("meta"))
