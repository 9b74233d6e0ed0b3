"""What a list of targets would do in a model: adapted, absent, refused, or dead.

Nothing is run, and the model may be on the ``meta`` device: a configuration is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prodial_kernels._checks import check_choice
from prodial_kernels.config import ProdialConfig
from prodial_kernels.files.json_values import JsonReport
from prodial_kernels.models.adapt.families import check_mixers
from prodial_kernels.models.adapt.report import table_lines
from prodial_kernels.models.adapt.targets import find_targets, path_pattern
from prodial_kernels.models.diagnosis.published import ALL_LINEAR
from prodial_kernels.models.diagnosis.uses import use_of
from prodial_kernels.models.placements import is_recurrent
from prodial_kernels.module_patterns import compile_pattern, matches_name
from prodial_kernels.module_tree import module_paths
from prodial_kernels.quantization import QuantizedLinear

ADAPTED, DEAD, DEAD_WHEN_FUSED = "adapted", "dead", "dead when fused"
REFUSED, ABSENT, PARAMETER, UNSUPPORTED = "refused", "absent", "a parameter", "unsupported"
METHODS = ("lora", "prodial")
# PEFT 0.21.2, tuners/tuners_utils.py, _check_lora_target_modules_mamba.
_REFUSED_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_REFUSED_NAMES = ("out_proj", "conv1d")
_LINEAR = (nn.Linear, QuantizedLinear)
_LORA_LAYERS = (*_LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
# Times of a product of one odd, or one more width, over that of the next multiple of 8.
_COST = {1: "7.6", 4: "3.1"}
# A product with a narrower side takes no time that matters.
_LEAST_WIDTH = 256


@dataclass(frozen=True)
class Finding:
    """What one target does in the layers that it matches.

    Attributes:
        target: The name or expression.
        module: The layers' dotted path, layer numbers as ``*``; empty where none matches.
        count: How many there are.
        status: ``"adapted"``; ``"dead when fused"``: without effect or gradient while the fused
            kernels train; ``"dead"``: so on every path until it is merged; ``"refused"``: PEFT
            raises for the whole list; ``"unsupported"``: no layer that the method takes;
            ``"a parameter"``: it names parameters, not layers; ``"absent"``.
        why: The reason, in words.
    """

    target: str
    module: str
    count: int
    status: str
    why: str = ""


@dataclass(frozen=True)
class Diagnosis(JsonReport):
    """What a list of targets would do in a model. ``str()`` is a table.

    Attributes:
        method: ``"lora"``: PEFT's LoRA; ``"prodial"``: this package's adapters.
        findings: By target and kind of layer.
        layers: Share of the model's blocks with at least one layer whose adapter has an effect.
        mixers: The same of its mixers, or None where it has none.
        weights: Share of the model's weights that are in such layers.
        notes: What else follows, a sentence each.
    """

    method: str
    findings: Sequence[Finding]
    layers: float
    mixers: float | None
    weights: float
    notes: Sequence[str]

    @property
    def dead(self) -> list[Finding]:
        """The findings whose adapters have no effect where the fused kernels run."""
        return [f for f in self.findings if f.status in (DEAD, DEAD_WHEN_FUSED)]

    @property
    def refused(self) -> bool:
        """Whether the method raises for the whole list."""
        return any(finding.status in (REFUSED, UNSUPPORTED) for finding in self.findings)

    def __str__(self) -> str:
        rows = [
            (f.target, f"{f.module} ×{f.count}" if f.count > 1 else f.module, f.status, f.why)
            for f in self.findings
        ]
        lines = [*table_lines([("target", "layers", "", ""), *rows])]
        share = f"{self.layers:.0%} of the blocks"
        if self.mixers is not None:
            share += f", {self.mixers:.0%} of the mixers"
        lines.append(f"adapted: {share}, {self.weights:.1%} of the weights")
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])


def diagnose(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    method: str = "lora",
    exclude: Sequence[str] = (),
) -> Diagnosis:
    """Say what an adapter on ``targets`` would do in ``model``.

    Args:
        model: Not adapted; on any device, ``meta`` too.
        targets: As in PEFT: names, one regular expression for whole paths, or ``"all-linear"``.
        method: ``"lora"``: PEFT's LoRA; ``"prodial"``: :func:`prodial_kernels.apply_prodial`.
        exclude: Names or paths to leave out, as PEFT's ``exclude_modules``.

    Raises:
        ValueError: An unknown method, or a regular expression that may take for ever.
    """
    check_choice("method", method, METHODS)
    findings: list[Finding] = []
    live: list[nn.Module] = []
    matched: list[tuple[str, ...]] = []
    paths = module_paths(model)
    groups: dict[tuple[str, str, str, str], int] = {}
    for module, found_at, target in _matches(model, targets, exclude):
        status, why = _status(model, found_at, module, method)
        key = (target, path_pattern(found_at[0]), status, why)
        groups[key] = groups.get(key, 0) + 1
        if status == ADAPTED:
            live.append(module)
            matched.append(found_at)
    findings += [
        Finding(target, module, count, status, why)
        for (target, module, status, why), count in groups.items()
    ]
    hit = {finding.target for finding in findings}
    names = [targets] if isinstance(targets, str) else targets
    findings += [_unmatched(model, name) for name in names if name not in hit]
    if method == "prodial":
        findings = [_by_prodial(model, finding) for finding in findings]
    blocks = _blocks(model)
    mixers = [names[0] for module, names in paths.items() if is_recurrent(module)]
    return Diagnosis(
        method=method,
        findings=tuple(findings),
        layers=_share(blocks, matched),
        mixers=_share(mixers, matched) if mixers else None,
        weights=_weights(live) / max(1, sum(p.numel() for p in model.parameters())),
        notes=tuple(_notes(model, method, findings, live, matched)),
    )


def _matches(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[nn.Module, tuple[str, ...], str]]:
    """Yield each module that is matched, its paths, and the entry of ``targets``."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    pattern = None
    if isinstance(targets, str) and targets != ALL_LINEAR:
        pattern = compile_pattern(targets, "target_modules")
    for module, paths in module_paths(model).items():
        if any(matches_name(paths[0], name) for name in exclude):
            continue
        if targets == ALL_LINEAR:
            if isinstance(module, _LINEAR) and module is not head:
                yield module, paths, ALL_LINEAR
        elif pattern is not None:
            if pattern.fullmatch(paths[0]):
                yield module, paths, str(targets)
        else:
            for name in targets:
                if matches_name(paths[0], name):
                    yield module, paths, name
                    break


