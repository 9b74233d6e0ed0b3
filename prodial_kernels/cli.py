"""``prodial …``: the command line, thin over ``prodial_kernels.training``.

Nothing heavy is imported before a command runs, so that help and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from prodial_kernels import cli_options

_DESCRIPTION = """\
Fine-tune Mamba language models through their projectors with ProDiaL, evaluate the result, and
merge it into a plain model that transformers loads."""

_EXAMPLES = """\
examples:
  prodial finetune                      a small pretrained Mamba-2 on Python's own source code
  prodial finetune --model DIR --data notes.txt --steps 500 --output my-run
  prodial evaluate --model DIR --adapter my-run/adapter --data notes.txt
  prodial merge --model DIR --adapter my-run/adapter --output merged-model
  prodial inspect my-run/adapter

'prodial COMMAND --help' explains a command."""

_FINETUNE_EXAMPLES = """\
Without options it trains the embedded model on the standard library's source: one to two minutes
on two CPU cores. Held-out text is evaluated before, during and after. The run's directory
then holds the adapter, the merged model (checked against the trained one), metrics.jsonl, loss.png.

examples:
  prodial finetune --method lora --output lora-run        compare with LoRA of the same size
  prodial finetune --model DIR --data code/ --preset hellaswag --steps 1000
  prodial finetune --n-blocks in_proj=64 out_proj=32 --r 8 --lora-dropout 0.1
  prodial finetune --config options.toml --lr 0.001
  prodial finetune --resume --output my-run               continue after Ctrl-C or a crash"""

_EVALUATE_EXAMPLES = """\
Texts give loss, perplexity and bits per byte; multiple choice gives accuracy by likelihood, raw and
length-normalised.

examples:
  prodial evaluate                                        the embedded model, held-out stdlib
  prodial evaluate --adapter prodial-output/adapter       the same with an adapter
  prodial evaluate --model prodial-output/merged --data questions.jsonl
  prodial evaluate --model DIR --lm-eval hellaswag arc_easy --limit 100"""

_MERGE_EXAMPLES = """\
example:
  prodial merge --model DIR --adapter my-run/adapter --output merged-model"""

_INSPECT_EXAMPLES = """\
Of an adapter: its settings, and how far each part has moved from doing nothing. Of a model: the
layers that an adapter with these options would train, and how many parameters it would have.

