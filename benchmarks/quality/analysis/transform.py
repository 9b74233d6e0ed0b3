"""T = W⁺ W': how near a fully trained projector is to its pretrained self times a diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Deviation", "analyse", "projector_weights", "transform"]


def transform(pretrained: Tensor, trained: Tensor) -> Tensor:
    """The T nearest to the identity with the least ‖W T − W'‖, in fp64.

    T = I + W⁺ (W' − W). Where W has independent columns (more outputs than inputs, as in_proj),
    this is the paper's W⁺ W'. A wide W (out_proj) has many T with W T = W'; the paper's W⁺ W' would
    there be a projection even if nothing was trained, with W⁺ W for the identity.

    Args:
        pretrained: W [out, in].
        trained: W' [out, in].

    Raises:
        ValueError: Other shapes.
    """
    if pretrained.shape != trained.shape or pretrained.ndim != 2:
        raise ValueError(
            f"expected two matrices of one shape, got {list(pretrained.shape)} and "
            f"{list(trained.shape)}"
        )
    W, changed = pretrained.double(), trained.double()
    identity = torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
    return identity + torch.linalg.pinv(W) @ (changed - W)


@dataclass(frozen=True)
class Deviation:
    """How T differs from the identity.

    Attributes:
        diagonal: Mean of |T − I| on the diagonal.
        elsewhere: Mean of |T − I| off it.
        ratio: Of the two.
        share: Of ‖T − I‖² that lies on the diagonal.
        even_share: What that share would be if the deviation were spread evenly, 1 / d.
        explained: 1 − ‖W T − W'‖² / ‖W' − W‖²: how much of the change is of the form W T.
        even_explained: What a change without any structure would give, in / out features (at
            most 1).
        by_diagonal: As ``explained``, for the best diagonal T, column by column.
        even_by_diagonal: What a change without structure would give, 1 / out features.
        change: ‖W' − W‖ / ‖W‖.
    """

    diagonal: float
    elsewhere: float
    ratio: float
    share: float
    even_share: float
    explained: float
    even_explained: float
    by_diagonal: float
    even_by_diagonal: float
    change: float


def _deviation(W: Tensor, changed: Tensor, T: Tensor) -> Deviation:
    W, changed = W.double(), changed.double()
    off = T - torch.eye(len(T), dtype=T.dtype, device=T.device)
    size = len(T)
    on = torch.diagonal(off)
    total = off.abs().sum()
    diagonal = on.abs().mean().item()
    elsewhere = ((total - on.abs().sum()) / (size * (size - 1))).item()
    change = changed - W
    norm = change.square().sum().clamp(min=1e-300)
    # The best scale of each column by itself.
    scales = (W * changed).sum(0) / W.square().sum(0).clamp(min=1e-300)
    return Deviation(
        diagonal=diagonal,
        elsewhere=elsewhere,
        ratio=diagonal / max(elsewhere, 1e-300),
        share=(on.square().sum() / off.square().sum().clamp(min=1e-300)).item(),
        even_share=1 / size,
        explained=(1 - (W @ T - changed).square().sum() / norm).item(),
        even_explained=min(1.0, W.shape[1] / W.shape[0]),
        even_by_diagonal=1 / W.shape[0],
        by_diagonal=(1 - (W * scales - changed).square().sum() / norm).item(),
        change=(change.norm() / W.norm()).item(),
    )


def projector_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of every ``in_proj`` and ``out_proj``, adapters merged, by dotted path."""
    from prodial_kernels import ProdialLinear

    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in ("in_proj", "out_proj"):
            continue
        if isinstance(module, ProdialLinear):
            found[path] = module.adapted_weight().detach()
        elif isinstance(module, nn.Linear):
            found[path] = module.weight.detach()
    return found


def analyse(
    pretrained: Mapping[str, Tensor], trained: Mapping[str, Tensor], folder: Path
) -> dict[str, Any]:
    """Compare projectors, write ``transform.json``'s content and pictures.

    Args:
        pretrained: Weights by path, as :func:`projector_weights` gives them.
        trained: The same after training.
        folder: Gets ``transform-<projector>.png``: T of the middle layer, |T − I| summed over all.

    Returns:
        ``{"layers": {path: Deviation}, "mean": {projector: Deviation}}``, as plain values.

    Raises:
        ValueError: Other paths or shapes, or nothing changed.
    """
    from benchmarks.quality.report.plots import draw_transform

    if pretrained.keys() != trained.keys() or not pretrained:
        odd = sorted(pretrained.keys() ^ trained.keys())[:4]
        raise ValueError(f"expected the same projectors before and after, got {odd or 'none'}")
    if all(torch.equal(pretrained[path], trained[path]) for path in pretrained):
        raise ValueError("the projectors are unchanged: train them (methods full, ft-both, t-free)")
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, Deviation] = {}
    means: dict[str, dict[str, float]] = {}
    for projector in ("in_proj", "out_proj"):
        paths = [path for path in pretrained if path.endswith(projector)]
        summed: Tensor | None = None
        middle: Tensor | None = None
        for i, path in enumerate(paths):
            T = transform(pretrained[path], trained[path])
            layers[path] = _deviation(pretrained[path], trained[path], T)
            off = (T - torch.eye(len(T), dtype=T.dtype, device=T.device)).abs()
            summed = off if summed is None else summed + off
            middle = T if i == len(paths) // 2 else middle
        if summed is None or middle is None:
            continue
        each = [asdict(layers[path]) for path in paths]
        means[projector] = {key: sum(d[key] for d in each) / len(each) for key in each[0]}
        draw_transform(
            f"{projector} of {paths[len(paths) // 2]}", middle.cpu().numpy(),
            summed.cpu().numpy(), folder / f"transform-{projector}.png",
        )  # fmt: skip
    return {"layers": {path: asdict(d) for path, d in layers.items()}, "mean": means}
