"""Weight decay of trainers that know nothing of ProDiaL pulls towards the pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, ProdialLinear, adapter_disabled, apply_prodial
from prodial_kernels.training.step.optimizers import adapter_parameter_groups
from support.models import build

ROWS = [{"input_ids": [3 + (i * j) % 40 for j in range(12)]} for i in range(16)]


def scales(model: nn.Module) -> torch.Tensor:
    """Every s of a model, one after the other."""
    layers = [layer for layer in model.modules() if isinstance(layer, ProdialLinear)]
    return 1 + torch.cat([layer.prodial_scale.detach() for layer in layers])


def trained(folder: Path, decay: float, own_groups: bool = False, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2))
    arguments = transformers.TrainingArguments(
        str(folder), weight_decay=decay, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_strategy="no", lr_scheduler_type="constant", **options,
    )  # fmt: skip
    optimizer = None
    if own_groups:
        groups = adapter_parameter_groups(model, weight_decay=decay)
        optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    rows = [row | {"labels": row["input_ids"]} for row in ROWS]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    if not own_groups:
        decayed = trainer.get_decay_parameter_names(model)
        assert sum(name.endswith("prodial_scale") for name in decayed) == 4
    trainer.train()
    return model


# What transformers says of kernels that are not there, and torch of loaders without a GPU.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_transformers_trainer_leaves_s_about_one(tmp_path: Path) -> None:
    options = {"max_steps": 24, "learning_rate": 1e-2}
    plain, decayed, own = (
        trained(tmp_path, 0.0, **options),
        trained(tmp_path, 0.5, **options),
        trained(tmp_path, 0.5, own_groups=True, **options),
    )
    moved = (scales(plain) - 1).abs().mean()
    assert moved > 0.01
    # s itself would be pulled to (1 - 0.005)^24 = 0.89; s - 1 is pulled to 0.
    assert abs(scales(decayed).mean() - scales(own).mean()) < 0.02
    assert (scales(decayed) - 1).abs().mean() < moved


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_decay_alone_ends_at_the_pretrained_model(tmp_path: Path) -> None:
    model = trained(tmp_path, 100.0, max_steps=60, learning_rate=5e-3)
    ids = torch.tensor([ROWS[3]["input_ids"]])
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        with adapter_disabled(model):
            pretrained = model(input_ids=ids, use_cache=False).logits
    assert (scales(model) - 1).abs().max() < 0.03
    torch.testing.assert_close(found, pretrained, rtol=0.1, atol=0.1)
