"""Command line that made the embedded model: gather text, pretrain on a GPU, measure.

    python -m prodial_kernels.embedded.making.pretrain corpus --work build --out shards
    python -m prodial_kernels.embedded.making.pretrain train --shards shards --out model
    python -m prodial_kernels.embedded.making.pretrain evaluate --model model --shards shards

``corpus`` needs a Debian system (``apt-get``, ``dpkg-deb``) that reaches its package archive;
``train`` needs no network and writes a model directory that transformers loads.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from prodial_kernels.embedded.making.architecture import (
    build_model,
    has_fused_kernels,
    limit_autotuning,
    save_model,
    torch_path,
)
from prodial_kernels.embedded.making.evaluate import bits_per_byte
from prodial_kernels.embedded.making.optimise import TrainOptions, train
from prodial_kernels.embedded.making.tokens import (
    END_OF_TEXT,
    build_shards,
    load_shard,
    load_tokenizer,
    token_byte_lengths,
)

__all__ = ["main"]

_HELD_OUT = ("heldout_docs", "heldout_project")
_AGREEMENT = 0.1  # relative difference of bf16 kernel gradients from float32 PyTorch ones


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _corpus(args: argparse.Namespace) -> None:
    # These modules start programs and processes; training does not need them.
    from prodial_kernels.embedded.making.corpus import gather
    from prodial_kernels.embedded.making.sources import SOURCES

    corpus = gather(SOURCES, args.work, args.processes)
    tokens = build_shards(corpus, args.out, args.vocab_size)
    shutil.copy(args.work / "manifest.json", args.out / "manifest.json")
    _say(tokens=tokens)


def _gradients(model: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = F.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([g.float().flatten() for g in gradients])


def _switch_to_kernels(model: Any, tokens: torch.Tensor, chunk_size: int) -> None:
    """Run the model on mamba_ssm's kernels from here on, and compare them with PyTorch.

    Raises:
        RuntimeError: They disagree by more than bfloat16 rounding explains.
    """
    window = tokens[: 8 * 512 + 1].long()
    x, y = window[:-1].view(8, 512), window[1:].view(8, 512)
    with torch_path():
        expected_loss, expected = _gradients(model, x, y)
    for layer in model.backbone.layers:  # longer chunks suit the kernels; the result is the same
        layer.mixer.chunk_size = chunk_size
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradients = _gradients(model, x, y)
    error = ((gradients - expected).norm() / expected.norm()).item()
    _say(kernel_check={"loss": [expected_loss, loss], "relative_gradient_error": error})
    if not error < _AGREEMENT:
        raise RuntimeError(
            f"mamba_ssm kernels: expected gradients within {_AGREEMENT} of PyTorch's, got a "
            f"relative error of {error:.3g}; train with --mixer torch"
        )


def _train(args: argparse.Namespace) -> None:
    began = time.monotonic()
    device = torch.device(args.device)
    tokenizer = load_tokenizer(args.shards)
    tokens = load_shard(args.shards / "train.bin.xz").to(device)
    torch.manual_seed(args.seed)
    if args.mixer == "mamba_ssm":
        import_module("mamba_ssm")  # transformers would swallow the reason if this fails
    model = build_model(tokenizer.get_vocab_size(), args.hidden_size, args.layers)
    model.to(device).train()
    _say(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        parameters=sum(p.numel() for p in model.parameters()),
        train_tokens=tokens.numel(),
        mixer=args.mixer,
    )
    if args.mixer == "mamba_ssm":
        if not has_fused_kernels():
            raise RuntimeError(
                "--mixer mamba_ssm: expected transformers to find mamba_ssm and a GPU, it did not; "
                "install mamba-ssm and causal-conv1d, or pass --mixer torch"
            )
        _say(kernels_limited=limit_autotuning())
        _switch_to_kernels(model, tokens, args.chunk_size)
    _say(setup_seconds=round(time.monotonic() - began, 1))

    def save() -> None:
        save_model(model, args.out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.shards / name, args.out / name)

    options = TrainOptions(
        max_seconds=args.max_seconds,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        cuda_graph=args.cuda_graph,
        log_every=args.log_every,
    )
    progress = train(model, tokens, options, save)
    save()
    result: dict[str, Any] = {
        "steps": progress.steps,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "restarts": progress.restarts,
        "losses": progress.losses,
    }
    for split in _HELD_OUT:
        stream = load_shard(args.shards / f"{split}.bin.xz").to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            score = bits_per_byte(model, stream, token_byte_lengths(tokenizer))
        result[f"{split}_bits_per_byte"] = round(score, 4)
    (args.out / "training.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    _say(**{key: value for key, value in result.items() if key != "losses"})


def _evaluate(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    lengths = token_byte_lengths(tokenizer)
    streams = {}
    if args.shards is not None:
        streams = {s: load_shard(args.shards / f"{s}.bin.xz") for s in _HELD_OUT}
    if args.text:
        separator = tokenizer.get_vocab()[END_OF_TEXT]
        ids: list[int] = []
        for path in args.text:
            ids += [separator, *tokenizer.encode(path.read_text(encoding="utf-8")).ids]
        streams["text"] = torch.tensor(ids)
    for name, stream in streams.items():
        start = time.monotonic()
        score = bits_per_byte(model, stream, lengths, args.sequence_length)
        _say(
            stream=name,
            tokens=stream.numel(),
            bytes=int(lengths[stream.long()].sum()),
            bits_per_byte=round(score, 4),
            seconds=round(time.monotonic() - start, 1),
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prodial_kernels.embedded.making.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)

    corpus = commands.add_parser("corpus", help="download and clean the text; write token shards")
    corpus.add_argument("--work", type=Path, required=True, help="folder for archives and text")
    corpus.add_argument("--out", type=Path, required=True, help="folder for tokenizer and shards")
    corpus.add_argument("--vocab-size", type=int, default=4096)
    corpus.add_argument("--processes", type=int, default=2)
    corpus.set_defaults(run=_corpus)

    training = commands.add_parser("train", help="pretrain from token shards")
    training.add_argument("--shards", type=Path, required=True, help="folder corpus wrote")
    training.add_argument("--out", type=Path, required=True, help="model directory to write")
    training.add_argument("--device", default="cuda")
    training.add_argument("--mixer", choices=("mamba_ssm", "torch"), default="mamba_ssm")
    training.add_argument("--max-seconds", type=float, default=300.0)
    training.add_argument("--max-steps", type=int, default=10**9)
    training.add_argument("--batch-size", type=int, default=128, help="windows a step")
    training.add_argument("--sequence-length", type=int, default=512, help="tokens a window")
    training.add_argument("--learning-rate", type=float, default=5e-3)
    training.add_argument("--warmup-steps", type=int, default=200)
    training.add_argument("--hidden-size", type=int, default=192)
    training.add_argument("--layers", type=int, default=8)
    training.add_argument(
        "--chunk-size", type=int, default=128, help="of the kernels, in training alone"
    )
    training.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True)
    training.add_argument("--log-every", type=int, default=100)
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="bits per byte of a model directory")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--shards", type=Path, help="score the held-out shards in this folder")
    evaluate.add_argument("--text", type=Path, nargs="*", default=[], help="score these files")
    evaluate.add_argument("--sequence-length", type=int, default=512)
    evaluate.set_defaults(run=_evaluate)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; see the module's docstring.

    Args:
        argv: Arguments, without the program's name; the process's own by default.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: The arguments are wrong, or ``--help`` was asked for.
    """
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
