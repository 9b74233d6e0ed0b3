"""``prodial …``: the command line, thin over ``prodial_kernels.training``.

Nothing heavy is imported before a command runs, so that help and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from prodial_kernels._checks import printable
from prodial_kernels.cli import options
from prodial_kernels.cli.messages import (
    explained,
    joined_numbers,
    repeated,
    unexpected,
    unknown_flag,
    with_suggestion,
)
from prodial_kernels.cli.paths import adapter_directory, inspected
from prodial_kernels.training.config import OPTIONS, ConfigError
from prodial_kernels.training.distributed.launch import Launch, tell_launcher
from prodial_kernels.upstream import require_extra

_DESCRIPTION = """\
Fine-tune Mamba language models through their projectors with ProDiaL, evaluate the result, and
merge it into a plain model that transformers loads."""

_EXAMPLES = """\
examples:
  prodial finetune                      a small pretrained Mamba-2 on Python's own source code
  prodial finetune --model DIR --data notes.txt --steps 500 --output my-run
  prodial search --model DIR --data notes.txt --output my-search
  prodial evaluate --model DIR --adapter my-run/adapter --data notes.txt
  prodial generate --model DIR --adapter my-run/adapter --prompt "Once upon"
  prodial merge --model DIR --adapter my-run/adapter --output merged-model
  prodial inspect my-run/adapter
  prodial convert my-run/adapter --to peft --output peft-adapter

'prodial COMMAND --help' explains a command."""

_FINETUNE_EXAMPLES = """\
Without options it trains the embedded model on the standard library's source: one to two minutes
on two CPU cores. Held-out text is evaluated before, during and after. The run's directory
then holds the adapter, the merged model (checked against the trained one), metrics.jsonl, loss.png.

examples:
  prodial finetune --method lora --output lora-run        compare with LoRA of the same size
  prodial finetune --model DIR --data code/ --preset hellaswag --steps 1000
  prodial finetune --method prodial r=8 partial-tuning parts=conv1d,D decay=10
  prodial finetune --n-blocks in_proj=64 out_proj=32 --r 8 --lora-dropout 0.1
  prodial finetune --config options.yaml --lr 0.001
  prodial finetune --init-adapter my-run --data more.txt --keep best
  prodial finetune --resume --output my-run               continue after Ctrl-C or a crash"""

_SEARCH_EXAMPLES = """\
Step one tries every part by itself, then combinations of them; step two varies the sizes, scales,
learning rate and weight decay of the best. Each trial is a short run, evaluated on held-out data.
The directory then holds report.md, search.png, and best.json for 'prodial finetune --config'.
It needs optuna: pip install "prodial-kernels[search]".

examples:
  prodial search --model DIR --data notes.txt --trials 40 --max-trainable 200k --output my-search
  prodial search --among scale lora --trials 10 --workers 2
  prodial search --resume --output my-search              continue after Ctrl-C or a crash
  prodial finetune --config my-search/best.json --steps 500 --output my-run"""

_EVALUATE_EXAMPLES = """\
Texts give loss, perplexity and bits per byte; multiple choice gives accuracy by likelihood, raw and
length-normalised.

examples:
  prodial evaluate                                        the embedded model, held-out stdlib
  prodial evaluate --adapter prodial-output/adapter       the same with an adapter
  prodial evaluate --model prodial-output/merged --data questions.jsonl
  prodial evaluate --model DIR --lm-eval hellaswag arc_easy --limit 100"""

_GENERATE_EXAMPLES = """\
The text goes to standard output as it comes, all else to standard error. Each token is the one that
a forward pass over the whole text gives, also for models whose caches change what they compute.

examples:
  prodial generate --prompt "def main("                   the embedded model
  prodial generate --adapter my-run/adapter --prompt "Q: What is 2 + 2? A:" --temperature 0.7
  prodial generate --model DIR --adapter my-run/adapter --chat            a conversation
  cat text | prodial generate --model my-run/merged --max-new-tokens 64"""

_MERGE_EXAMPLES = """\
example:
  prodial merge --model DIR --adapter my-run/adapter --output merged-model"""

_INSPECT_EXAMPLES = """\
Of an adapter: its settings, and how far each part has moved from doing nothing. Of a model: the
layers that an adapter with these options would train, and how many parameters it would have. Of
targets: which match, which are absent, which PEFT refuses, and which would be dead, that is without
gradient where mamba-ssm's kernels train. For a model its configuration is enough.

