"""``ProdialPeftConfig``: what to adapt and how, with PEFT's names and PEFT's file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

from peft import LoraConfig, PeftConfig

from prodial_kernels.config import AdapterOptions, ProdialConfig, refuse_commas
from prodial_kernels.module_patterns import compile_pattern
from prodial_kernels.peft.register import PEFT_TYPE

ConfigT = TypeVar("ConfigT")

DEFAULT_TARGETS = ProdialConfig.target_modules
# What save_adapter's file holds beside PEFT's fields.
_OF_SAVE_ADAPTER = frozenset(
    ("format_version", "package_version", "base_model", "config", "tensors", "base",
     "tensors_sha256", "checksum")
)  # fmt: skip


def _without_own_fields(cls: type[ConfigT]) -> type[ConfigT]:
    """Let a configuration be made of the file that ``save_adapter`` wrote, too."""
    made: Any = cls.__init__

    @wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tensors_sha256" in kwargs:
            kwargs = {k: value for k, value in kwargs.items() if k not in _OF_SAVE_ADAPTER}
        made(self, *args, **kwargs)

    setattr(cls, "__init__", __init__)  # noqa: B010  mypy does not let it be assigned
    return cls


@_without_own_fields
@dataclass
class ProdialPeftConfig(PeftConfig):
    """The configuration of a ProDiaL adapter, as ``get_peft_model`` and PEFT's trainers take it.

    Beside the fields of every PEFT configuration (``task_type``, ``inference_mode``, ...):

    Attributes:
        target_modules: As in PEFT: names that the dotted paths of linear layers end with, or one
            regular expression that matches whole paths; or a part of the model as in
            :class:`~prodial_kernels.config.ProdialConfig`, such as ``"auto"``. Default: ``in_proj``
            and ``out_proj``.
        exclude_modules: Names or a regular expression of targets to leave out.
        r: As in :class:`~prodial_kernels.config.AdapterOptions`, like ``lora_dropout``,
            ``diagonal``, ``train_scale``, ``train_diagonal``, ``impl`` and ``compute``.
        lora_alpha: α = lora_alpha / r. Default: the rank of each layer, so that α = 1.
        n_blocks: Number of diagonal blocks, one for all or a mapping from names of targets to
            numbers; must divide ``in_features``. Default: a pure diagonal (1×1 blocks). Names are
            matched as those of ``rank_pattern``; a target without one gets a pure diagonal.
        block_size: Side P of a block instead of their number.
        modules_to_save: Names of other modules that are trained as a whole and saved.
        layers_to_transform: Numbers of the layers to adapt; default: all.
        layers_pattern: Name of the list of layers that these numbers count.
        rank_pattern: Other ranks for some targets: names or regular expressions, as in PEFT.
        alpha_pattern: Likewise for ``lora_alpha``.
        lora: PEFT's LoRA for other layers (attention, MLP), trained, saved, merged and loaded with
            this adapter as one. Needs PEFT 0.21 or newer.

    Raises:
        ValueError: A value out of range, a choice that does not exist, or options of ``lora``
            that cannot be used here.
        TypeError: A value of the wrong kind.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    r: int = AdapterOptions.r
    lora_alpha: float | None = None
    lora_dropout: float = AdapterOptions.lora_dropout
    n_blocks: int | dict[str, int] | None = None
    block_size: int | dict[str, int] | None = None
    diagonal: str = AdapterOptions.diagonal
    train_scale: bool = AdapterOptions.train_scale
    train_diagonal: bool = AdapterOptions.train_diagonal
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora: LoraConfig | dict[str, Any] | None = None
    impl: str = AdapterOptions.impl
    compute: str = AdapterOptions.compute

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern says where layers_to_transform counts; give layers_to_transform too"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names; a regular expression "
                "can name the layers itself"
            )
        self._check_patterns()
        if isinstance(self.lora, Mapping):
            self.lora = LoraConfig(**self.lora)
        if self.lora is not None:
            _check_lora(self.lora)
        # Every value is checked here, before a model is changed.
        for rank in {self.r, *self.rank_pattern.values()}:
            for alpha in {self.lora_alpha, *self.alpha_pattern.values()}:
                for blocks in _values(self.n_blocks):
                    for size in _values(self.block_size):
                        self._prodial_config("layer", rank, alpha, blocks, size)

    def _check_patterns(self) -> None:
        """Refuse expressions whose search may not end: the configuration may be somebody else's."""
        targets = self.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            raise ValueError(
                'target_modules="all-linear" is not supported: beside the projectors it would take '
                "layers whose weights mixers read; name the targets, such as "
                f"{[*DEFAULT_TARGETS]}, and give PEFT's LoRA the others with lora=LoraConfig(...)"
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            for text in [value] if isinstance(value, str) else value or ():
                refuse_commas(name, text)
            if isinstance(value, str):
                compile_pattern(value, name)
        for name in ("rank_pattern", "alpha_pattern", "n_blocks", "block_size"):
            value = getattr(self, name)
            for pattern in value if isinstance(value, Mapping) else ():
                compile_pattern(_ending(pattern), f"key of {name}")

    @classmethod
    def from_prodial(cls, config: ProdialConfig, **options: Any) -> ProdialPeftConfig:
        """Return what ``apply_prodial`` takes as what PEFT takes, such as one of the presets.

        Args:
            config: The configuration; ``allow_partial`` has no counterpart, PEFT always allows it.
            options: Further fields, such as ``task_type="CAUSAL_LM"``.

        Raises:
            ValueError: ``config`` has ``train_ssm`` or ``methods``, which PEFT's adapters have no
                place for.
        """
        for option in ("train_ssm", "methods"):
            if getattr(config, option):
                raise ValueError(
                    f"{option}={getattr(config, option)!r} has no place in PEFT's adapters; use "
                    "apply_prodial, or leave it out"
                )
        shared = {field.name for field in fields(cls)} & {field.name for field in fields(config)}
        values = {name: getattr(config, name) for name in shared}
        if not isinstance(config.target_modules, str):
            values["target_modules"] = list(config.target_modules)
        values["modules_to_save"] = list(config.modules_to_save) or None
        return cls(**{**values, **options})

    def for_layer(self, path: str) -> ProdialConfig:
        """Return the configuration of the one layer at a dotted path."""
        alpha = _of_pattern(self.alpha_pattern, path, self.lora_alpha)
        rank = _of_pattern(self.rank_pattern, path, self.r)
        blocks, size = (
            _of_pattern(value, path, None) if isinstance(value, Mapping) else value
            for value in (self.n_blocks, self.block_size)
        )
        return self._prodial_config(path, rank, alpha, blocks, size)

    def unused_patterns(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Return the names of ``n_blocks`` and ``block_size`` that match none of ``paths``."""
        paths = list(paths)
        unused = {
            option: [name for name in value if not any(_matches(name, path) for path in paths)]
            for option in ("n_blocks", "block_size")
            if isinstance(value := getattr(self, option), Mapping)
        }
        return {option: names for option, names in unused.items() if names}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with ``lora`` as LoRA's own configuration has it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.lora, LoraConfig):
            inner = self.lora.to_dict()
            values["lora"] = {
                name: sorted(value) if isinstance(value, set) else value
                for name, value in inner.items()
                if value is not None
            }
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], set):
                values[name] = sorted(values[name])
        return values

    def _prodial_config(
        self,
        path: str,
        rank: int,
        alpha: float | None,
        n_blocks: int | None,
        block_size: int | None,
    ) -> ProdialConfig:
        values = {field.name: getattr(self, field.name) for field in fields(AdapterOptions)}
        values |= {"r": rank, "lora_alpha": alpha, "n_blocks": n_blocks, "block_size": block_size}
        return ProdialConfig(**values, target_modules=(path,))


def _check_lora(lora: LoraConfig) -> None:
    names = lora.target_modules
    if not names or (isinstance(names, str) and names.lower() == "all-linear"):
        raise ValueError(
            f"lora.target_modules must name the layers that get PEFT's LoRA, got {names!r}; for "
            'attention: ["q_proj", "k_proj", "v_proj", "o_proj"]'
        )
    for option in ("modules_to_save", "layer_replication", "trainable_token_indices"):
        if getattr(lora, option, None):
            raise ValueError(
                f"lora.{option} cannot be used beside ProDiaL"
                + ("; give modules_to_save to ProdialPeftConfig" if "save" in option else "")
            )
    if getattr(lora, "target_parameters", None):
        raise ValueError("lora.target_parameters cannot be used beside ProDiaL; name layers")
    if lora.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"lora.init_lora_weights={lora.init_lora_weights!r} changes the base model, which "
            'cannot be done beside ProDiaL; give True, False or "gaussian"'
        )
    if lora.bias != "none":
        raise ValueError(f'lora.bias must be "none" beside ProDiaL, got {lora.bias!r}')


def _values(option: int | Mapping[str, int] | None) -> set[int | None]:
    return {*option.values()} if isinstance(option, Mapping) else {option}


def _of_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Look ``path`` up as PEFT does in ``rank_pattern``: the first key that matches its end."""
    return next((v for name, v in (patterns or {}).items() if _matches(name, path)), default)


def _matches(pattern: str, path: str) -> bool:
    return re.match(_ending(pattern), path) is not None


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
