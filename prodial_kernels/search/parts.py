"""What a search may switch on in a model, the numbers of each part, and the runs they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prodial_kernels._checks import check_choice
from prodial_kernels.search.knobs import Knob
from prodial_kernels.training.config import ConfigError, FinetuneConfig

_RANK = Knob("r", 16, range=(2, 64), powers=True)
_SCALE = Knob("scale", 1.0, range=(0.25, 4.0))
_LR = Knob("lr", 1.0, range=(0.2, 5.0))
# The paper's multipliers of the weight decay that pulls back to pretrained values.
_DECAY = Knob("decay", 1.0, choices=(1.0, 10.0, 100.0))
_TOKENS = Knob("tokens", 4, range=(1, 32), powers=True)
# Options of the run that belong to its own adapter.
_OF_THE_ADAPTER = ("target_modules", "allow_partial", "compute")


@dataclass(frozen=True)
class Part:
    """Something that can be switched on.

    Attributes:
        name: Its name in ``among`` and in reports.
        help: What it trains, in a few words.
        method: The name of the method in a run's list; ``"prodial"`` for parts of one adapter.
        fixed: Options of the method that make this variation of it.
        knobs: Its numbers.
    """

    name: str
    help: str
    method: str = "prodial"
    fixed: Mapping[str, Any] | None = None
    knobs: tuple[Knob, ...] = ()

    def named_knobs(self) -> dict[str, Knob]:
        """Return its knobs by the name that they have in a search: ``part.knob``."""
        return {f"{self.name}.{knob.name}": knob for knob in self.knobs}

    def with_default(self, name: str, value: Any) -> Part:
        """Return the part with another default of one knob."""
        return self._with(name, default=value)

    def with_range(self, name: str, range: tuple[float, float]) -> Part:
        """Return the part with another range of one whole number, and its default within."""
        default = next(knob.default for knob in self.knobs if knob.name == name)
        return self._with(name, range=range, default=int(min(max(default, range[0]), range[1])))

    def _with(self, name: str, **changes: Any) -> Part:
        changed = (replace(k, **changes) if k.name == name else k for k in self.knobs)
        return replace(self, knobs=tuple(changed))


def _lora(target: str, help: str) -> Part:
    fixed = {"targets": [target]}
    return Part(f"lora-{target}", help, "lora", fixed, (_RANK, _SCALE, _LR))


def _rows(rows: str, help: str) -> Part:
    return Part(f"rows-{rows}", help, "partial-lora", {"rows": [rows]}, (_RANK, _SCALE, _LR))


def _tuned(part: str, help: str) -> Part:
    return Part(part, help, "partial-tuning", {"parts": [part]}, (_LR, _DECAY))


PARTS = {
    part.name: part
    for part in (
        Part("scale", "ProDiaL's output scale s"),
        Part("diagonal", "ProDiaL's block-diagonal factor", knobs=(
            Knob("block_size", 1, choices=(1, 2, 4, 8)),
            Knob("diagonal", "relu", choices=("relu", "free")),
        )),
        Part("lora", "LoRA on the projectors", knobs=(_RANK, _SCALE)),
        _lora("x_proj", "LoRA on Mamba-1's x_proj"),
        _lora("dt_proj", "LoRA on Mamba-1's dt_proj"),
        _lora("embed", "LoRA on the token embedding"),
        _rows("X", "LoRA on the rows of in_proj that give X"),
        _rows("Z", "LoRA on the rows of in_proj that give the gate"),
        _rows("d", "LoRA on the rows that give the step size"),
        _rows("B", "LoRA on the rows that give B"),
        _rows("C", "LoRA on the rows that give C"),
        Part("parallel-adapter", "a small network beside out_proj", "parallel-adapter",
             knobs=(_RANK, _SCALE, _LR)),
        _tuned("A_log", "offsets of A_log"),
        _tuned("D", "offsets of D"),
        _tuned("dt_bias", "offsets of the step size's bias"),
        _tuned("conv1d", "offsets of the convolution's weight"),
        Part("additional-scan", "more state dimensions", "additional-scan", knobs=(
            Knob("states", 4, range=(2, 16), powers=True),
            Knob("position", "suffix", choices=("suffix", "prefix")), _LR,
        )),
        Part("affix-tuning", "tokens within every mixer", "affix-tuning", knobs=(_TOKENS, _LR)),
        Part("prompt-tuning", "tokens before the sequence", "prompt-tuning", knobs=(_TOKENS, _LR)),
        Part("bitfit", "offsets of all biases", "bitfit", knobs=(_LR, _DECAY)),
    )
}  # fmt: skip
"""Every part that there is, by name."""


@dataclass(frozen=True)
class Space:
    """What one search chooses from.

    Attributes:
        base: What all its runs have in common.
        parts: What may be switched on.
    """

    base: FinetuneConfig
    parts: tuple[Part, ...]

    def common_knobs(self) -> dict[str, Knob]:
        """Return the knobs of every run: the learning rate and the weight decay."""
        resolved = self.base.resolved()
        lr, decay = resolved.lr, resolved.weight_decay
        decays = tuple(sorted({0.0, 0.001, 0.01, 0.1, 1.0, decay}))
        return {
            "lr": Knob("lr", lr, range=(lr / 10, 10 * lr)),
            "weight_decay": Knob("weight_decay", decay, choices=decays),
        }

    def knobs(self, on: Iterable[str]) -> dict[str, Knob]:
        """Return all knobs of a combination, by the names that they have in the search."""
        knobs = self.common_knobs()
        for part in self._parts(on):
            knobs |= part.named_knobs()
        return knobs

    def defaults(self, on: Iterable[str]) -> dict[str, Any]:
        """Return the values that a combination has in step one."""
        return {name: knob.default for name, knob in self.knobs(on).items()}

    def run(self, on: Iterable[str], values: Mapping[str, Any]) -> FinetuneConfig:
        """Return the run that trains a combination with these values of its knobs.

        Raises:
            ConfigError: Values that no run may have.
        """
        return replace(self.base, **self.options(on, values))

    def options(self, on: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of ``FinetuneConfig`` that a combination and its values come to."""
        parts = self._parts(on)
        own = [part for part in parts if part.method == "prodial"]
        listed = [_entry(part, values) for part in parts if part.method != "prodial"]
        common = {"lr": values["lr"], "weight_decay": values["weight_decay"]}
        if not listed:
            return {**common, **_adapter_options(own, values)}
        given = {name: getattr(self.base, name) for name in _OF_THE_ADAPTER}
        if own:
            beside = {k: v for k, v in given.items() if v is not None}
            listed.insert(0, {"name": "prodial", **beside, **_adapter_options(own, values)})
        return {**common, **dict.fromkeys(given), "methods": listed}

    def _parts(self, on: Iterable[str]) -> list[Part]:
        wanted = set(on)
        return [part for part in self.parts if part.name in wanted]


