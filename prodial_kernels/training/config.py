"""``FinetuneConfig``: every option of a fine-tuning run, its defaults, presets and checks.

One flat set of names serves the command line (``--batch-size``), a configuration file
(``batch_size``) and Python (``FinetuneConfig(batch_size=8)``). An option left at None is filled in
by :meth:`FinetuneConfig.resolved`: from the preset, else from the defaults of this module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from prodial_kernels._checks import COMPUTES, DIAGONALS, IMPLS, check_choice, option_meant
from prodial_kernels.config import PRESETS, SSM_PARTS, Preset, ProdialConfig, methods_from
from prodial_kernels.methods import METHODS as LISTED
from prodial_kernels.training.options import (
    COMBINED,
    WHOLE_RUN,
    checked_value,
    option,
    options_of,
    settled_methods,
)
from prodial_kernels.training.options import ConfigError as ConfigError
from prodial_kernels.training.sizes import parse_budget

METHODS = (*WHOLE_RUN, *(name for name in LISTED if name not in WHOLE_RUN), COMBINED)
SCHEDULES = ("constant", "cosine", "linear")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
LOSSES = ("auto", "chunked", "liger", "full")
CUDA_GRAPHS = ("auto", "on", "off")
PACKINGS = ("stream", "documents")
KEEP = ("last", "best")
# Of an adapter; runs of the first release have none of them.
LATER_OPTIONS = ("modules_to_save", "allow_partial", "train_ssm", "compute")
TRACKERS = ("tensorboard", "wandb", "trackio")
QUANTIZE = ("nf4", "int8", "fp8")
QUANTIZE_MODULES = ("projectors", "all")
EXPERTS = ("auto", "device", "host")
ACTIVATIONS = ("auto", "keep", "recompute", "checkpoint", "offload")
LANGUAGE_PRESETS = tuple(name for name, preset in PRESETS.items() if preset.seq_len is not None)
# Peak learning rates, at or between the best points of a one-seed sweep on the embedded model with
# the default data and steps. A full fine-tuning moves every weight, so it needs far smaller steps
# than an adapter.
DEFAULT_LR = {"prodial": 3e-3, "lora": 3e-3, "full": 3e-4}
# What no preset and no method decides: with the embedded model and the default data, one to two
# minutes on two CPU cores.
DEFAULTS: dict[str, Any] = {
    "steps": 150,
    "batch_size": 4,
    "seq_len": 256,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "grad_accumulation": 1,
}
STDLIB_MAX_BYTES = 4_000_000
STDLIB_EVAL_TOKENS = 32_768
MOST_TOKENS_IN_A_STEP = 2**26
"""The largest product of batch_size, seq_len and grad_accumulation."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune, on what, how, and where to keep it.

    Each option is described where it is defined, in the words of ``prodial finetune --help``; those
    from ``r`` to ``train_diagonal`` are an adapter's, as in :class:`prodial_kernels.ProdialConfig`.
    None stands for the default, or for nothing. Beyond that:

    Attributes:
        data: As :func:`~prodial_kernels.training.data.splits.load_documents` takes it.
        eval_tokens: Multiple choice and completions are always evaluated whole.
        method: ``"lora"`` has no scale and no diagonal. One of :mod:`prodial_kernels.methods` by
            its name alone has its default options.
        methods: What to train, as ``prodial_kernels.apply_methods`` takes it, or as plain values
            with names. It takes the place of ``method``, which then is the name of the only one,
            or ``"combined"``; the options from ``r`` to ``train_diagonal`` stand in the list.
        preset: Fills in options that are None.
        lr: The default is the method's (:data:`DEFAULT_LR`).
        epochs: May be a fraction.
        packing: ``"stream"``: texts in a row, cut into windows, the state running on from each
            document into the next; ``"documents"``: none sees another one, padded where the model
            cannot reset its state.
        weight_decay: It never pulls the scale s toward 0.
        schedule: ``"cosine"`` and ``"linear"`` decay to 0.
        optimizer: ``"adamw"`` is fused on CUDA; the others are bitsandbytes' and need CUDA.
        quantize: Weights are quantised while they are loaded one by one.
        quantize_modules: ``"all"``: everything but norms, routers and the recurrence's own, and
            what is trained.
        experts: Each step copies those that its batch takes, up to three times.
        memory_budget: Such as ``"8GiB"``, ``"6GB"`` or a number of bytes; PyTorch is allowed no
            more. None: what is free, as far as it can be.
        activations: ``"keep"``: what the fused operations need; ``"recompute"``: less (the norm,
            and Mamba-1's in_proj output, are computed again); ``"checkpoint"``: one residual each;
            ``"offload"``: that one in the host's memory, with a ``memory_budget`` for as few layers
            as necessary; ``"auto"``: the first that fits, layer by layer, and on a CPU ``"keep"``.
        loss: ``"liger"`` is liger-kernel's, on CUDA.
        impl: See :func:`prodial_kernels.resolve_impl`.
        dtype: Trained parameters are float32 in either case.

    Raises:
        ConfigError: An option out of range or of the wrong type, or two that exclude each other.
    """

    # What to train, and on what.
    model: str = option(
        "embedded", "directory in transformers' format or hub id ({default})", metavar="MODEL",
        shown="embedded: a small one in this package",
    )  # fmt: skip
    data: str = option(
        "stdlib", "text file, directory of texts, rows (JSONL, JSON, CSV, TSV, Parquet: text; "
        "prompt, completion; instruction, output; messages; context, choices, label; or HellaSwag, "
        "Winogrande, ARC), or hub data set NAME[:CONFIGURATION] (stdlib: the source of Python's "
        "own library)", metavar="DATA",
    )  # fmt: skip
    held_out: str | None = option(None, "evaluate on this instead of splitting", metavar="DATA")
    held_out_fraction: float = option(0.1, "share of the data to hold out ({default})", metavar="F")
    max_bytes: int | None = option(
        None, "use so much of the data ({default})", metavar="N", range=(2, 2**50), unit=True,
        shown=f"stdlib: {STDLIB_MAX_BYTES:,}, else all",
    )  # fmt: skip
    eval_tokens: int | None = option(
        None, "evaluate on so many held-out tokens ({default})", metavar="N", range=(1, 2**50),
        unit=True, shown=f"stdlib: {STDLIB_EVAL_TOKENS:,}, else all",
    )  # fmt: skip
    output: str = option(
        "prodial-output", "where the run is kept ({default}); must be empty or new", metavar="DIR"
    )
    # The method.
    method: str = option(
        "prodial", "{default} (default); lora: without --r the rank whose parameter count comes "
        "closest to ProDiaL's; full: every parameter; or one or several of those below, each with "
        "its options, such as: additional-scan states=6 partial-tuning parts=conv1d,D",
        metavar="METHOD", choices=METHODS,
    )  # fmt: skip
    methods: tuple[Mapping[str, Any], ...] | None = option(
        None, "several at once, in a file or in Python: a list of such as {{name: lora, r: 8}}",
        metavar="METHOD", flags=("--method",),
    )  # fmt: skip
    preset: str | None = option(
        None, "a setting of the paper ({default}); other flags win over it", metavar="NAME",
        shown=", ".join(LANGUAGE_PRESETS),
    )  # fmt: skip
    r: int | None = option(
        None, "rank of the LoRA part ({default}); 0: none", metavar="R", range=(0, 2**16),
        flags=("--r", "--rank"),
    )  # fmt: skip
    lora_alpha: float | None = option(
        None, "LoRA is scaled by A / R (R)", metavar="A", range=(-1e6, 1e6)
    )
    lora_dropout: float | None = option(None, "on LoRA's input ({default:g})", metavar="P")
    n_blocks: int | Mapping[str, int] | None = option(
        None, "diagonal blocks: one number, or in_proj=64 out_proj=32 (default: 1×1 blocks)",
        metavar="N",
    )  # fmt: skip
    block_size: int | Mapping[str, int] | None = option(
        None, "side of a block instead", metavar="P"
    )
    diagonal: str | None = option(
        None, "relu (the paper's Eq. 7) or free (two-sided)", metavar="KIND", choices=DIAGONALS
    )
    compute: str | None = option(
        None, "what projectors multiply their frozen weights in: {default} (default), the compute "
        "dtype; fp8, on GPUs from Ada on, of weights in fp8 (--quantize fp8)", choices=COMPUTES,
    )  # fmt: skip
    target_modules: str | tuple[str, ...] | None = option(
        None, "layers to adapt ({default}), one regular expression for whole paths, or a part: "
        "mixer attention mlp all, auto: what the model's makers adapt",
        metavar="NAME", shown=" ".join(ProdialConfig.target_modules),
    )  # fmt: skip
    allow_partial: bool | None = option(
        None, "adapt what matches, also where only some of the layers do"
    )
    modules_to_save: tuple[str, ...] | None = option(
        None, "other modules to train and save as a whole, such as a head", metavar="NAME"
    )
    train_ssm: tuple[str, ...] | None = option(
        None, "parts of the mixers' recurrence to train too: A_log D dt_bias conv1d, or all",
        metavar="PART",
    )  # fmt: skip
    train_scale: bool | None = option(None, "without the output scale s", flags=("--no-scale",))
    train_diagonal: bool | None = option(
        None, "without the block-diagonal factor", flags=("--no-diagonal",)
    )
    init_adapter: str | None = option(
        None, "begin with this saved adapter, or a run's, and its settings", metavar="DIR"
    )
    # Training.
    lr: float | None = option(
        None, "peak learning rate ({default})", metavar="LR", range=(0, 100), positive=True,
        flags=("--lr", "--learning-rate"),
        shown=", ".join(f"{lr:g} for {method}" for method, lr in DEFAULT_LR.items()),
    )  # fmt: skip
    steps: int | None = option(
        None, "optimiser steps ({default})", metavar="N", range=(1, 10**9), unit=True
    )
    epochs: float | None = option(
        None, "passes over the data, instead of --steps", metavar="N", range=(0, 1e6), positive=True
    )
    batch_size: int | None = option(
        None, "sequences in a batch ({default})", metavar="N", range=(1, 2**26)
    )
    seq_len: int | None = option(
        None, "tokens in a sequence ({default})", metavar="N", range=(2, 2**26)
    )
    packing: str = option(
        "stream", "texts in a row ({default}, default), or each by itself (documents)",
        choices=PACKINGS,
    )  # fmt: skip
    grad_accumulation: int | None = option(
        None, "batches in an optimiser step, those of all processes ({default})", metavar="N",
        range=(1, 2**26), shown="one for each process",
    )  # fmt: skip
    weight_decay: float | None = option(None, "of AdamW ({default})", metavar="W", range=(0, 1000))
    schedule: str | None = option(
        None, "learning rate after the warm-up ({default})", choices=SCHEDULES
    )
    warmup: int = option(10, "steps of linear warm-up ({default})", metavar="N", range=(0, 10**9))
    clip: float = option(
        1.0, "largest gradient norm ({default:g}); 0: no clipping", metavar="NORM", range=(0, 1e9)
    )
    seed: int = option(
        0, "of initial values, data order, dropout ({default})", range=(-(2**63), 2**64 - 1)
    )
    memory_budget: str | None = option(
        None, "fit into so much GPU memory, such as 8GiB or 6GB; the plan is printed first",
        metavar="SIZE",
    )  # fmt: skip
    activations: str = option(
        "auto", "what layers keep for backward, from fast to small; {default} (default): what fits",
        choices=ACTIVATIONS,
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "the same as --activations checkpoint")
    optimizer: str = option(
        "adamw", "{default} (default), or with moments in 8 bits, which needs bitsandbytes",
        choices=OPTIMIZERS,
    )  # fmt: skip
    loss: str = option(
        "auto", "chunked and liger never hold all logits, full does; {default} (default): one of "
        "the first", choices=LOSSES,
    )  # fmt: skip
    cuda_graph: str = option(
        "auto", "launch a step as one CUDA graph; {default} (default): where the GPU would wait "
        "otherwise", choices=CUDA_GRAPHS,
    )  # fmt: skip
    impl: str = option(
        "auto", "what computes the adapted projectors; {default} (default): the Triton kernels on "
        "GPUs that they are compiled for, after comparing one product, else PyTorch", choices=IMPLS,
    )  # fmt: skip
    quantize: str | None = option(
        None, "store the base model's projectors so while it is used (not in what is written); an "
        "adapter keeps to what it was trained on; auto: in nf4 if they do not fit otherwise",
        choices=(*QUANTIZE, "auto"),
    )  # fmt: skip
    quantize_modules: str = option(
        "projectors", "what --quantize stores: {default} (default); all: linear layers, experts, "
        "embeddings and head too", choices=QUANTIZE_MODULES,
    )  # fmt: skip
    shard: bool = option(
        False, "divide the frozen model's blocks among the processes of the run, for one that does "
        "not fit a GPU"
    )  # fmt: skip
    experts: str = option(
        "auto", "where quantised experts are: on the device, or on the host and copied when a "
        "batch takes them; {default} (default): on the host if nothing else fits",
        choices=EXPERTS,
    )  # fmt: skip
    device: str = option("auto", "{default}: CUDA where there is one", choices=DEVICES)
    dtype: str = option(
        "auto", "compute dtype; {default}: bfloat16 on CUDA, float32 on a CPU", choices=DTYPES
    )
    # How often.
    eval_every: int = option(
        50, "steps between evaluations ({default}); 0: before and after", metavar="N",
        range=(0, 10**9),
    )  # fmt: skip
    save_every: int = option(
        50, "steps between saved states ({default}); 0: at the end", metavar="N", range=(0, 10**9)
    )
    log_every: int = option(
        1, "steps between metric lines ({default})", metavar="N", range=(1, 10**9)
    )
    keep: str = option(
        "last", "of which step the adapter and the model are written: the {default} (default), or "
        "the one with the best evaluation", choices=KEEP,
    )  # fmt: skip
    report_to: tuple[str, ...] | None = option(
        None, "report to these trackers, which must be installed", choices=TRACKERS
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value, required = getattr(self, field.name), "None" not in str(field.type)
            checked = checked_value(OPTIONS[field.name], value, required=required)
            object.__setattr__(self, field.name, checked)
        self._settle_methods()
        if self.preset is not None:
            if self.preset not in PRESETS:
                check_choice("`preset`", self.preset, LANGUAGE_PRESETS, error=ConfigError)
            if self.preset not in LANGUAGE_PRESETS:
                raise ConfigError(
                    f"`preset` {self.preset!r} is for image classification, which is not trained "
                    "here; take its adapter with prodial_kernels.config.get_preset() in your own "
                    "training loop"
                )
        self._check_together()

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
        """Raise ConfigError, which lists unknown and known names, unless all are options."""
        unknown = sorted(set(names) - set(OPTIONS))
        if not unknown:
            return
        meant = {name: option_meant(name, OPTIONS) for name in unknown}
        hints = [f"{name!r}: did you mean {found!r}?" for name, found in meant.items() if found]
        listed = "" if len(hints) == len(unknown) else f"; known are {', '.join(OPTIONS)}"
        raise ConfigError("; ".join([f"{source}: unknown keys {unknown}", *hints]) + listed)

    @property
    def chosen_activations(self) -> str:
        """``activations``, or what ``gradient_checkpointing`` stands for."""
        return "checkpoint" if self.gradient_checkpointing else self.activations

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def resolved(self, *, processes: int = 1) -> ResolvedConfig:
        """Fill in every option that is None and has a default; paths become absolute.

        What comes out resolves to itself. ``processes`` are those that train together.

        Raises:
            ConfigError: The batches of a step cannot be divided among the processes.
        """
        preset = self._preset
        lr = DEFAULT_LR.get(self.method, DEFAULT_LR["prodial"])
        values: dict[str, Any] = {"lr": lr, **DEFAULTS}
        values["grad_accumulation"] = processes
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
        if self.method != "full" and self.methods is None:
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
        resolved = ResolvedConfig(**{**given, **filled})
        if resolved.grad_accumulation % processes:
            raise ConfigError(
                f"`grad_accumulation` is how many batches all processes together take in a step: "
                f"{resolved.grad_accumulation} cannot be divided among {processes}; give a "
                f"multiple of {processes}, or start another number of processes"
            )
        return resolved

    def adapter(self, *, r: int | None = None) -> ProdialConfig:
        """Return the adapter's configuration.

        Args:
            r: Rank to use where ``self.r`` is None, which only ``method="lora"`` leaves open.

        Raises:
            ConfigError: ``method="full"``, or no rank.
            ValueError: Adapter options that do not fit together.
        """
        if self.method == "full":
            raise ConfigError("`method` 'full' has no adapter")
        if self.methods is not None:
            return replace(ProdialConfig.of(methods_from(self.methods)), impl=self.impl)
        resolved = self.resolved()
        values = {name: getattr(resolved, name) for name in ADAPTER_OPTIONS}
        # Not given, they are the adapter's own defaults: no preset and no method decides them.
        for name in LATER_OPTIONS:
            if values[name] is None:
                del values[name]
        if values["r"] is None:
            values["r"] = r
        if values["r"] is None:
            raise ConfigError("`method` 'lora' without `r` needs the model to choose its rank")
        if not values["train_diagonal"]:
            values["n_blocks"] = values["block_size"] = None
        return ProdialConfig(**values, impl=self.impl)

    def reference_adapter(self) -> ProdialConfig:
        """Return the ProDiaL adapter whose size LoRA without ``r`` matches; raises as `adapter`."""
        values = {name: getattr(self, name) for name in ADAPTER_OPTIONS}
        values |= {"train_scale": None, "train_diagonal": None, "preset": self.preset}
        return FinetuneConfig.from_dict(values).adapter()

    @property
    def _preset(self) -> Preset | None:
        return None if self.preset is None else PRESETS[self.preset]

    def _adapter_defaults(self) -> dict[str, Any]:
        base = ProdialConfig() if self._preset is None else self._preset.adapter
        values = {name: getattr(base, name) for name in ADAPTER_OPTIONS}
        # A run of a version that did not know them had neither.
        for name in LATER_OPTIONS:
            del values[name]
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

    def _settle_methods(self) -> None:
        """Let ``method`` and ``methods`` say the same."""
        label, methods = settled_methods(self.method, self.methods)
        if methods is None:
            return
        object.__setattr__(self, "method", label)
        object.__setattr__(self, "methods", methods)
        given = [f"`{n}`" for n in (*ADAPTER_OPTIONS, "preset") if getattr(self, n) is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} would have no effect beside `methods`; it is an option "
                "of one of them, such as r=8 or {'name': 'prodial', 'r': 8}"
            )

    def _check_together(self) -> None:
        """Raise ConfigError where options contradict each other, as far as no model tells."""
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ConfigError(
                f"`held_out_fraction` must lie between 0 and 1, got {self.held_out_fraction}"
            )
        if self.lora_dropout is not None and not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(
                f"`lora_dropout` must be at least 0 and less than 1, got {self.lora_dropout}"
            )
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"give `steps` or `epochs`, not both (got {self.steps} and {self.epochs:g})"
            )
        if self.n_blocks is not None and self.block_size is not None:
            raise ConfigError("give `n_blocks` or `block_size`, not both")
        if self.memory_budget is not None:
            try:
                parse_budget(self.memory_budget)
            except ValueError as error:
                raise ConfigError(f"`memory_budget`: {error}") from error
        if self.gradient_checkpointing and self.activations not in ("auto", "checkpoint"):
            raise ConfigError(
                "`gradient_checkpointing` means `activations` 'checkpoint', and contradicts "
                f"`activations` {self.activations!r}; give one of them"
            )
        if self.quantize_modules == "all" and self.quantize is None:
            raise ConfigError(
                "`quantize_modules` says what `quantize` stores, and `quantize` is not given; add "
                "it, such as `quantize` 'nf4'"
            )
        if self.experts == "host" and self.quantize_modules != "all":
            raise ConfigError(
                "`experts` 'host' is of quantised experts, and `quantize_modules` is "
                f"{self.quantize_modules!r}; make it 'all'"
            )
        if self.shard and self.method == "full":
            raise ConfigError(
                "`shard` divides the frozen model, and `method` 'full' trains all of it; leave one "
                "of them out"
            )
        self._check_step()
        if self.method == "full":
            self._check_without_adapter()
        elif self.methods is None:
            self._check_adapter()

    def _check_without_adapter(self) -> None:
        if self.impl != "auto":
            raise ConfigError(
                "`impl` says how adapted projectors are computed, and `method` 'full' adapts none; "
                "leave it out"
            )
        options = (*ADAPTER_OPTIONS, "quantize", "init_adapter")
        given = [f"`{name}`" for name in options if getattr(self, name) is not None]
        if given:
            raise ConfigError(
                "`method` 'full' trains every weight and has no adapter: leave out "
                f"{', '.join(given)}, or take another method"
            )

    def _check_adapter(self) -> None:
        for part in self.train_ssm or ():
            check_choice("`train_ssm`", part, (*SSM_PARTS, "all"), error=ConfigError)
        if self.compute == "fp8" and self.quantize not in (None, "fp8"):
            raise ConfigError(
                "`compute` 'fp8' multiplies weights that are stored in fp8, and `quantize` is "
                f"{self.quantize!r}; make it 'fp8'"
            )
        lora = self.method == "lora"
        without = lora or (self.train_scale is False and self.train_diagonal is False)
        if self.r == 0 and without:
            raise ConfigError(
                "nothing would be trained: `r` is 0, and there is neither an output scale nor a "
                "diagonal factor; give a larger `r`" + ("" if lora else ", or leave one of them on")
            )
        if self.lora_alpha == 0 and self.r != 0:
            raise ConfigError(
                "`lora_alpha` 0 multiplies A and B by 0, and they would learn nothing: leave it out"
                + ("" if lora else ", or leave A and B out with `r` 0")
            )

    def _check_step(self) -> None:
        names = ("batch_size", "seq_len", "grad_accumulation")
        given = {name: getattr(self, name) for name in names}
        step = {n: DEFAULTS[n] if value is None else value for n, value in given.items()}
        tokens = math.prod(step.values())
        if tokens > MOST_TOKENS_IN_A_STEP:
            product = " × ".join(f"`{name}` {size:,}" for name, size in step.items())
            raise ConfigError(
                f"{product} are {tokens:,} tokens in a step; it must be at most "
                f"{MOST_TOKENS_IN_A_STEP:,}"
            )


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
    grad_accumulation: int
    weight_decay: float
    schedule: str

    def optimizer_steps(self, batches_per_epoch: int) -> int:
        """Return the length of the run: ``steps``, or those that ``epochs`` take.

        ConfigError where neither is given, which :meth:`resolved` does not leave.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ConfigError("give `steps` or `epochs`")
        micro_batches = math.ceil(self.epochs * batches_per_epoch)
        return math.ceil(micro_batches / self.grad_accumulation)


_OF_AN_ADAPTER = {each.name: each.default for each in fields(ProdialConfig)}
# What stands beside the adapter is the run's list, with the adapter in it.
del _OF_AN_ADAPTER["methods"]
OPTIONS = options_of(FinetuneConfig, {**_OF_AN_ADAPTER, **DEFAULTS})
"""Every option by name."""
ADAPTER_OPTIONS = tuple(name for name in OPTIONS if name in _OF_AN_ADAPTER and name != "impl")
"""Names of the options that a run's own adapter has."""

_LINES = "".join(f"        {o.name} ({o.flags[0]}): {o.help_text}\n" for o in OPTIONS.values())
FinetuneConfig.__doc__ = f"{FinetuneConfig.__doc__}\n    Options, by field and flag:\n{_LINES}"
