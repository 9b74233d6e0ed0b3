"""Under PEFT the package's own layers run, in the package's own mixers: equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.peft.layer import PARTS
from support.models import FAMILIES, build, token_ids
from support.peft_models import BLOCKS, adapted, config, layers, move


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, ProdialLinear):
            for name, parameter in module.adapter_parameters():
                found[f"{path.removeprefix('base_model.model.')}.{name}"] = parameter.grad
    return loss.detach(), found


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_gradients_and_merge(name: str) -> None:
    model = adapted(name, lora_alpha=5)
    own = build(name)
    apply_prodial(own, ProdialConfig(r=2, lora_alpha=5, n_blocks=BLOCKS))
    paths = dict(model.get_base_model().named_modules())
    for path, module in own.named_modules():
        if isinstance(module, ProdialLinear):
            for part, parameter in module.adapter_parameters():
                parameter.data.copy_(getattr(paths[path], part))
    # The same modules are adapted, and the same mixers take the package's paths.
    assert {p: type(m).__name__ for p, m in own.named_modules() if "base_layer" not in p} == {
        p: type(m).__name__.replace("PeftLinear", "Linear")
        for p, m in paths.items()
        if not any(part in p for part in ("base_layer", *PARTS.values()))
    }

    loss, gradients = loss_and_gradients(model)
    expected, wanted = loss_and_gradients(own)
    assert torch.equal(loss, expected)
    assert gradients.keys() == wanted.keys()
    assert len(gradients) == 4 * len(layers(model)) >= 16
    for key, gradient in gradients.items():
        assert gradient.any(), key
        assert torch.equal(gradient, wanted[key]), key

    logits = model.eval()(input_ids=token_ids()).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(build(name))
    assert not any(isinstance(module, ProdialLinear) for module in merged.modules())
    assert_untouched(merged, build(name))
    torch.testing.assert_close(merged(input_ids=token_ids()).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "zamba2", "falcon_mamba"])
def test_unload_gives_the_model_back(name: str) -> None:
    plain = build(name).eval()
    expected = plain(input_ids=token_ids()).logits
    model = adapted(name)
    back = model.unload().eval()
    assert_untouched(back, plain)
    assert torch.equal(back(input_ids=token_ids()).logits, expected)
    assert back.state_dict().keys() == plain.state_dict().keys()


def assert_untouched(model: nn.Module, plain: nn.Module) -> None:
    """Every module has the class that it has in a plain model, and nothing of PEFT is left."""
    classes = {path: type(module) for path, module in plain.named_modules()}
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not [name for name in vars(model) if "peft" in name and "hf_peft" not in name]


def test_a_layer_at_two_places_is_one_adapted_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleDict({"in_proj": nn.Linear(8, 8)})
            self.second = nn.ModuleDict({"in_proj": self.first["in_proj"]})

        def forward(self, x: Tensor) -> Tensor:
            return self.second["in_proj"](self.first["in_proj"](x))

    plain = Shared()
    x = torch.randn(3, 8)
    model = get_peft_model(plain, config(n_blocks=None))
    move(model, "default")
    assert plain.first["in_proj"] is plain.second["in_proj"]
    (layer,) = layers(model)
    expected = model(x)
    assert not torch.equal(layer.base_layer.weight, layer.weight)
    merged = model.merge_and_unload()
    assert merged.first["in_proj"] is merged.second["in_proj"]
    torch.testing.assert_close(merged(x), expected)


def test_16_bit_models_keep_fp32_masters() -> None:
    model = adapted("mamba2").to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert layers(model)[0].base_layer.weight.dtype == torch.bfloat16
