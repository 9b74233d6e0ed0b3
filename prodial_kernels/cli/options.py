"""The options of every command. An option that is not given leaves no trace in the namespace."""

from __future__ import annotations

import argparse
import re
from typing import Any

from prodial_kernels.cli.values import (
    at_least,
    count,
    integer,
    merged_blocks,
    number,
    per_target,
    share_or_count,
)
from prodial_kernels.training.config import (
    ACTIVATIONS,
    CUDA_GRAPHS,
    DEFAULT_LR,
    DEFAULTS,
    DEVICES,
    DTYPES,
    IMPLS,
    LOSSES,
    METHODS,
    OPTIMIZERS,
    PACKINGS,
    QUANTIZE,
    SCHEDULES,
    STDLIB_EVAL_TOKENS,
    STDLIB_MAX_BYTES,
    FinetuneConfig,
)

LANGUAGE_PRESETS = ("arc-easy", "arc-challenge", "hellaswag", "winogrande")
_LRS = ", ".join(f"{lr:g} for {method}" for method, lr in DEFAULT_LR.items())


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Add one flag for every field of ``FinetuneConfig``, by the field's name."""
    what = parser.add_argument_group("what to train, and on what")
    _add_model(what, "embedded: a small one in this package")
    _add_data(what)
    what.add_argument("--held-out", metavar="DATA", help="evaluate on this instead of splitting")
    what.add_argument(
        "--held-out-fraction",
        type=number,
        metavar="F",
        help=f"share of the data to hold out ({FinetuneConfig.held_out_fraction})",
    )
    what.add_argument(
        "--max-bytes",
        type=count,
        metavar="N",
        help=f"use so much of the data (stdlib: {STDLIB_MAX_BYTES:,}, else all)",
    )
    what.add_argument(
        "--eval-tokens", type=count, metavar="N",
        help=f"evaluate on so many held-out tokens (stdlib: {STDLIB_EVAL_TOKENS:,}, else all)",
    )  # fmt: skip
    what.add_argument(
        "--output",
        metavar="DIR",
        help=f"where the run is kept ({FinetuneConfig.output}); must be empty or new",
    )
    what.add_argument(
        "--resume", action="store_true",
        help="continue the run in --output; options that are not given are the run's own",
    )  # fmt: skip

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method", choices=METHODS,
        help="prodial (default); lora: without --r the rank whose parameter count comes closest "
        "to ProDiaL's; full: every parameter",
    )  # fmt: skip
    add_adapter_options(method)

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr", "--learning-rate", type=number, metavar="LR", help=f"peak learning rate ({_LRS})"
    )
    training.add_argument(
        "--steps", type=count, metavar="N", help=f"optimiser steps ({DEFAULTS['steps']})"
    )
    training.add_argument(
        "--epochs", type=number, metavar="N", help="passes over the data, instead of --steps"
    )
    training.add_argument(
        "--batch-size",
        type=integer,
        metavar="N",
        help=f"sequences in a batch ({DEFAULTS['batch_size']})",
    )
    training.add_argument(
        "--seq-len", type=integer, metavar="N", help=f"tokens in a sequence ({DEFAULTS['seq_len']})"
    )
    training.add_argument(
        "--packing", choices=PACKINGS,
        help="texts in a row (stream, default), or each by itself (documents)",
    )  # fmt: skip
    training.add_argument(
        "--grad-accumulation",
        type=integer,
        metavar="N",
        help=f"batches in an optimiser step ({FinetuneConfig.grad_accumulation})",
    )
    training.add_argument(
        "--weight-decay", type=number, metavar="W", help=f"of AdamW ({DEFAULTS['weight_decay']})"
    )
    training.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help=f"learning rate after the warm-up ({DEFAULTS['schedule']})",
    )
    training.add_argument(
        "--warmup",
        type=integer,
        metavar="N",
        help=f"steps of linear warm-up ({FinetuneConfig.warmup})",
    )
    training.add_argument(
        "--clip",
        type=number,
        metavar="NORM",
        help=f"largest gradient norm ({FinetuneConfig.clip:g}); 0: no clipping",
    )
    training.add_argument(
        "--seed",
        type=integer,
        help=f"of initial values, data order, dropout ({FinetuneConfig.seed})",
    )
    training.add_argument(
        "--memory-budget", metavar="SIZE",
        help="fit into so much GPU memory, such as 8GiB or 6GB; the plan is printed first",
    )  # fmt: skip
    training.add_argument(
        "--activations", choices=ACTIVATIONS,
        help="what layers keep for backward, from fast to small; auto (default): what fits",
    )  # fmt: skip
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="the same as --activations checkpoint"
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS,
        help="adamw (default), or with moments in 8 bits, which needs bitsandbytes",
    )  # fmt: skip
    training.add_argument(
        "--loss", choices=LOSSES,
        help="chunked and liger never hold all logits, full does; auto (default): one of the first",
    )  # fmt: skip
    training.add_argument(
        "--cuda-graph", choices=CUDA_GRAPHS,
        help="launch a step as one CUDA graph; auto (default): where the GPU would wait otherwise",
    )  # fmt: skip
    add_impl_option(training)
    add_device_options(training, formats=(*QUANTIZE, "auto"))

    records = parser.add_argument_group("how often")
    records.add_argument(
        "--eval-every",
        type=integer,
        metavar="N",
        help=f"steps between evaluations ({FinetuneConfig.eval_every}); 0: before and after",
    )
    records.add_argument(
        "--save-every",
        type=integer,
        metavar="N",
        help=f"steps between saved states ({FinetuneConfig.save_every}); 0: at the end",
    )
    records.add_argument(
        "--log-every",
        type=integer,
        metavar="N",
        help=f"steps between metric lines ({FinetuneConfig.log_every})",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="options in a JSON or TOML file, such as batch_size = 4; "
        "flags win over it",
    )  # fmt: skip


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial evaluate``."""
    _add_model(parser, "the adapter's base model, or embedded")
    _add_adapter(parser, required=False)
    _add_data(parser)
    parser.add_argument(
        "--split", choices=("held-out", "all"),
        help="evaluate on the part that 'prodial finetune' holds out (default for stdlib), or on "
        "all of the data (default for anything else; of a hub data set its own test part)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens",
        type=at_least(1, count),
        metavar="N",
        help=f"stop after so many tokens of text (stdlib: {STDLIB_EVAL_TOKENS:,}, else all)",
    )
    parser.add_argument(
        "--seq-len", type=at_least(1), metavar="N", help=f"tokens at once ({DEFAULTS['seq_len']})"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N", help="texts at once (8)"
    )
    parser.add_argument(
        "--lm-eval", nargs="+", metavar="TASK",
        help="run these tasks of lm-evaluation-harness instead, such as hellaswag arc_easy",
    )  # fmt: skip
    parser.add_argument(
        "--num-fewshot", type=at_least(0), metavar="N", help="of --lm-eval: examples per question"
    )
    parser.add_argument("--limit", type=share_or_count, metavar="N",
        help="evaluate so many examples (of each task), or, under 1, such a share of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_impl_option(parser)
    add_device_options(parser)


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial merge``."""
    _add_model(parser, "the adapter's base model")
    _add_adapter(parser, required=True)
    parser.add_argument("--output", metavar="DIR", required=True, help="directory to write")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an empty directory, or a model that prodial wrote and nobody changed since",
    )
    add_device_options(parser)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial inspect``."""
    parser.add_argument(
        "path", help="directory of an adapter or a run; or a model: directory, hub id, embedded"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_adapter_options(parser.add_argument_group("for a model: the adapter to plan"))


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prodial convert``."""
    parser.add_argument(
        "path", metavar="ADAPTER", help="directory of an adapter, or of the run that wrote it"
    )
    parser.add_argument(
        "--to", choices=("peft", "lora", "prodial"), required=True,
        help="ProDiaL for PEFT, plain LoRA for PEFT, or from either of them to this package's form",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", required=True, help="new directory to write")
    _add_model(parser, "for --to prodial: the adapter's base model")


def add_adapter_options(group: Any) -> None:
    """Add the options of ``ProdialConfig``."""
    group.add_argument(
        "--preset", metavar="NAME",
        help=f"a setting of the paper ({', '.join(LANGUAGE_PRESETS)}); other flags win over it",
    )  # fmt: skip
    group.add_argument(
        "--r", "--rank", type=integer, metavar="R", help="rank of the LoRA part (16); 0: none"
    )
    group.add_argument("--lora-alpha", type=number, metavar="A", help="LoRA is scaled by A / R (R)")
    group.add_argument("--lora-dropout", type=number, metavar="P", help="on LoRA's input (0)")
    group.add_argument(
        "--n-blocks", type=per_target, nargs="+", metavar="N",
        help="diagonal blocks: one number, or in_proj=64 out_proj=32 (default: 1×1 blocks)",
    )  # fmt: skip
    group.add_argument(
        "--block-size", type=per_target, nargs="+", metavar="P", help="side of a block instead"
    )
    group.add_argument(
        "--diagonal", metavar="KIND", help="relu (the paper's Eq. 7) or free (two-sided)"
    )
    group.add_argument(
        "--target-modules", nargs="+", metavar="NAME",
        help="layers to adapt (in_proj out_proj), or one regular expression for whole paths",
    )  # fmt: skip
    group.add_argument(
        "--allow-partial", action="store_const", const=True,
        help="adapt what matches, also where only some of the layers do",
    )  # fmt: skip
    group.add_argument(
        "--modules-to-save", nargs="+", metavar="NAME",
        help="other modules to train and save as a whole, such as a head",
    )  # fmt: skip
    group.add_argument(
        "--no-scale", dest="train_scale", action="store_const", const=False,
        help="without the output scale s",
    )  # fmt: skip
    group.add_argument(
        "--no-diagonal", dest="train_diagonal", action="store_const", const=False,
        help="without the block-diagonal factor",
    )  # fmt: skip


def add_impl_option(group: Any) -> None:
    """Add ``--impl``."""
    group.add_argument(
        "--impl", choices=IMPLS,
        help="what computes the adapted projectors; auto (default): the Triton kernels on GPUs "
        "that they are compiled for, after comparing one product, else PyTorch",
    )  # fmt: skip


def add_device_options(group: Any, *, formats: tuple[str, ...] = QUANTIZE) -> None:
    """Add ``--device``, ``--dtype`` and ``--quantize``, which takes ``formats``."""
    automatic = "; auto: in nf4 if they do not fit otherwise" if "auto" in formats else ""
    group.add_argument(
        "--quantize", choices=formats,
        help="store the base model's projectors so while it is used (not in what is written); an "
        f"adapter keeps to what it was trained on{automatic}",
    )  # fmt: skip
    group.add_argument("--device", choices=DEVICES, help="auto: CUDA where there is one")
    group.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype; auto: bfloat16 on CUDA, float32 on a CPU"
    )


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a namespace that belong to ``FinetuneConfig``, in its terms."""
    values = {
        name: value
        for name, value in vars(args).items()
        if name not in ("command", "command_name", "debug", "config", "resume", "path", "json")
    }
    for name in ("n_blocks", "block_size"):
        if name in values:
            values[name] = merged_blocks(name, values[name])
    targets = values.get("target_modules")
    if targets is not None and len(targets) == 1 and re.search(r"[\\^$*+?()|\[\]{}]", targets[0]):
        values["target_modules"] = targets[0]
    return values


def _add_model(group: Any, default: str) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        help=f"directory in transformers' format or hub id ({default})",
    )


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data", metavar="DATA",
        help="text file, directory of texts, rows (JSONL, JSON, CSV, TSV, Parquet: text; prompt, "
        "completion; instruction, output; messages; context, choices, label; or HellaSwag, "
        "Winogrande, ARC), or hub data set NAME[:CONFIGURATION] (stdlib: the source of Python's "
        "own library)",
    )  # fmt: skip


def _add_adapter(group: Any, *, required: bool) -> None:
    group.add_argument(
        "--adapter",
        metavar="DIR",
        required=required,
        help="directory of an adapter for the model, or of its run",
    )