def _status(
    model: nn.Module, paths: tuple[str, ...], module: nn.Module, method: str
) -> tuple[str, str]:
    path, _, name = paths[0].rpartition(".")
    allowed = _LORA_LAYERS if method == "lora" else _LINEAR
    if not isinstance(module, allowed):
        return UNSUPPORTED, f"a {type(module).__name__}"
    if method == "prodial":
        return ADAPTED, ""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _REFUSED_TYPES and name in _REFUSED_NAMES:
        return REFUSED, f"PEFT raises ValueError for {name} of {kind}"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return REFUSED, f"PEFT raises ValueError unless {module.groups} groups divide r"
    owner = model.get_submodule(path)
    use = use_of(owner, name)
    if use.dead:
        return DEAD, f"{type(owner).__name__} reads {name}.weight: no effect until it is merged"
    if use.dead_when_fused:
        return DEAD_WHEN_FUSED, (
            f"{type(owner).__name__} hands {name}.weight to its fused kernel in training"
        )
    return ADAPTED, ""


def _by_prodial(model: nn.Module, finding: Finding) -> Finding:
    """Return what ``apply_prodial`` makes of it: mixers call their layers, or it refuses."""
    if finding.status != ADAPTED:
        return finding
    wanted = "".join(r"\d+\." if p == "*" else rf"{p}\." for p in finding.module.split("."))
    try:
        config = ProdialConfig(r=1, target_modules=f"{wanted[:-2]}", allow_partial=True)
        check_mixers(model, find_targets(model, config))
    except ValueError as error:
        return Finding(finding.target, finding.module, finding.count, REFUSED, str(error))
    return finding


