"""ProDiaL under PEFT on a GPU: the mixers' fused paths, and bases that bitsandbytes quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.peft import ProdialPeftConfig, ProdialPeftLinear
from support import mamba_ssm_loaded  # noqa: F401
from support.models import Step, build, randomise_adapters, token_ids, training_step
from support.tiny_model import tiny_mamba2

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning")]

_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
OPTIONS = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
    "bamba": _MIXER,
    "falcon_h1": {**_MIXER, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
                  "mamba_d_ssm": 512},
}  # fmt: skip
BLOCKS = {"in_proj": 16, "out_proj": 16}


def plain(name: str) -> nn.Module:
    return build(name, hidden_size=256, **OPTIONS[name]).bfloat16()


def ids() -> Tensor:
    return token_ids(2, 96).cuda()


def by_path(step: Step) -> dict[str, Tensor]:
    """Gradients by the names of ``apply_prodial``."""
    names = {"D": "blocks", "s": "scale", "A": "a", "B": "b"}
    found = {}
    for name, gradient in step.gradients.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".prodial_")
        part = names.get(part.partition(".")[0], part)
        found[f"{path}.{part}"] = gradient
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_equals_apply_prodials(name: str, weight_is_not_read: None) -> None:
    own = plain(name)
    apply_prodial(own, ProdialConfig(r=8, n_blocks=BLOCKS))
    randomise_adapters(own)
    model = get_peft_model(plain(name), ProdialPeftConfig(r=8, n_blocks=BLOCKS))
    for path, layer in own.named_modules():
        if isinstance(layer, ProdialLinear):
            twin = model.get_base_model().get_submodule(path)
            for part, parameter in layer.adapter_parameters():
                getattr(twin, part).data.copy_(parameter)
    first, *others = (training_step(own.cuda(), ids()) for _ in range(5))
    found = training_step(model.cuda(), ids())
    assert torch.equal(found.logits, first.logits)
    gradients, expected = by_path(found), by_path(first)
    assert gradients.keys() == expected.keys()

    def off(run: dict[str, Tensor]) -> dict[str, float]:
        return {key: float((run[key] - one).norm() / one.norm()) for key, one in expected.items()}

    # Upstream's scans add in any order: some runs of one model differ too, in any gradient.
    noise = max(value for run in others for value in off(by_path(run)).values())
    assert max(off(gradients).values()) <= 4 * noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_base_that_bitsandbytes_quantised(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_mamba2(hidden_size=256).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=dtype, device_map={"": 0}
        )

    # In training upstream's fused function multiplies by the packed out_proj, which cannot work.
    expected = load().eval()(input_ids=ids()).logits
    config = ProdialPeftConfig(r=8, n_blocks=BLOCKS, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(load(), False), config).eval()
    tolerance = 0.0 if dtype == torch.float32 else 3e-2
    logits = model(input_ids=ids()).logits
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max() + 1e-4
    model.train()

    for layer in model.modules():
        if isinstance(layer, ProdialPeftLinear):
            for _, parameter in layer.adapter_parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    with torch.autocast("cuda", torch.bfloat16):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = model(input_ids=ids()).logits
        again = PeftModel.from_pretrained(
            prepare_model_for_kbit_training(load(), False), tmp_path / "adapter"
        )
        assert torch.equal(again(input_ids=ids()).logits, adapted)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": 0})
        found = reloaded(input_ids=ids()).logits
    assert (found - adapted).abs().max() <= 5e-2 * adapted.abs().max()