examples:
  prodial inspect my-run/adapter
  prodial inspect embedded --preset arc-easy
  prodial inspect MODEL --target-modules in_proj out_proj q_proj
  prodial inspect MODEL --method prodial r=8 partial-tuning parts=conv1d,D
  prodial inspect MODEL --list peft unsloth
  prodial inspect MODEL --adapter peft-adapter"""

_CONVERT_EXAMPLES = """\
Every number stays as it is. PEFT loads ProDiaL after 'import prodial_kernels.peft', and LoRA, which
an adapter without s and D_b is, by itself.

examples:
  prodial convert my-run/adapter --to peft --output peft-adapter
  prodial convert lora-run/adapter --to lora --output lora-adapter
  prodial convert peft-adapter --to prodial --output adapter --model DIR"""


class _Command(NamedTuple):
    usage: str
    summary: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{with_suggestion(message)} (see '{self.prog} --help')")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; by default those of this process.

    Returns:
        The exit status: 0 on success, 1 on an error, 128 and the signal's number when interrupted
        (130: Ctrl-C, 143: SIGTERM). A wrong option raises ``SystemExit(2)``.
    """
    args = _parsed(list(sys.argv[1:] if argv is None else argv))
    command: _Command = args.command
    # PyTorch's OpenMP threads by default spin for about a millisecond at every barrier. With other
    # processes on the same cores that made training up to six times slower than this shorter spin
    # does, which costs nothing on a quiet machine. It is read when PyTorch is loaded, later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        require_extra(f"prodial {args.command_name}")
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
        tell_launcher(printable(explained(error)))
        # The process that failed says why; the first one repeats it, the others need not.
        if type(error).__name__ != "PeerError" or os.environ.get("RANK") == "0":
            _complain(explained(error))
        return 1


def _finetune(args: argparse.Namespace) -> int:
    from prodial_kernels.training.config import FinetuneConfig
    from prodial_kernels.training.config_file import read_config_file
    from prodial_kernels.training.memory.allocator import grow_segments
    from prodial_kernels.training.run.directory import RunDirectory

    values = options.config_values(args)
    if "config" in args:
        values = {**read_config_file(args.config), **values}
    if values.get("init_adapter") is not None:
        values["init_adapter"] = adapter_directory(values["init_adapter"], flag="--init-adapter")
    output = values.get("output", FinetuneConfig.output)
    if "resume" in args:
        values = {**RunDirectory(output).read_identity().config, **values, "output": output}
    config = FinetuneConfig.from_dict(values)
    launch = Launch.from_environment()
    # The others find what the first one has made there already, and so do all when restarted.
    if "resume" not in args and launch.main and not launch.restarts:
        RunDirectory(output).check_startable()
    if config.memory_budget is not None:
        # Gaps between tensors count too. It is read when CUDA starts, later.
        grow_segments()

    from prodial_kernels.training.distributed.world import PeerError
    from prodial_kernels.training.finetuning import finetune
    from prodial_kernels.training.step.out_of_memory import OutOfMemory

    _quiet_transformers()
    try:
        result = finetune(config, resume="resume" in args)
        if launch.main:
            print(result)
    except (KeyboardInterrupt, OSError, OutOfMemory, PeerError):
        if launch.main and RunDirectory(output).identity_file.exists():
            command = shlex.join(["prodial", "finetune", "--resume", "--output", output])
            _say(f"what was saved is kept; continue with: {command}")
        raise
    return 0


