"""``AdapterReport``: what is trained in a model, as numbers and as a printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from prodial_kernels.linear import ProdialLinear, adapted_layers
from prodial_kernels.models.adapt.targets import path_pattern
from prodial_kernels.models.methods.low_rank import total_rank
from prodial_kernels.module_tree import module_paths
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.modules.counting import stored_elements


@dataclass(frozen=True)
class ReportRow:
    """A group of equal modules that train something.

    Attributes:
        module: Dotted path, or the pattern that ``count`` equal modules share.
        count: Number of modules in the group.
        shape: (in_features, out_features); None for a module that is not a linear layer.
        n_blocks: Number of diagonal blocks; None without a block-diagonal factor.
        block_size: Side P of a diagonal block; None without a block-diagonal factor.
        r: Rank of the LoRA part, with that of methods' terms; None for a module trained as a whole.
        trainable: Trained parameters of the whole group.
        total: Parameters of the whole group, trained and frozen.
    """

    module: str
    count: int
    shape: tuple[int, int] | None
    n_blocks: int | None
    block_size: int | None
    r: int | None
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trained share of the group, in percent."""
        return _percent(self.trainable, self.total)


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`adapter_report` found. ``str()`` is a table.

    Attributes:
        rows: Adapted layers and modules trained as a whole, equal ones together.
        trainable: Trained parameters of the model, shared ones counted once.
        total: All parameters of the model, the adapter included.
        adapted: Linear layers with an adapter, and how many there are in all.
        covered: Share of the pretrained weights that lie in layers with an adapter.
    """

    rows: tuple[ReportRow, ...]
    trainable: int
    total: int
    adapted: tuple[int, int]
    covered: float

    @property
    def percent(self) -> float:
        """Trained share of the model, in percent."""
        return _percent(self.trainable, self.total)

    def __str__(self) -> str:
        header = ("module", "in -> out", "blocks", "r", "trainable", "total", "percent")
        lines = [header, *(_cells(row) for row in self.rows)]
        numbers = _number_cells(self.trainable, self.total, self.percent)
        lines.append(("model", "", "", "", *numbers))
        first, rule, *rows, last = table_lines(lines)
        lines_of_table = [first, rule, *rows, rule, last]
        if self.adapted[0]:
            lines_of_table.append(
                f"adapters on {self.adapted[0]} of {self.adapted[1]} linear layers, which hold "
                f"{self.covered:.1%} of the weights"
            )
        return "\n".join(lines_of_table)


def table_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a table's lines: header, rule, rows; all columns but the first right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return [lines[0], "-" * len(max(lines, key=len)), *lines[1:]]


def adapter_report(model: nn.Module) -> AdapterReport:
    """Report what is trained in ``model``: read from the modules, not from a configuration."""
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module]]] = {}
    inside = {
        m for layer in adapted_layers(model).values() for m in layer.modules() if m is not layer
    }
    for module, paths in module_paths(model).items():
        if module in inside:
            continue
        # An adapter that PEFT holds has its tensors in children of the layer.
        own = module.parameters(recurse=isinstance(module, ProdialLinear))
        if any(p.requires_grad for p in own):
            key = (path_pattern(paths[0]), type(module), *_kind(module))
            groups.setdefault(key, []).append((paths[0], module))
    parameters = list(model.parameters())
    linears = [m for m in module_paths(model) if isinstance(m, nn.Linear | QuantizedLinear)]
    adapted = {layer.base_layer: layer for layer in adapted_layers(model).values()}
    weights = {id(p): p.numel() for p in map(_weight, adapted) if p is not None}
    covered = sum(weights.values()) + sum(map(_packed, adapted))
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".prodial_" in f".{n}")
    total = sum(p.numel() for p in parameters) + _packed(model)
    return AdapterReport(
        rows=tuple(_row(members) for members in groups.values()),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=total,
        adapted=(len(adapted), len(linears)),
        covered=covered / max(1, total - adapters),
    )


def _weight(layer: nn.Module) -> nn.Parameter | None:
    return layer._parameters.get("weight")


def _kind(
    module: nn.Module,
) -> tuple[tuple[int, int] | None, int | None, int | None, int | None]:
    """(shape, n_blocks, block_size, r), as in :class:`ReportRow`."""
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features), None, None, None
    if not isinstance(module, ProdialLinear):
        return None, None, None, None
    shape, rank = (module.in_features, module.out_features), total_rank(module)
    if module.prodial_blocks is None:
        return shape, None, None, rank
    return shape, module.prodial_blocks.shape[0], module.block_size, rank


def _row(members: list[tuple[str, nn.Module]]) -> ReportRow:
    path, module = members[0]
    shape, n_blocks, block_size, r = _kind(module)
    # An adapter's row covers its frozen base layer; other rows only the module's own parameters,
    # because its children have rows of their own.
    owned = [list(m.parameters(isinstance(m, ProdialLinear))) for _, m in members]
    return ReportRow(
        module=path if len(members) == 1 else path_pattern(path),
        count=len(members),
        shape=shape,
        n_blocks=n_blocks,
        block_size=block_size,
        r=r,
        trainable=sum(p.numel() for ps in owned for p in ps if p.requires_grad),
        total=sum(p.numel() for ps in owned for p in ps)
        + sum(_packed(m) for _, m in members if isinstance(m, ProdialLinear)),
    )


def _packed(module: nn.Module) -> int:
    """Count the weights in storage formats, which are no parameters; shared ones once."""
    layers = (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
    in_layers = sum(layer.in_features * layer.out_features for layer in layers)
    return in_layers + stored_elements(module)


def _cells(row: ReportRow) -> tuple[str, ...]:
    return (
        row.module if row.count == 1 else f"{row.module} ×{row.count}",
        "" if row.shape is None else f"{row.shape[0]} -> {row.shape[1]}",
        "" if row.n_blocks is None else f"{row.n_blocks} of {row.block_size}×{row.block_size}",
        "" if row.r is None else str(row.r),
        *_number_cells(row.trainable, row.total, row.percent),
    )


def _number_cells(trainable: int, total: int, percent: float) -> tuple[str, str, str]:
    return f"{trainable:,}", f"{total:,}", f"{percent:.3f}%"


def _percent(trainable: int, total: int) -> float:
    return 100.0 * trainable / total if total else 0.0
