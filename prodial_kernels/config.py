"""``ProdialConfig``: what to adapt and how, its JSON form, and the paper's named presets.

The options of an adapter, their defaults and their checks are written here once: the layer, the
command line and PEFT's configuration take them from :class:`AdapterOptions`. Loads no PyTorch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from re import Pattern
from typing import Any

from prodial_kernels._checks import (
    COMPUTES,
    DIAGONALS,
    IMPLS,
    check_choice,
    check_dropout,
    check_finite,
    check_flag,
    check_integer,
    divisors,
)
from prodial_kernels.methods import Method, method_from_dict
from prodial_kernels.module_patterns import compile_pattern, is_plain_name, matches_name

SSM_PARTS = ("A_log", "D", "dt_bias", "conv1d")
"""Parts of a mixer's recurrence that ``train_ssm`` may name."""


PLACEMENTS = ("auto", "mixer", "attention", "mlp", "all")
"""Names in ``target_modules`` that mean all linear layers of a part of the model."""


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter of one layer, but for its blocks, whose number depends on the layer's width.

    Attributes:
        r: Rank of the LoRA part (the paper's r_ε); 0 switches it off.
        lora_alpha: LoRA's numerator: α = lora_alpha / r. Default: r, so that α = 1 (Eq. 7).
        lora_dropout: Dropout probability on the LoRA input in training mode, in [0, 1).
        diagonal: ``"relu"`` (Eq. 7) or ``"free"`` (D_b = I + D_a).
        train_scale: Whether to have the output scale s.
        train_diagonal: Whether to have the block-diagonal factor.
        impl: As in :func:`prodial_kernels.prodial_linear`.
        compute: ``"fp8"`` multiplies by the frozen weight on fp8 tensor cores, in forward and
            backward; the weight has to be stored in fp8 by 128×128 tiles. ``"same"``: in the
            input's dtype.

    Raises:
        ValueError: A value out of range or not finite, or a choice that does not exist.
        TypeError: A value of the wrong kind, as a hand-written JSON file may hold.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    diagonal: str = "relu"
    train_scale: bool = True
    train_diagonal: bool = True
    impl: str = "auto"
    compute: str = "same"

    def __post_init__(self) -> None:
        check_integer("r", self.r, least=0, hint=" (0 switches the LoRA part off)")
        check_finite("r", self.r)
        alpha = float(self.r) if self.lora_alpha is None else self.lora_alpha
        check_finite("lora_alpha", alpha)
        # Not a number of NumPy's, which JSON cannot hold.
        object.__setattr__(self, "lora_alpha", alpha if isinstance(alpha, int) else float(alpha))
        check_dropout(self.lora_dropout)
        check_choice("diagonal", self.diagonal, DIAGONALS)
        check_choice("impl", self.impl, IMPLS)
        check_choice("compute", self.compute, COMPUTES)
        check_flag("train_scale", self.train_scale)
        check_flag("train_diagonal", self.train_diagonal)
        if self.r == 0 and not self.train_scale and not self.train_diagonal:
            raise ValueError(
                "nothing would be trained: set r > 0, train_scale=True or train_diagonal=True"
            )


@dataclass(frozen=True)
class ProdialConfig(AdapterOptions):
    """Which linear layers get a ProDiaL adapter, and its hyperparameters.

    Attributes:
        r: As in :class:`AdapterOptions`, like ``lora_alpha``, ``lora_dropout``, ``diagonal``,
            ``train_scale``, ``train_diagonal``, ``impl`` and ``compute``.
        target_modules: As in PEFT: a list of names, each matching a module whose dotted path ends
            with it, or one regular expression that must match whole dotted paths. A string that
            is one plain name, such as ``"in_proj"``, is that name. ``"mixer"``, ``"attention"``
            and ``"mlp"`` mean the projectors of that part, ``"all"`` those of all three, and
            ``"auto"`` what the makers of the model adapt (see ``models/README.md``).
        n_blocks: Number of diagonal blocks (the paper's r_b), one number or a number per target
            name; must divide ``in_features``. Default: a pure diagonal (1×1 blocks).
        block_size: Side P of a block instead of their number, one number or one per target name.
        modules_to_save: Names of other modules or parameters that stay trainable, such as a
            classifier head or ``"A_log"``; each matches the end of a dotted path. What has 16 bits
            is trained through fp32 masters; parameters that you thaw yourself are not.
        allow_partial: Whether a target may match in only some of a model's layers.
        train_ssm: Parts of every mixer's recurrence to train beside the projectors: any of
            ``"A_log"``, ``"D"``, ``"dt_bias"`` (the step size's bias, whatever a family calls it)
            and ``"conv1d"``, or ``"all"`` for those that the mixers have. They are trained as
            fp32 offsets from the pretrained values, to which weight decay pulls.
        methods: Methods of :mod:`prodial_kernels.methods` beside the adapter, or, with
            ``target_modules=()``, in its place; see :meth:`of`.

    Raises:
        ValueError: A value out of range, a choice that does not exist, methods that do not go
            together, or a regular expression that may take for ever.
        TypeError: A value of the wrong kind, as a hand-written JSON file may hold.
    """

    target_modules: str | tuple[str, ...] = ("in_proj", "out_proj")
    n_blocks: int | Mapping[str, int] | None = None
    block_size: int | Mapping[str, int] | None = None
    modules_to_save: tuple[str, ...] = ()
    allow_partial: bool = False
    train_ssm: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze_methods()
        if isinstance(self.train_ssm, str):
            object.__setattr__(self, "train_ssm", (self.train_ssm,))
        check_flag("allow_partial", self.allow_partial)
        self._freeze_names("target_modules", allow_pattern=True)
        self._freeze_names("modules_to_save", allow_pattern=False)
        self._freeze_names("train_ssm", allow_pattern=False)
        for part in self.train_ssm:
            check_choice("train_ssm", part, (*SSM_PARTS, "all"))
        if isinstance(self.target_modules, str):
            if is_plain_name(self.target_modules):
                object.__setattr__(self, "target_modules", (self.target_modules,))
            else:
                _compiled(self.target_modules)
        elif not self.target_modules and not self.methods:
            raise ValueError("target_modules must name at least one module, got none")
        self._freeze_blocks("n_blocks")
        self._freeze_blocks("block_size")
        if self.n_blocks is not None and self.block_size is not None:
            raise ValueError("give n_blocks or block_size, not both")

    def _freeze_names(self, option: str, *, allow_pattern: bool) -> None:
        value = getattr(self, option)
        if isinstance(value, str) and allow_pattern:
            refuse_commas(option, value)
            return
        iterable = isinstance(value, Iterable) and not isinstance(value, str)
        if not iterable or not all(isinstance(name, str) for name in value):
            kinds = "a list of names or a regular expression" if allow_pattern else "a list"
            raise TypeError(f"{option} must be {kinds}, got {value!r}")
        for name in value:
            refuse_commas(option, name)
        object.__setattr__(self, option, tuple(value))

    def _freeze_methods(self) -> None:
        methods = self.methods
        if not isinstance(methods, list | tuple):
            raise TypeError(f"methods must be a list of methods, got {methods!r}")
        made = tuple(m if isinstance(m, Method) else method_from_dict(m) for m in methods)
        object.__setattr__(self, "methods", made)
        if any(method.name == "full" for method in made) and (
            len(made) > 1 or self.target_modules or self.modules_to_save or self.train_ssm
        ):
            raise ValueError(
                "the method 'full' trains every parameter, so nothing can stand beside it; take it "
                "out of the list, or everything else"
            )

    @classmethod
    def of(cls, methods: Iterable[ProdialConfig | Method]) -> ProdialConfig:
        """Return one configuration of a list of methods; :meth:`listed` is the inverse.

        Args:
            methods: Any number, and at most one ``ProdialConfig``. Without one, no layer gets a
                ProDiaL adapter.

        Raises:
            TypeError: Something else is among them.
            ValueError: Nothing is, or two ``ProdialConfig``.
        """
        if isinstance(methods, ProdialConfig | Method):
            raise TypeError(
                f"methods must be a list, got one {type(methods).__name__}; put it in [ ]"
            )
        given = list(methods)
        for each in given:
            if not isinstance(each, ProdialConfig | Method):
                raise TypeError(
                    "methods must be a list of ProdialConfig and of prodial_kernels.methods, got "
                    f"{type(each).__name__} among them"
                )
        if not given:
            raise ValueError("methods must hold at least one, got none")
        own = [each for each in given if isinstance(each, ProdialConfig)]
        if len(own) > 1:
            raise ValueError(
                "methods must hold at most one ProdialConfig, got two; one configuration takes "
                "options per target, and Lora(...) may stand beside it"
            )
        beside = tuple(each for each in given if isinstance(each, Method))
        if not own:
            return cls(target_modules=(), methods=beside)
        return replace(own[0], methods=(*own[0].methods, *beside))

    def listed(self) -> list[ProdialConfig | Method]:
        """Return the list of methods that this configuration stands for."""
        alone = not self.target_modules and not self.modules_to_save and not self.train_ssm
        return [*([] if alone else [replace(self, methods=())]), *self.methods]

    def _freeze_blocks(self, option: str) -> None:
        value = getattr(self, option)
        if value is None:
            return
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise TypeError(f"{option} given per target must have names as keys, got {value!r}")
        for count in value.values() if isinstance(value, Mapping) else [value]:
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(
                    f"{option} must be an integer, or an integer per target, got {count!r}"
                )
            check_integer(option, count, least=1)
        if not isinstance(value, Mapping):
            return
        object.__setattr__(self, option, dict(value))
        unknown = sorted(set(value) - set(self.target_modules))
        if isinstance(self.target_modules, str) or unknown:
            raise ValueError(
                f"{option} given per target must use names from target_modules="
                f"{self.target_modules!r}, got {sorted(value)}"
            )

    def layer_options(self, target: str) -> dict[str, Any]:
        """Return what :class:`prodial_kernels.ProdialLinear` takes for a layer of one target."""
        shared = {field.name: getattr(self, field.name) for field in fields(AdapterOptions)}
        return {**shared, **self.blocks_of(target)}

    def target_of(self, module_name: str) -> str | None:
        """Return the target that matches a module's dotted path, or None."""
        if isinstance(self.target_modules, str):
            pattern = self.target_modules
            return pattern if _compiled(pattern).fullmatch(module_name) else None
        for target in self.target_modules:
            if matches_name(module_name, target):
                return target
        return None

    def blocks_of(self, target: str) -> dict[str, int | None]:
        """Return ``n_blocks`` and ``block_size`` for one target, as ``ProdialLinear`` takes them.

        A target missing from a per-target mapping gets a pure diagonal.
        """

        def pick(option: int | Mapping[str, int] | None) -> int | None:
            return option.get(target) if isinstance(option, Mapping) else option

        return {"n_blocks": pick(self.n_blocks), "block_size": pick(self.block_size)}

    def to_json(self) -> str:
        """Return the configuration as indented JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON-ready values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        methods = values.pop("methods")
        plain = {
            k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for k, v in values.items()
        }
        # Left out where there are none, so that earlier versions read the file.
        return plain | ({"methods": [m.to_dict() for m in methods]} if methods else {})

    @classmethod
    def from_json(cls, text: str) -> ProdialConfig:
        """Parse :meth:`to_json`'s output.

        Raises:
            ValueError: Not JSON, not an object, unknown keys, or a value out of range.
            TypeError: A value of the wrong kind.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the configuration is not valid JSON: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> ProdialConfig:
        """Build a configuration from JSON values.

        Raises:
            ValueError: Not a mapping, unknown keys, or a value out of range.
            TypeError: A value of the wrong kind.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"the configuration must be an object, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown configuration keys {unknown}; known are {known}")
        return cls(**values)


def methods_from(values: Any) -> list[ProdialConfig | Method]:
    """Build a list of methods from plain values, each an object with a ``name``.

    ``{"name": "prodial", "r": 16}`` is a :class:`ProdialConfig`.

    Raises:
        ValueError: Not a list of such objects, an unknown name or option, a value out of range.
        TypeError: A value of the wrong kind.
    """
    if not isinstance(values, list | tuple):
        raise ValueError(f"methods must be a list of objects, got {type(values).__name__}")
    made: list[ProdialConfig | Method] = []
    for each in values:
        if isinstance(each, Mapping) and each.get("name") == "prodial":
            made.append(ProdialConfig.from_dict({k: v for k, v in each.items() if k != "name"}))
        else:
            made.append(method_from_dict(each))
    return made


def resolve_block_size(in_features: int, n_blocks: int | None, block_size: int | None) -> int:
    """Return the side P of a diagonal block; 1 when neither argument is given.

    Raises:
        TypeError: The one given is no integer.
        ValueError: Both are given, or the one given does not divide ``in_features``.
    """
    if n_blocks is not None and block_size is not None:
        raise ValueError(
            f"give n_blocks or block_size, not both (got n_blocks={n_blocks}, "
            f"block_size={block_size})"
        )
    name, value = ("n_blocks", n_blocks) if n_blocks is not None else ("block_size", block_size)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1 or in_features % value:
        raise ValueError(
            f"{name}={value} must divide in_features={in_features}; "
            f"its divisors are {divisors(in_features)}"
        )
    return in_features // value if name == "n_blocks" else value


def refuse_commas(option: str, value: str) -> None:
    """Raise ValueError for names with commas in between: as one name they match nothing."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    if "," in value and all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise ValueError(
            f"{option} holds names with commas in between, {value!r}; give each by itself: "
            f"{' '.join(map(repr, names))}"
        )


