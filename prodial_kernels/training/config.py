"""``FinetuneConfig``: every option of a fine-tuning run, its defaults, presets and checks.

One flat set of names serves the command line (``--batch-size``), a configuration file
(``batch_size``) and Python (``FinetuneConfig(batch_size=8)``). An option left at None is filled in
by :meth:`FinetuneConfig.resolved`: from the preset, else from the defaults of this module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prodial_kernels._suggestions import option_meant
from prodial_kernels.training.config_checks import check_together
from prodial_kernels.training.config_values import ConfigError as ConfigError
from prodial_kernels.training.config_values import (
    check_choice,
    checked_value,
)

if TYPE_CHECKING:
    from prodial_kernels.config import Preset, ProdialConfig

METHODS = ("prodial", "lora", "full")
SCHEDULES = ("constant", "cosine", "linear")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
LOSSES = ("auto", "chunked", "liger", "full")
IMPLS = ("auto", "triton", "torch", "reference")
CUDA_GRAPHS = ("auto", "on", "off")
PACKINGS = ("stream", "documents")
QUANTIZE = ("nf4", "int8", "fp8")
ACTIVATIONS = ("auto", "keep", "recompute", "checkpoint")
ADAPTER_OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "n_blocks",
    "block_size",
    "diagonal",
    "target_modules",
    "train_scale",
    "train_diagonal",
)
# Options of the adapter that no preset and no method decides.
OTHER_ADAPTER_OPTIONS = ("modules_to_save", "allow_partial")
# Peak learning rates, at or between the best points of a one-seed sweep on the embedded model with
# the default data and steps. A full fine-tuning moves every weight, so it needs far smaller steps
# than an adapter.
DEFAULT_LR = {"prodial": 3e-3, "lora": 3e-3, "full": 3e-4}
# What no preset and no method decides: with the embedded model and the default data, one to two
# minutes on two CPU cores.
DEFAULTS = {
    "steps": 150,
    "batch_size": 4,
    "seq_len": 256,
    "weight_decay": 0.01,
    "schedule": "cosine",
}
STDLIB_MAX_BYTES = 4_000_000
STDLIB_EVAL_TOKENS = 32_768


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune, on what, how, and where to keep it.

    Attributes:
        model: ``"embedded"``, a directory in transformers' format, or a hub id.
        data: ``"stdlib"``, a file, a directory or a hub data set, as ``load_documents`` takes it.
        held_out: A held-out source of its own; None splits ``data``.
        held_out_fraction: Share of ``data`` to hold out.
        max_bytes: UTF-8 bytes of data to use; None for all (of ``"stdlib"``, 4 MB).
        eval_tokens: Held-out tokens to evaluate on; None for all (of ``"stdlib"``, 32,768).
            Multiple choice and completions are always evaluated whole.
        output: Directory of the run.
        method: ``"prodial"``, ``"lora"`` (no scale, no diagonal; without ``r`` the rank whose
            parameter count is closest to ProDiaL's) or ``"full"`` (every parameter).
        preset: A setting of the paper; fills in options that are None.
        r: Adapter option as in :class:`prodial_kernels.ProdialConfig`, like the next ten.
        lora_alpha: See ``r``.
        lora_dropout: See ``r``.
        n_blocks: See ``r``.
        block_size: See ``r``.
        diagonal: See ``r``.
        target_modules: See ``r``.
        train_scale: See ``r``.
        train_diagonal: See ``r``.
        modules_to_save: See ``r``.
        allow_partial: See ``r``.
        lr: Peak learning rate; the default is the method's (:data:`DEFAULT_LR`).
        steps: Optimiser steps; give this or ``epochs``.
        epochs: Passes over the training data; may be a fraction.
        batch_size: Sequences in a micro-batch.
        seq_len: Tokens in a sequence.
        packing: Of texts: ``"stream"``: in a row, cut into windows, the state running on from each
            document into the next; ``"documents"``: none sees another one, padded where the model
            cannot reset its state.
        grad_accumulation: Micro-batches in an optimiser step.
        weight_decay: AdamW's decay; it never pulls the scale s toward 0.
        schedule: After the warm-up: ``"constant"``, or ``"cosine"`` or ``"linear"`` decay to 0.
        warmup: Steps of linear warm-up.
        optimizer: ``"adamw"`` (fused on CUDA), or bitsandbytes' ``"adamw8bit"`` or
            ``"paged_adamw8bit"`` on CUDA.
        clip: Largest gradient norm over the trained parameters; 0 switches clipping off.
        seed: Decides initial values, data order and dropout.
        eval_every: Steps between evaluations; 0 for before and after only.
        save_every: Steps between saved training states; 0 for the end only.
        log_every: Steps between lines in ``metrics.jsonl``.
        quantize: Format of the frozen projectors, quantised while they are loaded one by one;
            ``"auto"``: ``"nf4"`` if nothing else fits the run into memory.
        memory_budget: Fit the run into so much memory of a CUDA device, such as ``"8GiB"``,
            ``"6GB"`` or a number of bytes, and allow PyTorch no more; None: what is free, as far as
            it can be.
        activations: What layers keep for the backward pass: ``"keep"`` what the fused operations
            need, ``"recompute"`` less (the norm, and Mamba-1's in_proj output, are computed
            again), ``"checkpoint"`` one residual each; ``"auto"``: the first that fits, layer by
            layer. On a CPU ``"auto"`` is ``"keep"``.
        gradient_checkpointing: The same as ``activations="checkpoint"``.
        loss: ``"chunked"`` and ``"liger"`` (liger-kernel's, on CUDA) never hold the logits of a
            whole batch; ``"full"`` does; ``"auto"``: one that does not, where the model allows.
        impl: How adapted projectors are computed: ``"triton"``, ``"torch"``, ``"reference"``, or
            ``"auto"``, which says what it takes (see :func:`prodial_kernels.resolve_impl`).
        cuda_graph: Capture whole steps in CUDA graphs: ``"on"``, ``"off"``, or ``"auto"``, which
            does where launching a step takes longer than running it.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        dtype: Compute dtype; ``"auto"`` is bfloat16 on CUDA and float32 on a CPU. Trained
            parameters are float32 in either case.

    Raises:
        ConfigError: An option out of range or of the wrong type, or two that exclude each other.
    """

    model: str = "embedded"
    data: str = "stdlib"
    held_out: str | None = None
    held_out_fraction: float = 0.1
    max_bytes: int | None = None
    eval_tokens: int | None = None
    output: str = "prodial-output"
    method: str = "prodial"
    preset: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    n_blocks: int | Mapping[str, int] | None = None
    block_size: int | Mapping[str, int] | None = None
    diagonal: str | None = None
    target_modules: str | tuple[str, ...] | None = None
    train_scale: bool | None = None
    train_diagonal: bool | None = None
    modules_to_save: tuple[str, ...] | None = None
    allow_partial: bool | None = None
    lr: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    packing: str = "stream"
    grad_accumulation: int = 1
    weight_decay: float | None = None
    schedule: str | None = None
    warmup: int = 10
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 50
    save_every: int = 50
    log_every: int = 1
    quantize: str | None = None
    memory_budget: str | None = None
    activations: str = "auto"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    loss: str = "auto"
    impl: str = "auto"
    cuda_graph: str = "auto"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = checked_value(field.name, getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)
        for name, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
            ("impl", IMPLS),
            ("cuda_graph", CUDA_GRAPHS),
            ("packing", PACKINGS),
            ("activations", ACTIVATIONS),
            ("quantize", (*QUANTIZE, "auto")),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        if self.preset is not None and self._preset().seq_len is None:
            raise ConfigError(
                f"`preset` {self.preset!r} is for image classification, which is not trained here; "
                "take its adapter with prodial_kernels.config.get_preset() in your own training "
                "loop"
            )
        check_together(
            self, sizes=DEFAULTS, adapter_options=(*ADAPTER_OPTIONS, *OTHER_ADAPTER_OPTIONS)
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """Build a configuration from plain values, as a JSON or TOML file holds them.

        Raises:
            ConfigError: Unknown keys (the message lists the known ones), or values out of range.
        """
        cls.check_names(values)
        return cls(**values)

    @classmethod
    def check_names(cls, names: Iterable[str], *, source: str = "the configuration") -> None:
        """Raise unless all names are options.

        Raises:
            ConfigError: Lists the unknown and the known names.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(names) - set(known))
        if not unknown:
            return
        meant = {name: option_meant(name, known) for name in unknown}
        hints = [f"{name!r}: did you mean {found!r}?" for name, found in meant.items() if found]
        listed = "" if len(hints) == len(unknown) else f"; known are {', '.join(known)}"
        raise ConfigError("; ".join([f"{source}: unknown keys {unknown}", *hints]) + listed)

    @classmethod
    def check_values(cls, values: Mapping[str, Any]) -> None:
        """Raise unless each value by itself is one that its option may have.

        Raises:
            ConfigError: Names the option, what is expected and what came.
        """
        for field in fields(cls):
            if field.name in values:
                checked_value(field.name, values[field.name], str(field.type))

    @property
    def chosen_activations(self) -> str:
        """``activations``, or what ``gradient_checkpointing`` stands for."""
        return "checkpoint" if self.gradient_checkpointing else self.activations

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def resolved(self) -> ResolvedConfig:
        """Fill in every option that is None and has a default; paths become absolute.

        Returns:
            A configuration that resolves to itself.
        """
        preset = None if self.preset is None else self._preset()
        values: dict[str, Any] = {"lr": DEFAULT_LR[self.method], **DEFAULTS}
        if preset is not None:
            values |= {
                "lr": preset.learning_rate,
                "weight_decay": preset.weight_decay,
                "schedule": preset.schedule,
                "batch_size": preset.batch_size,
                "seq_len": preset.seq_len,
            }
        if self.epochs is not None:
            del values["steps"]
        if self.data == "stdlib":
            values |= {"max_bytes": STDLIB_MAX_BYTES, "eval_tokens": STDLIB_EVAL_TOKENS}
        if self.method != "full":
            values |= self._adapter_defaults()
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        filled = {k: v for k, v in values.items() if given[k] is None}
        for name in ("model", "data", "held_out"):
            value = getattr(self, name)
            if value in (None, "embedded", "stdlib"):
                continue
            path = Path(value).expanduser()
            # A pipe has no path but the one that it was given by.
            if os.path.isfile(path) or os.path.isdir(path):
                filled[name] = str(path.resolve())
        return ResolvedConfig(**{**given, **filled})

    def adapter(self, *, r: int | None = None) -> ProdialConfig:
        """Return the adapter's configuration.

        Args:
            r: Rank to use where ``self.r`` is None, which only ``method="lora"`` leaves open.

        Raises:
            ConfigError: ``method="full"``, or no rank.
            ValueError: Adapter options that do not fit together.
        """
        from prodial_kernels.config import ProdialConfig

        if self.method == "full":
            raise ConfigError("`method` 'full' has no adapter")
        resolved = self.resolved()
        values = {name: getattr(resolved, name) for name in ADAPTER_OPTIONS}
        if values["r"] is None:
            values["r"] = r
        if values["r"] is None:
            raise ConfigError("`method` 'lora' without `r` needs the model to choose its rank")
        if not values["train_diagonal"]:
            values["n_blocks"] = values["block_size"] = None
        others = {name: getattr(self, name) for name in OTHER_ADAPTER_OPTIONS}
        values |= {name: value for name, value in others.items() if value is not None}
        return ProdialConfig(**values, impl=self.impl)

    def reference_adapter(self) -> ProdialConfig:
        """Return the ProDiaL adapter whose size a LoRA without ``r`` matches.

        Raises:
            ValueError: Adapter options that do not fit together.
        """
        values = {name: getattr(self, name) for name in ADAPTER_OPTIONS}
        values |= {"train_scale": None, "train_diagonal": None, "preset": self.preset}
        return FinetuneConfig.from_dict(values).adapter()

    def _preset(self) -> Preset:
        # Imported here, like the rest: the command line reads this module before PyTorch is loaded.
        from prodial_kernels.config import PRESETS, get_preset

        if self.preset not in PRESETS:
            trained_here = (name for name, preset in PRESETS.items() if preset.seq_len is not None)
            check_choice("preset", self.preset, trained_here)
        return get_preset(self.preset or "")

    def _adapter_defaults(self) -> dict[str, Any]:
        from prodial_kernels.config import ProdialConfig

        base = ProdialConfig() if self.preset is None else self._preset().adapter
        values = {name: getattr(base, name) for name in ADAPTER_OPTIONS}
        if self.n_blocks is not None or self.block_size is not None:
            values["n_blocks"] = values["block_size"] = None
        if self.target_modules is not None and self.target_modules != base.target_modules:
            # The preset's blocks are named after its own targets.
            values["n_blocks"] = values["block_size"] = None
        # Unless a preset says otherwise, lora_alpha follows the rank that is used: α = 1.
        if self.preset is None or self.method == "lora":
            values["lora_alpha"] = None
        if self.method == "lora":
            values |= {"train_scale": False, "train_diagonal": False, "r": None}
        return values


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(FinetuneConfig):
    """What a run does: a :class:`FinetuneConfig` in which nothing is left to a default.

    :meth:`FinetuneConfig.resolved` makes it. An option that may still be None is then absent:
    ``held_out``, ``max_bytes``, ``eval_tokens``, ``preset``, ``quantize`` and ``memory_budget`` as
    their descriptions say; ``steps`` where ``epochs`` is given, and the other way round; every
    option of the adapter with ``method="full"``; ``r`` where the rank of a LoRA is to be matched
    to ProDiaL's size; and ``n_blocks`` and ``block_size`` for a pure diagonal.
    """

    lr: float
    batch_size: int
    seq_len: int
    weight_decay: float
    schedule: str

    def optimizer_steps(self, batches_per_epoch: int) -> int:
        """Return the length of the run: ``steps``, or those that ``epochs`` take.

        Args:
            batches_per_epoch: Micro-batches in one pass over the training data.

        Raises:
            ConfigError: Neither is given, which :meth:`resolved` does not leave.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ConfigError("give `steps` or `epochs`")
        micro_batches = math.ceil(self.epochs * batches_per_epoch)
        return math.ceil(micro_batches / self.grad_accumulation)
