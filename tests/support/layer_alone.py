"""Use layers and adapters where torch, triton and safetensors alone can be imported.

A script, run by a test and by ``.ci/run`` on the wheel: ``python layer_alone.py DIRECTORY``.
"""

import sys

OTHERS = (
    "transformers", "tokenizers", "huggingface_hub", "tqdm", "matplotlib", "peft", "datasets",
    "accelerate", "bitsandbytes", "PIL", "yaml", "packaging",
)  # fmt: skip


def use_layers_and_adapters(directory: str) -> None:
    import torch
    from torch import nn

    import prodial_kernels as prodial

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    layer = prodial.ProdialLinear.from_linear(nn.Linear(8, 6), r=2, n_blocks=4)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    y = prodial.prodial_linear(
        x, torch.eye(8), blocks=torch.zeros(8, 1, 1), scale=None, lora_a=None, lora_b=None
    )
    assert torch.equal(y, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.out_proj(self.in_proj(x))

    model = Model()
    pretrained = model(x)
    prodial.apply_prodial(model, prodial.ProdialConfig(r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    tuned = model(x)
    assert not torch.equal(tuned, pretrained)
    prodial.save_adapter(model, directory)
    prodial.remove_prodial(model)
    assert torch.equal(model(x), pretrained)
    prodial.load_adapter(model, directory)
    assert torch.equal(model(x), tuned)
    said = ""
    try:
        import prodial_kernels.peft
    except ImportError as error:
        said = str(error)
    assert 'needs peft, not installed here: pip install "prodial-kernels[peft]"' in said
    prodial.merge_prodial(model)
    torch.testing.assert_close(model(x), tuned)
    prodial.quantize_model(model, "int8")


if __name__ == "__main__":
    # Importing a name whose module is None raises ModuleNotFoundError.
    sys.modules.update(dict.fromkeys(OTHERS))  # type: ignore[arg-type]
    use_layers_and_adapters(sys.argv[1])
    print("layers and adapters work with", ", ".join(OTHERS), "out of reach")