examples:
  prodial inspect my-run/adapter
  prodial inspect embedded --preset arc-easy"""


class _Command(NamedTuple):
    usage: str
    summary: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see '{self.prog} --help')")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; by default those of this process.

    Returns:
        The exit status: 0 on success, 1 on an error, 128 and the signal's number when interrupted
        (130: Ctrl-C, 143: SIGTERM). A wrong option raises ``SystemExit(2)``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    command: _Command = args.command
    # PyTorch's OpenMP threads by default spin for about a millisecond at every barrier. With other
    # processes on the same cores that made training up to six times slower than this shorter spin
    # does, which costs nothing on a quiet machine. It is read when PyTorch is loaded, later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        return command.run(args)
    except KeyboardInterrupt as interrupt:
        _complain("interrupted" if not interrupt.args else f"interrupted by {interrupt}")
        return int(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:
        # Whoever read the output has gone, as with 'prodial inspect … | head'.
        return 1
    except Exception as error:
        if "debug" in args:
            raise
        _complain(_explain(error))
        return 1


def _finetune(args: argparse.Namespace) -> int:
    from prodial_kernels.training.allocator import grow_segments
    from prodial_kernels.training.config import FinetuneConfig
    from prodial_kernels.training.config_file import read_config_file
    from prodial_kernels.training.run import RunDirectory

    values = cli_options.config_values(args)
    if "config" in args:
        values = {**read_config_file(args.config), **values}
    output = values.get("output", FinetuneConfig.output)
    if "resume" in args:
        values = {**RunDirectory(output).read_identity().config, **values, "output": output}
    config = FinetuneConfig.from_dict(values)
    if "resume" not in args:
        RunDirectory(output).check_startable()
    if config.memory_budget is not None:
        # Gaps between tensors count too. It is read when CUDA starts, later.
        grow_segments()

    from prodial_kernels.training.finetuning import finetune
    from prodial_kernels.training.oom import OutOfMemory

    _quiet_transformers()
    try:
        print(finetune(config, resume="resume" in args))
    except (KeyboardInterrupt, OSError, OutOfMemory):
        if RunDirectory(output).identity_file.exists():
            command = shlex.join(["prodial", "finetune", "--resume", "--output", output])
            _say(f"what was saved is kept; continue with: {command}")
        raise
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from prodial_kernels.training.adapted import load_adapted
    from prodial_kernels.training.assess import assess, assess_with_harness

    _quiet_transformers()
    values = vars(args)
    loaded = load_adapted(
        values.get("model"), values.get("adapter"),
        device=values.get("device", "auto"), dtype=values.get("dtype", "auto"),
        quantize=values.get("quantize"),
    )  # fmt: skip
    if "lm_eval" in args:
        print(
            assess_with_harness(
                loaded, args.lm_eval, batch_size=args.batch_size,
                num_fewshot=values.get("num_fewshot"), limit=values.get("limit"),
            )
        )  # fmt: skip
        return 0
    assessment = assess(
        loaded, values.get("data", "stdlib"), split=values.get("split"),
        max_tokens=values.get("max_tokens"), seq_len=args.seq_len, batch_size=args.batch_size,
    )  # fmt: skip
    print(assessment.to_json() if "json" in args else assessment)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from prodial_kernels.training.adapted import merge_to_directory

    _quiet_transformers()
    values = vars(args)
    agreement = merge_to_directory(
        values.get("model"), args.adapter, args.output, replace="force" in args,
        device=values.get("device", "auto"), dtype=values.get("dtype", "auto"),
        quantize=values.get("quantize"),
    )  # fmt: skip
    print(f"wrote {args.output}; merged and unmerged {agreement}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from prodial_kernels.training.inspection import inspect_adapter, inspect_model, is_adapter

    _quiet_transformers()
    report = (
        inspect_adapter(args.path)
        if is_adapter(args.path)
        else inspect_model(args.path, cli_options.config_values(args))
    )
    print(report.to_json() if "json" in args else report)
    return 0


_COMMANDS = {
    "finetune": _Command(
        "[options]",
        "fine-tune a model; evaluate, save and merge it",
        _FINETUNE_EXAMPLES, cli_options.add_finetune_options, _finetune,
    ),
    "evaluate": _Command(
        "[options]",
        "evaluate a model, with or without an adapter",
        _EVALUATE_EXAMPLES, cli_options.add_evaluate_options, _evaluate,
    ),
    "merge": _Command(
        "--adapter DIR --output DIR [options]",
        "fold an adapter into its model and write that",
        _MERGE_EXAMPLES, cli_options.add_merge_options, _merge,
    ),
    "inspect": _Command(
        "PATH [options]",
        "show what an adapter holds, or would train in a model",
        _INSPECT_EXAMPLES, cli_options.add_inspect_options, _inspect,
    ),
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    from prodial_kernels import __version__

    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="prodial", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"prodial {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            usage=f"prodial {name} {command.usage}",
            description=f"{command.summary.capitalize()}. In parentheses: the defaults.",
            epilog=command.epilog,
            formatter_class=form,
            # An option that is not given leaves no trace, so that other sources can fill it in.
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.add_options(subparser)
        subparser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        subparser.set_defaults(command=command)
    return parser


def _explain(error: Exception) -> str:
    """Say what went wrong; what the package does not raise on purpose is named by its class."""
    expected = (ValueError, RuntimeError, OSError)
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    message = str(error) or "no message"
    if isinstance(error, expected) and type(error).__module__.split(".")[0] in _OWN_OR_BUILTIN:
        return message
    return f"{type(error).__name__}: {message} ('--debug' shows where)"


_OWN_OR_BUILTIN = ("builtins", "prodial_kernels")


def _complain(message: str) -> None:
    _say(f"prodial: error: {message}")


def _say(message: str) -> None:
    """Print on stderr; the terminal may have gone, and with it whoever would read this."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr)


def _quiet_transformers() -> None:
    """Keep other libraries' notes and bars out of the way of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
