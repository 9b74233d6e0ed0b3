"""``VisionMamba``: Vision Mamba (arXiv:2401.09417) as published, without its variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.models.vision_mamba.norm import AddRMSNorm

SIZES = {"tiny": 192, "small": 384, "base": 768}
"""Width of the published models, all of 24 layers; 7, 26 and 98 million parameters."""


class VisionMamba(nn.Module):
    """Image classifier: patches, a class token in the middle, bidirectional mixers, a head.

    Names and shapes of the parameters are those of the published checkpoints, which
    :meth:`load_pretrained` reads. For fine-tuning: ``apply_prodial(model, ProdialConfig(...,
    modules_to_save=("head",)))``. It runs on any device; on a CUDA device with the kernels of
    mamba-ssm and causal-conv1d.
    """

    def __init__(
        self,
        width: int = 192,
        *,
        depth: int = 24,
        num_classes: int = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        stride: int | None = None,
        d_state: int = 16,
        drop_path: float = 0.0,
        scan: str = "auto",
    ) -> None:
        """Build a model with random weights. See :meth:`from_size` for the published sizes.

        Args:
            width: d, channels of a token.
            depth: Number of mixers.
            num_classes: Outputs of the head.
            image_size: Height and width of the images, in pixels.
            patch_size: Side of a patch, in pixels.
            stride: From one patch to the next, in pixels; default ``patch_size``.
            d_state: N, states per channel.
            drop_path: Probability in the last layer of leaving its mixer out for a sample, in
                training; it grows linearly from the first layer.
            scan: ``"auto"`` (CUDA functions on a CUDA device, else PyTorch), ``"cuda"`` or
                ``"torch"``.

        Raises:
            ValueError: ``image_size`` is smaller than a patch, or ``drop_path`` not in [0, 1).
        """
        super().__init__()
        stride = patch_size if stride is None else stride
        if image_size < patch_size:
            raise ValueError(
                f"image_size={image_size} must be at least patch_size={patch_size}; enlarge the "
                "images or shrink the patches"
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        side = (image_size - patch_size) // stride + 1
        self.image_size = image_size
        self.patch_embed = _PatchEmbedding(width, patch_size, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.layers = nn.ModuleList(
            _Block(
                width,
                BidirectionalMamba(width, d_state=d_state, scan=scan),
                drop_path * max(index - 1, 0) / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.drop_path = _DropPath(drop_path)
        self.norm_f = AddRMSNorm(width)
        self.head = nn.Linear(width, num_classes)
        self._initialise()

    @classmethod
    def from_size(cls, size: str, **options: Any) -> VisionMamba:
        """Build Vim-T, Vim-S or Vim-B with random weights.

        Args:
            size: ``"tiny"``, ``"small"`` or ``"base"``.
            options: As of the constructor, except ``width``.

        Raises:
            ValueError: An unknown size.
        """
        check_choice("size", size, tuple(SIZES))
        return cls(SIZES[size], **options)

    def forward(self, images: Tensor) -> Tensor:
        """Images [b, 3, image_size, image_size] -> logits [b, num_classes]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the class token behind the last norm, [b, width].

        Raises:
            ValueError: Images of another shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [batch, {', '.join(map(str, expected))}], got "
                f"{list(images.shape)}; resize them, or build the model with another image_size"
            )
        patches = self.patch_embed(images)
        middle = patches.shape[1] // 2
        token = self.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)
        return self.encode(x + self.pos_embed)[:, middle]

    def encode(self, tokens: Tensor) -> Tensor:
        """Run the layers and the last norm: [b, l, width] -> [b, l, width], of any length l."""
        x, residual = tokens, None
        for layer in self.layers:
            x, residual = layer(x, residual)
        x, _ = self.norm_f(self.drop_path(x), residual)
        return x

    def load_pretrained(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a published checkpoint.

        A head of another number of classes keeps its fresh weights, and position embeddings of
        another grid are interpolated (bicubic), as is usual when a classifier is fine-tuned.

        Args:
            checkpoint: A state dict, or a mapping that holds one under ``"model"``: what
                ``torch.load(path, weights_only=True)`` gives.

        Raises:
            RuntimeError: Names or shapes that do not fit, from ``load_state_dict``.
        """
        state = dict(checkpoint.get("model", checkpoint))
        own = self.state_dict()
        if "head.weight" in state and state["head.weight"].shape != own["head.weight"].shape:
            state |= {name: own[name] for name in ("head.weight", "head.bias")}
        position = state.get("pos_embed")
        if position is not None and position.shape[1] != self.pos_embed.shape[1]:
            state["pos_embed"] = _resize_positions(position, self.pos_embed.shape[1] - 1)
        self.load_state_dict(state)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise the parameters that no part has initialised itself."""
        for tensor in (self.cls_token, self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(tensor, std=0.02)
        projection = self.patch_embed.proj
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        for layer in (self.head, projection):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for name, parameter in self.layers.named_parameters():
            # The residual stream adds up one output of each layer.
            if name.endswith("out_proj.weight"):
                parameter.div_(len(self.layers) ** 0.5)


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Images [b, 3, h, w] -> [b, patches, width]."""
        return self.proj(images).flatten(2).mT


class _Block(nn.Module):
    """Add, norm, mix: the sum is passed on beside the mixer's output, so that both fuse."""

    def __init__(self, width: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = AddRMSNorm(width)
        self.mixer = mixer
        self.drop_path = _DropPath(drop_path)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the residual stream, both [b, l, width]."""
        normed, total = self.norm(x if residual is None else self.drop_path(x), residual)
        return self.mixer(normed), total


class _DropPath(nn.Module):
    """Stochastic depth: zeroes whole samples in training, and scales the others up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """[b, ...] -> the same shape."""
        if not self.training or not self.probability:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)

    def extra_repr(self) -> str:
        """The probability."""
        return f"probability={self.probability:.3g}"


def _resize_positions(position: Tensor, patches: int) -> Tensor:
    """[1, p + 1, d] of a square grid -> [1, patches + 1, d]; the class token's stays."""
    old, middle = position.shape[1] - 1, (position.shape[1] - 1) // 2
    token = position[:, middle : middle + 1]
    grid = torch.cat([position[:, :middle], position[:, middle + 1 :]], dim=1)
    sides = round(old**0.5), round(patches**0.5)
    planes = grid.mT.unflatten(-1, (sides[0], sides[0])).float()
    resized = F.interpolate(planes, (sides[1], sides[1]), mode="bicubic", align_corners=False)
    grid = resized.flatten(2).mT.to(position.dtype)
    middle = patches // 2
    return torch.cat([grid[:, :middle], token, grid[:, middle:]], dim=1)