def check_among(names: Sequence[str]) -> tuple[str, ...]:
    """Return the parts that are named, each once.

    Raises:
        ConfigError: A name that no part has, or fewer than two parts.
    """
    for name in names:
        check_choice("`among`", name, tuple(PARTS), error=ConfigError)
    if len(set(names)) < 2:
        raise ConfigError(f"`among` must name at least two parts to combine, got {list(names)}")
    return tuple(name for name in PARTS if name in names)


def label(on: Iterable[str]) -> str:
    """Return a combination as people read it."""
    return " + ".join(on)


def _entry(part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part as it stands in a run's list of methods."""
    own = {knob.name: values[f"{part.name}.{knob.name}"] for knob in part.knobs}
    if part.method in ("lora", "partial-lora"):
        own["alpha"] = own["r"] * own.pop("scale")
    return {"name": part.method, **(part.fixed or {}), **own}


def _adapter_options(parts: Sequence[Part], values: Mapping[str, Any]) -> dict[str, Any]:
    on = {part.name for part in parts}
    options: dict[str, Any] = {
        "train_scale": "scale" in on, "train_diagonal": "diagonal" in on, "r": 0
    }  # fmt: skip
    if "lora" in on:
        options["r"] = values["lora.r"]
        options["lora_alpha"] = values["lora.r"] * values["lora.scale"]
    if "diagonal" in on:
        options["block_size"] = values["diagonal.block_size"]
        options["diagonal"] = values["diagonal.diagonal"]
    return options
