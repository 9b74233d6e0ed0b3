"""What of a model decides how much memory training it takes: counts, shapes, and nothing else.

:func:`describe_model` reads them off a model; one on the ``meta`` device, without any storage, will
do, so that a plan can be made before weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prodial_kernels.linear import ADDED, BESIDE, OFFSET, adapted_layers
from prodial_kernels.models.adapt.state import inserted_into, is_adapted
from prodial_kernels.models.layers.blocks import blocks_of, has_separate_norm, mixer_of
from prodial_kernels.models.layers.fused_norms import is_fused
from prodial_kernels.models.methods.low_rank import total_rank
from prodial_kernels.models.mixers import hf
from prodial_kernels.models.mixers.branch import branch_rank
from prodial_kernels.quantization.modules.selection import kind_of, select_everything
from prodial_kernels.training.memory.block_parts import BlockParts, parts_of

MAMBA, MAMBA2, OTHER = "mamba", "mamba2", "other"


@dataclass(frozen=True)
class LayerShape:
    """One block of a model: its norm, its mixer, and what else is in it.

    Attributes:
        mixer: ``"mamba"``, ``"mamba2"``, or ``"other"`` (attention, an MLP, a mixture of both).
        fused: Whether the mixer runs as one function that keeps little; else by separate kernels.
        width: Features d of the residual stream.
        inner: Features E inside the mixer; 0 for ``"other"``.
        state: State size N of the recurrence.
        dt_rank: Features of Mamba-1's dt before ``dt_proj``; 0 for other mixers.
        groups: Groups of B and C of Mamba-2; 0 for other mixers.
        projected: Features that ``in_proj`` gives.
        rank: Rank of the adapters on its projectors; 0 without.
        weights: Shapes (N, K) of its linear layers.
        fused_norm: Whether its norms run as one kernel each, as ``fuse_norms`` makes those of
            transformers do, and keep their input as it is; else they keep it in fp32.
        separate_norm: Whether the norm is a module that the block calls on its input and whose
            output goes to the mixer alone, so that it can be computed again. Else it is one with
            the addition before it and keeps the fp32 residual, as in mamba_ssm.
        rounds_input: Whether the block reads its input only rounded to the norm's dtype, but for
            adding it to the output: then a checkpoint in that dtype loses nothing.
        two_streams: Whether it takes the last mixer's output and the fp32 residual as two inputs.
        trains_a: Whether A_log trains, so that A's own exponential is kept beside A.
        fp32_residual: Whether what goes from block to block is in fp32 whatever the model's dtype.
        chunk: Tokens of a chunk of Mamba-2's scan.
        scales_projection: Whether what ``in_proj`` gives is multiplied by factors of the model's.
        copies_convolved: Whether the convolution reads a copy of its part of that, as it does where
            a mixer has heads of Mamba-1.
        parts: What it has beside the mixer.
    """

    mixer: str
    fused: bool
    width: int
    inner: int
    state: int
    dt_rank: int
    groups: int
    projected: int
    rank: int
    weights: tuple[tuple[int, int], ...]
    fused_norm: bool
    separate_norm: bool
    rounds_input: bool
    two_streams: bool
    trains_a: bool = False
    fp32_residual: bool = True
    chunk: int = 256
    scales_projection: bool = False
    copies_convolved: bool = False
    parts: BlockParts = field(default_factory=BlockParts)

    def __hash__(self) -> int:
        """By what tells blocks of one model apart; the rest is compared where that is equal."""
        return hash((self.mixer, self.inner, self.projected, self.weights))


@dataclass(frozen=True)
class FrozenPart:
    """Frozen weights of one kind that can be stored in 4 or 8 bits.

    Attributes:
        kind: Such as ``"projectors"`` or ``"experts"``, as
            :func:`~prodial_kernels.quantization.modules.selection.kind_of` calls it.
        weights: (number, N, K) of each; a mixture's experts are several of one shape.
        dense_bytes: What they take as they are.
    """

    kind: str
    weights: tuple[tuple[int, int, int], ...]
    dense_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """A model, as :mod:`prodial_kernels.training.memory.plan` takes it.

    Attributes:
        layers: Its blocks in order.
        width: Features that the head takes.
        vocabulary: Logits of a token.
        tied: Whether the head's weight is the embedding's.
        embedding_bytes: Of the embedding.
        head_bytes: Of the head; 0 where it is tied.
        parts: What else is frozen and can be stored in 4 or 8 bits, by kind.
        other_bytes: Of everything else that is frozen.
        stores_ends: Whether embedding and head can be stored so; one that is trained cannot.
        inserted: Tokens that blocks read beside a text's own, of affix- and prompt-tuning.
        trained: Trained elements.
        trained_bytes: What these take.
        adapted: Whether an adapter is trained, and not every weight.
    """

    layers: tuple[LayerShape, ...]
    width: int
    vocabulary: int
    tied: bool
    embedding_bytes: int
    head_bytes: int
    parts: tuple[FrozenPart, ...]
    other_bytes: int
    trained: int
    trained_bytes: int
    adapted: bool
    stores_ends: bool = True
    inserted: int = 0


def describe_model(model: nn.Module, *, kernels: bool) -> ModelShape:
    """Read a model's shape off it.

    Args:
        model: A causal language model of transformers or mamba_ssm, ready for training: with its
            adapters, or with every weight trained, and with its norms fused where they will be. It
            may be on the ``meta`` device, and dense although its projectors will be quantised.
        kernels: Whether mamba_ssm's and causal_conv1d's kernels are installed where it will run.

    Raises:
        ValueError: No list of blocks, no embedding or no head is found.
    """
    embedding, head = _ends(model)
    ends = {id(embedding.weight), id(head.weight)}
    parts, stored = _parts(model, ends)
    other_bytes = trained = trained_bytes = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
            trained_bytes += parameter.nbytes
        elif id(parameter) not in ends | stored:
            other_bytes += parameter.nbytes
    described = (
        _describe_layer(block, kernels, head.weight.shape[1]) for block in blocks_of(model)
    )
    # One object for all that are alike: a plan compares and counts them thousands of times.
    kinds: dict[LayerShape, LayerShape] = {}
    layers = tuple(kinds.setdefault(layer, layer) for layer in described)
    tied = head.weight is embedding.weight
    frozen = not embedding.weight.requires_grad
    return ModelShape(
        layers=layers,
        width=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        tied=tied,
        embedding_bytes=embedding.weight.nbytes if frozen else 0,
        head_bytes=0 if tied or head.weight.requires_grad else head.weight.nbytes,
        parts=parts,
        other_bytes=other_bytes,
        trained=trained,
        trained_bytes=trained_bytes,
        adapted=is_adapted(model),
        stores_ends=ends <= stored,
        inserted=inserted_into(model),
    )


def _parts(model: nn.Module, ends: set[int]) -> tuple[tuple[FrozenPart, ...], set[int]]:
    """What of a model can be stored, by kind and without ``ends``; and the ids of all that can."""
    chosen = select_everything(model)
    found: dict[str, list[tuple[int, nn.Parameter]]] = {}
    stored: set[int] = set()
    tied = [layers for _, layers in chosen.tied]
    for paths in (*chosen.linears, *chosen.embeddings, *tied, *chosen.experts):
        kind = kind_of(paths[0], model)
        for name, weight in model.get_submodule(paths[0])._parameters.items():
            if weight is None or weight.ndim < 2 or name.startswith(BESIDE):
                continue
            stored.add(id(weight))
            if id(weight) not in ends:
                number = len(weight) if weight.ndim == 3 else 1
                found.setdefault(kind, []).append((number, weight))
    parts = (
        FrozenPart(
            kind,
            tuple((number, weight.shape[-2], weight.shape[-1]) for number, weight in weights),
            sum(weight.nbytes for _, weight in weights),
        )
        for kind, weights in found.items()
    )
    return tuple(parts), stored


def _describe_layer(block: nn.Module, kernels: bool, width: int) -> LayerShape:
    mixer: Any = mixer_of(block)
    separate = has_separate_norm(block)
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    adapters = [total_rank(layer) for layer in adapted_layers(block).values()]
    # What ParallelAdapter keeps is what a term of its width would.
    adapters += [rank for module in block.modules() if (rank := branch_rank(module))]
    shapes = tuple((linear.out_features, linear.in_features) for linear in linears)
    kind, inner, state, dt_rank, groups, projected = OTHER, 0, 0, 0, 0, 0
    fused = False
    if mixer is not None:
        in_transformers = hf.recognises(mixer)
        calls_fused = not in_transformers or hf.fused_function(mixer) is not None
        width, inner = mixer.in_proj.in_features, mixer.out_proj.in_features
        projected = mixer.in_proj.out_features
        if "x_proj" in mixer._modules:
            kind = MAMBA
            state = mixer.A_log.shape[-1]
            dt_rank = mixer.x_proj.out_features - 2 * state
            # FalconMamba's norms of dt, B and C are outside the fused function.
            fused = kernels and calls_fused and not hasattr(mixer, "b_layernorm")
        elif "x_proj_weight" in mixer._parameters:
            # Zamba's, whose heads are Mamba-1 mixers with their weights in one tensor.
            kind = MAMBA
            state = mixer.A_log.shape[-1]
            dt_rank = mixer.x_proj_weight.shape[1] - 2 * state
        elif "dt_bias" in mixer._parameters:
            kind = MAMBA2
            heads = mixer.dt_bias.shape[0]
            groups = mixer.n_groups if hasattr(mixer, "n_groups") else mixer.ngroups
            state = (projected - 2 * inner - heads) // (2 * groups)
            gated = getattr(mixer, "norm", None)
            norm_first = in_transformers and getattr(gated, "norm_before_gate", False)
            fused = kernels and calls_fused and not norm_first
    return LayerShape(
        mixer=kind,
        fused=fused,
        width=width,
        inner=inner,
        state=state,
        dt_rank=dt_rank,
        groups=groups,
        projected=projected,
        rank=max(adapters, default=0),
        weights=shapes,
        fused_norm=any(map(is_fused, block.modules())),
        separate_norm=separate,
        rounds_input=separate and block.get_submodule("norm").weight.dtype != torch.float32,
        two_streams=hasattr(block, "fused_add_norm"),
        fp32_residual=bool(getattr(block, "residual_in_fp32", False)),
        chunk=int(getattr(mixer, "chunk_size", 256)),
        scales_projection=hasattr(mixer, "mup_vector") or hasattr(block, "mup_vector"),
        copies_convolved=mixer is not None and "x_proj_weight" in mixer._parameters,
        parts=parts_of(block, mixer),
        trains_a=mixer is not None and _trains(mixer, "A_log"),
    )


def _trains(module: nn.Module, name: str) -> bool:
    """Whether a parameter, or its offset, requires a gradient."""
    held = (module._parameters.get(n) for n in (name, OFFSET + name, f"{ADDED}scan_{name}"))
    return any(parameter is not None and parameter.requires_grad for parameter in held)


def _ends(model: nn.Module) -> tuple[Any, Any]:
    """Return embedding and head."""
    head = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    for what, found in (("embedding", embedding), ("head", head)):
        if getattr(found, "weight", None) is None:
            raise ValueError(
                f"{type(model).__name__} has no {what} that its memory could be planned with"
            )
    return embedding, head