def _search(args: argparse.Namespace) -> int:
    from prodial_kernels.search import SearchConfig, search
    from prodial_kernels.search.config import OPTIONS as SEARCH_OPTIONS
    from prodial_kernels.search.config import SEARCH_OUTPUT
    from prodial_kernels.search.directory import SearchDirectory
    from prodial_kernels.training.config_file import read_config_file

    values = options.config_values(args)
    values |= {name: value for name, value in vars(args).items() if name in SEARCH_OPTIONS}
    if "config" in args:
        values = {**read_config_file(args.config), **values}
    output = values.setdefault("output", SEARCH_OUTPUT)
    if "resume" in args:
        saved = SearchDirectory(output).read().to_dict()
        values = {**saved.pop("run"), **saved, **values}
    config = SearchConfig.from_dict(values)
    if "resume" not in args:
        SearchDirectory(output).check_startable()
    _quiet_transformers()
    try:
        print(search(config, resume="resume" in args))
    except KeyboardInterrupt:
        if SearchDirectory(output).identity_file.exists():
            command = shlex.join(["prodial", "search", "--resume", "--output", output])
            _say(f"what was done is kept; continue with: {command}")
        raise
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from prodial_kernels.training.evaluating import assess, assess_with_harness, evaluation_data
    from prodial_kernels.training.scoring.lm_eval import check_tasks

    values = vars(args)
    _check_evaluation(values)
    adapter = adapter_directory(args.adapter) if "adapter" in args else None
    # Before the model is loaded, which may take minutes.
    if "lm_eval" in args:
        check_tasks(args.lm_eval, values.get("include_path"))
    else:
        data = evaluation_data(
            values.get("data", OPTIONS["data"].default), split=values.get("split"),
            max_tokens=values.get("max_tokens"), limit=values.get("limit"),
        )  # fmt: skip
    loaded = _loaded(values, adapter)
    if "lm_eval" in args:
        assessment = assess_with_harness(
            loaded, args.lm_eval, batch_size=args.batch_size,
            num_fewshot=values.get("num_fewshot"), limit=values.get("limit"),
            include_path=values.get("include_path"),
        )  # fmt: skip
        for note in assessment.notes:
            _say(note)
    else:
        assessment = assess(
            loaded, data,
            seq_len=values.get("seq_len", OPTIONS["seq_len"].default), batch_size=args.batch_size,
        )  # fmt: skip
    print(assessment.to_json() if "json" in args else assessment)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from prodial_kernels.cli.conversation import converse, prompt_given, show
    from prodial_kernels.training.generating import Sampling, generate

    values = vars(args)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    # Before the model is loaded, which may take minutes.
    prompt = prompt_given(values)
    adapter = adapter_directory(args.adapter) if "adapter" in args else None
    loaded = _loaded(values, adapter)
    if prompt is None:
        converse(loaded, sampling, system=values.get("system"), say=_say)
        return 0
    generation = generate(
        loaded.model, loaded.tokenizer, prompt, sampling, on_text=None if "json" in args else show
    )
    print(generation.to_json() if "json" in args else "", flush=True)
    for line in (*generation.notes, generation.summary):
        _say(line)
    return 0


def _loaded(values: Mapping[str, object], adapter: str | None) -> Any:
    """Load the model that a command names, and say what its projectors run by."""
    from prodial_kernels.training.adapted import load_adapted
    from prodial_kernels.training.run.implementation import implementation_of

    _quiet_transformers()
    model: Any = values.get("model")
    impl: Any = values.get("impl")
    loaded = load_adapted(model, adapter, impl=impl, **_placement(values))
    implementation = implementation_of(loaded.model)
    if implementation is not None:
        _say(f"projectors run by {implementation}")
    return loaded


def _placement(values: Mapping[str, object]) -> dict[str, Any]:
    """Return where and in which formats the base model is to be."""
    names = ("device", "dtype", "quantize")
    placement = {name: values.get(name, OPTIONS[name].default) for name in names}
    # Not given, the adapter tells.
    return {**placement, "quantize_modules": values.get("quantize_modules")}


def _check_evaluation(values: Mapping[str, object]) -> None:
    """Raise where a flag would have no effect."""
    if "lm_eval" in values:
        idle = [n for n in ("data", "split", "max_tokens", "seq_len") if n in values]
        why = "with `lm_eval`, whose tasks bring their own data and lengths"
    else:
        idle = [n for n in ("num_fewshot", "include_path") if n in values]
        why = "without `lm_eval`"
    if idle:
        named = ", ".join(f"`{name}`" for name in idle)
        raise ConfigError(f"{named} would have no effect {why}; leave it out")


_WHERE = ("device", "dtype")


def _check_stored(values: Mapping[str, Any]) -> None:
    idle = [name for name in ("target", "quantize", "quantize_modules") if name in values]
    if idle:
        named = ", ".join("`for`" if name == "target" else f"`{name}`" for name in idle)
        raise ConfigError(
            f"{named} would have no effect with `stored`, which writes what the checkpoint has; "
            "leave it out"
        )


