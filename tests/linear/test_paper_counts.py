"""Parameter counts as printed in the paper, from adapters that are really built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial, config

LAYERS = 24
MAMBA_130M = ((768, 3072), (1536, 768))
VIM_TINY = ((192, 768), (384, 192))
FLOWERS_CLASSES = CALTECH_CLASSES = 102


class Projectors(nn.Module):
    """A model's projectors and classifier: all that ProDiaL trains, nothing else."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], classes: int | None) -> None:
        super().__init__()
        (width, inner), (inner_half, _) = shapes
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "in_proj": nn.Linear(width, inner, bias=False),
                    "out_proj": nn.Linear(inner_half, width, bias=False),
                }
            )
            for _ in range(LAYERS)
        )
        if classes is not None:
            self.head = nn.Linear(width, classes)


def trained(
    shapes: tuple[tuple[int, int], ...],
    r: int,
    *,
    in_proj: int | None = None,
    out_proj: int | None = None,
    classes: int | None = None,
    train_scale: bool = True,
) -> int:
    """Number of trained parameters with these block counts; None leaves a projector alone."""
    n_blocks = {"in_proj": in_proj, "out_proj": out_proj}
    n_blocks = {name: count for name, count in n_blocks.items() if count is not None}
    with torch.device("meta"):
        model = Projectors(shapes, classes)
    report = apply_prodial(
        model,
        ProdialConfig(
            r=r,
            target_modules=tuple(n_blocks),
            n_blocks=n_blocks,
            modules_to_save=("head",) if classes else (),
            train_scale=train_scale,
        ),
    )
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return report.trainable


def printed(count: int) -> str:
    return f"{count / 1e6:.2f}M"


# (r_b1, r_b2, r_ε, Params)
TABLE_8 = [
    (192, 384, 16, "0.65M"),
    (32, 32, 16, "0.77M"),
    (16, 32, 16, "0.80M"),
    (8, 32, 16, "0.85M"),
    (32, 16, 16, "0.88M"),
    (16, 16, 16, "0.91M"),
    (8, 16, 16, "0.96M"),
    (32, 8, 16, "1.10M"),
    (16, 8, 16, "1.13M"),
    (8, 8, 16, "1.19M"),
    (192, 384, 8, "0.35M"),
    (32, 32, 8, "0.48M"),
    (16, 32, 8, "0.50M"),
    (8, 32, 8, "0.56M"),
    (32, 16, 8, "0.59M"),
    (16, 16, 8, "0.61M"),
    (8, 16, 8, "0.67M"),
    (32, 8, 8, "0.81M"),
    (16, 8, 8, "0.84M"),
    (8, 8, 8, "0.89M"),
]


@pytest.mark.parametrize(("r_b1", "r_b2", "r", "params"), TABLE_8)
def test_table_8(r_b1: int, r_b2: int, r: int, params: str) -> None:
    count = trained(VIM_TINY, r, in_proj=r_b1, out_proj=r_b2, classes=FLOWERS_CLASSES)
    assert printed(count) == params
    head = 192 * 102 + 102
    formula = 192**2 // r_b1 + 768 + r * (192 + 768) + 384**2 // r_b2 + 192 + r * (384 + 192)
    assert count == LAYERS * formula + head


@pytest.mark.parametrize(
    ("blocks", "params", "exact"),
    [
        ({"in_proj": 64, "out_proj": 64}, "2.38M", 2_377_728),
        ({"in_proj": 32}, "1.25M", 1_253_376),
        ({"out_proj": 128}, "0.90M", 903_168),
    ],
)
def test_table_3_arc(blocks: dict[str, int], params: str, exact: int) -> None:
    """All three rows follow from Table 9: Both-Proj, In-Proj and Out-Proj."""
    count = trained(MAMBA_130M, 8, **blocks)
    assert count == exact
    assert printed(count) == params


@pytest.mark.parametrize("preset", ["arc-easy", "arc-challenge"])
def test_table_3_arc_on_the_real_architecture(preset: str) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(num_hidden_layers=LAYERS))
    assert apply_prodial(model, config.get_preset(preset).adapter).trainable == 2_377_728


@pytest.mark.parametrize(
    ("r", "blocks", "classes", "params"),
    [
        (16, {"in_proj": 192, "out_proj": 384}, CALTECH_CLASSES, "0.65M"),
        (16, {"in_proj": 192}, CALTECH_CLASSES, "0.41M"),
        (8, {"in_proj": 16, "out_proj": 16}, FLOWERS_CLASSES, "0.61M"),
        (8, {"in_proj": 8}, FLOWERS_CLASSES, "0.33M"),
        (8, {"out_proj": 32}, FLOWERS_CLASSES, "0.25M"),
    ],
)
def test_table_3_vision(r: int, blocks: dict[str, int], classes: int, params: str) -> None:
    """The vision rows that follow from Table 11."""
    assert printed(trained(VIM_TINY, r, classes=classes, **blocks)) == params


@pytest.mark.parametrize(
    ("blocks", "params"), [({"in_proj": 768}, "1.49M"), ({"out_proj": 1536}, "0.92M")]
)
def test_table_3_hellaswag_is_not_table_9(blocks: dict[str, int], params: str) -> None:
    """Printed are counts at rank 16 without s; Table 9's rank 8 with s gives other ones."""
    assert printed(trained(MAMBA_130M, 16, train_scale=False, **blocks)) == params
    assert printed(trained(MAMBA_130M, 8, **blocks)) != params
