"""The flags of every command are frozen: a script that works today works tomorrow."""

from __future__ import annotations

import argparse

import pytest

from prodial_kernels.cli import options
from prodial_kernels.config import ProdialConfig
from prodial_kernels.training.config import ADAPTER_OPTIONS, OPTIONS, FinetuneConfig

ADAPTER = (
    "--preset --r --rank --lora-alpha --lora-dropout --n-blocks --block-size --diagonal --compute "
    "--target-modules --allow-partial --modules-to-save --train-ssm --no-scale --no-diagonal"
)
FROZEN = {
    "finetune": "--model --data --held-out --held-out-fraction --max-bytes --eval-tokens --output "
    f"--resume --method {ADAPTER} --lr --learning-rate --steps --epochs --batch-size --seq-len "
    "--packing --grad-accumulation --weight-decay --schedule --warmup --clip --seed "
    "--memory-budget --activations --gradient-checkpointing --optimizer --loss --cuda-graph "
    "--impl --quantize --quantize-modules --experts --shard --device --dtype --eval-every "
    "--save-every --log-every --config --init-adapter --keep --report-to",
    "search": "--trials --among --max-trainable --refine --evaluations --workers --resume --config "
    "--model --data --held-out --held-out-fraction --max-bytes --eval-tokens --output "
    "--target-modules --allow-partial --compute --lr --learning-rate --steps --batch-size "
    "--seq-len --packing --grad-accumulation --weight-decay --schedule --warmup --clip --seed "
    "--memory-budget --activations --gradient-checkpointing --optimizer --loss --cuda-graph "
    "--impl --quantize --quantize-modules --experts --device --dtype",
    "evaluate": "--model --adapter --data --split --max-tokens --seq-len --batch-size --lm-eval "
    "--num-fewshot --include-path --limit --json --impl --quantize --quantize-modules --device "
    "--dtype",
    "generate": "--model --adapter --prompt --chat --system --max-new-tokens --temperature --top-p "
    "--seed --json --impl --quantize --quantize-modules --device --dtype",
    "merge": "--model --adapter --output --stored --for --force --quantize --quantize-modules "
    "--device --dtype",
    "inspect": f"--json --adapter --list --method {ADAPTER}",
    "convert": "--to --output --model",
}


@pytest.mark.parametrize("command", FROZEN)
def test_command_line_options_are_frozen(command: str) -> None:
    """Add to the list what is new; what is in it stays, with its meaning."""
    parser = argparse.ArgumentParser(add_help=False)
    getattr(options, f"add_{command}_options")(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert sorted(flags) == sorted(FROZEN[command].split())


def test_every_default_is_one_that_its_option_may_have() -> None:
    for option in OPTIONS.values():
        if option.default is None or option.type.startswith("bool"):
            continue
        FinetuneConfig(**{option.name: option.default})
        assert "{" not in option.help_text
        assert f"{option.name} ({option.flags[0]}): {option.help_text}" in str(
            FinetuneConfig.__doc__
        )


def test_an_adapters_options_are_those_of_its_configuration() -> None:
    assert {*ADAPTER_OPTIONS, "impl", "methods"} == set(ProdialConfig.__dataclass_fields__)