def _unmatched(model: nn.Module, name: str) -> Finding:
    owners = [
        path_pattern(path)
        for path, parameter in model.named_parameters()
        if matches_name(path, name) and parameter.ndim >= 2
    ]
    if not owners:
        return Finding(name, "", 0, ABSENT, "matches nothing in this model")
    (pattern, count), *_ = Counter(owners).most_common(1)
    why = "of all experts in one; PEFT takes it as target_parameters" if _is_3d(model, name) else ""
    return Finding(name, pattern, count, PARAMETER, why)


def _is_3d(model: nn.Module, name: str) -> bool:
    return any(p.ndim == 3 for path, p in model.named_parameters() if matches_name(path, name))


def _blocks(model: nn.Module) -> list[str]:
    """Return the paths of the model's blocks: the children of its longest list of modules."""
    lists = [
        (len(module), path)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and "expert" not in path
    ]
    if not lists:
        return []
    length, path = max(lists, key=lambda item: (item[0], -len(item[1])))
    return [f"{path}.{i}" if path else str(i) for i in range(length)]


def _share(owners: list[str], matched: list[tuple[str, ...]]) -> float:
    if not owners:
        return 0.0
    inside = {
        owner
        for owner in owners
        if any(path.startswith(f"{owner}.") for paths in matched for path in paths)
    }
    return len(inside) / len(owners)


def _weights(layers: list[nn.Module]) -> int:
    """Count weights, each once."""
    counted = {
        id(weight): weight.numel() for layer in layers if (weight := _weight(layer)) is not None
    }
    packed = {
        id(layer): layer.in_features * layer.out_features
        for layer in layers
        if isinstance(layer, QuantizedLinear)
    }
    return sum(counted.values()) + sum(packed.values())


def _weight(layer: nn.Module) -> Any:
    return layer._parameters.get("weight")


def _notes(
    model: nn.Module,
    method: str,
    findings: Sequence[Finding],
    live: list[nn.Module],
    matched: list[tuple[str, ...]],
) -> Iterator[str]:
    dead = {finding.module.rpartition(".")[2] for finding in findings if finding.status == DEAD}
    if dead:
        yield (
            f"{', '.join(sorted(dead))}: LoRA has no effect and no gradient until it is merged, "
            "and then changes the model; adapt it with apply_prodial, or leave it out"
        )
    fused = {f.module.rpartition(".")[2] for f in findings if f.status == DEAD_WHEN_FUSED}
    if fused:
        yield (
            f"{', '.join(sorted(fused))}: LoRA gets no gradient while mamba-ssm's kernels train; "
            "apply_prodial keeps both the kernels and the adapter"
        )
    tied = Counter(id(_weight(layer)) for layer in live if _weight(layer) is not None)
    shared = any(count > 1 for count in tied.values()) or any(len(paths) > 1 for paths in matched)
    if shared and method == "lora":
        yield (
            "some of these layers share one weight (blocks that are used at several places): "
            "PEFT's merge_and_unload adds to it once for each place, so the merged model is "
            "another one; keep the adapter beside it, or use apply_prodial, which merges once"
        )
    without = sum(1 for module in model.modules() if is_recurrent(module))
    if without and not any(_inside_mixer(model, paths[0]) for paths in matched):
        yield (
            f"none of the {without} mixers is adapted: only attention, MLP or experts are trained"
        )
    yield from _width_notes(live)


def _inside_mixer(model: nn.Module, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return bool(parent) and is_recurrent(model.get_submodule(parent))


def _width_notes(live: list[nn.Module]) -> Iterator[str]:
    widths = {
        width
        for layer in live
        if isinstance(layer, _LINEAR)
        for width in (layer.in_features, layer.out_features)
        if width % 8 and width >= _LEAST_WIDTH
    }
    for width in sorted(widths):
        cost = _COST[1] if width % 2 else _COST[4] if width % 4 == 0 else "3.1 to 7.6"
        yield (
            f"a width of {width} is no multiple of 8: on an H200 such a product takes up to {cost} "
            f"times that of {-(-width // 8) * 8} columns (measured at 3071 and 3076 of 3072)"
        )