@lru_cache
def _compiled(pattern: str) -> Pattern[str]:
    return compile_pattern(pattern, "target_modules")


@dataclass(frozen=True)
class Preset:
    """One setting of the paper: the adapter and how it was trained (Tables 9-11 and scripts).

    Attributes:
        model: The model it was used with.
        adapter: The adapter's configuration.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's weight decay.
        schedule: ``"constant"`` or ``"cosine"``.
        batch_size: Sequences (or images) per step.
        seq_len: Tokens per sequence; None for vision.
    """

    model: str
    adapter: ProdialConfig
    learning_rate: float
    weight_decay: float
    schedule: str
    batch_size: int
    seq_len: int | None


def _blocks(in_proj: int, out_proj: int) -> dict[str, int]:
    return {"in_proj": in_proj, "out_proj": out_proj}


def _language(adapter: ProdialConfig, learning_rate: float) -> Preset:
    return Preset("mamba-130m", adapter, learning_rate, 0.01, "constant", 4, 512)


def _vision(adapter: ProdialConfig) -> Preset:
    return Preset("vim-tiny", adapter, 5e-4, 0.1, "cosine", 128, None)


_ARC = ProdialConfig(r=8, lora_alpha=8, lora_dropout=0.1, n_blocks=_blocks(64, 64))
_DIAGONAL_130M = _blocks(768, 1536)
_DIAGONAL_VIM_TINY = _blocks(192, 384)

PRESETS: dict[str, Preset] = {
    "arc-easy": _language(_ARC, 5e-6),
    "arc-challenge": _language(_ARC, 1e-5),
    "hellaswag": _language(
        ProdialConfig(r=16, lora_alpha=8, lora_dropout=0.1, n_blocks=_DIAGONAL_130M), 1e-4
    ),
    "winogrande": _language(
        ProdialConfig(r=8, lora_alpha=8, lora_dropout=0.1, n_blocks=_DIAGONAL_130M), 5e-6
    ),
    "vim-caltech": _vision(ProdialConfig(r=16, lora_alpha=8, n_blocks=_DIAGONAL_VIM_TINY)),
    "vim-cars": _vision(ProdialConfig(r=16, lora_alpha=8, n_blocks=_DIAGONAL_VIM_TINY)),
    "vim-flowers": _vision(ProdialConfig(r=8, lora_alpha=8, n_blocks=_blocks(16, 16))),
}


def get_preset(name: str) -> Preset:
    """Return a preset of the paper by name; ValueError, which lists all, for an unknown one."""
    check_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]