def _merge(args: argparse.Namespace) -> int:
    from prodial_kernels.training.adapted import (
        merge_stored,
        merge_to_directory,
        notes_for_gguf,
    )

    _quiet_transformers()
    values = vars(args)
    adapter = adapter_directory(args.adapter)
    if "stored" in args:
        _check_stored(values)
    notes = notes_for_gguf(values.get("model"), adapter) if "target" in args else []
    # Of a large model it takes minutes.
    print(f"merging {args.adapter} into its model, and checking what is written", file=sys.stderr)
    places = (values.get("model"), adapter, args.output)
    if "stored" in args:
        where = {name: value for name, value in _placement(values).items() if name in _WHERE}
        result = merge_stored(*places, replace="force" in args, **where)
        print(result.report)
        print(f"wrote {args.output}; rounded and unmerged {result.agreement}")
        return 0
    agreement = merge_to_directory(
        *places, replace="force" in args, target=values.get("target"), **_placement(values)
    )
    print(f"wrote {args.output}; merged and unmerged {agreement}")
    if "target" in args:
        command = shlex.join(["python", "convert_hf_to_gguf.py", args.output])
        for line in (*notes, f"llama.cpp makes a GGUF file of it: {command}"):
            _say(line)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from prodial_kernels.training.inspecting import inspect_adapter, inspect_model, is_adapter

    path = inspected(args.path)
    _quiet_transformers()
    report = (
        inspect_adapter(path)
        if is_adapter(path)
        else inspect_model(
            path, options.config_values(args),
            adapter=vars(args).get("adapter"), lists=vars(args).get("lists") or (),
        )
    )  # fmt: skip
    print(report.to_json() if "json" in args else report)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from prodial_kernels.training.converting import convert_adapter

    _quiet_transformers()
    adapter = adapter_directory(args.path, flag="")
    convert_adapter(adapter, args.to, args.output, model=vars(args).get("model"))
    print(f"wrote {args.output}")
    return 0


COMMANDS = {
    "finetune": _Command(
        "[options]",
        "fine-tune a model; evaluate, save and merge it",
        f"{options.methods_help()}\n\n{_FINETUNE_EXAMPLES}",
        options.add_finetune_options, _finetune,
    ),
    "search": _Command(
        "[options]",
        "search for the combination of methods, and their sizes, that trains best",
        f"{options.parts_help()}\n\n{_SEARCH_EXAMPLES}", options.add_search_options, _search,
    ),
    "evaluate": _Command(
        "[options]",
        "evaluate a model, with or without an adapter",
        _EVALUATE_EXAMPLES, options.add_evaluate_options, _evaluate,
    ),
    "generate": _Command(
        "[options]",
        "let a model go on with a text, or converse with it",
        _GENERATE_EXAMPLES, options.add_generate_options, _generate,
    ),
    "merge": _Command(
        "--adapter DIR --output DIR [options]",
        "fold an adapter into its model and write that",
        _MERGE_EXAMPLES, options.add_merge_options, _merge,
    ),
    "inspect": _Command(
        "PATH [options]",
        "show what an adapter holds, or would train in a model",
        _INSPECT_EXAMPLES, options.add_inspect_options, _inspect,
    ),
    "convert": _Command(
        "ADAPTER --to FORM --output DIR [options]",
        "write an adapter in PEFT's form, or one of PEFT's in this package's",
        _CONVERT_EXAMPLES, options.add_convert_options, _convert,
    ),
}  # fmt: skip
"""Every command by its name."""


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; whatever is wrong with it ends in one line that says what to do."""
    parser, commands = _parser()
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    if place is not None and arguments[place] in commands:
        name = arguments[place]
        words = joined_numbers(commands[name], arguments[place + 1 :])
        wrong = unknown_flag(commands, name, words) or repeated(commands[name], words)
        if wrong is not None:
            commands[name].error(wrong)
        arguments = [*arguments[: place + 1], *words]
    args, extras = parser.parse_known_args(arguments)
    if extras:
        commands[args.command_name].error(unexpected(extras, arguments))
    return args


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of the whole command line, and those of its commands."""
    from prodial_kernels._version import __version__

    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="prodial", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"prodial {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
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
        subparser.set_defaults(command=command, command_name=name)
        made[name] = subparser
    return parser, made


def _complain(message: str) -> None:
    # It may quote a file from anybody, with control characters in it.
    _say("prodial: error: " + printable(message, keep="\n"))


def _say(message: str) -> None:
    """Print on stderr, which may be closed already: the terminal may have gone."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr)


def _quiet_transformers() -> None:
    """Keep other libraries' notes and bars out of the way of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
