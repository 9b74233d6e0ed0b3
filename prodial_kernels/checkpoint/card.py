"""The model card of an adapter: README.md, by which the hub and people know what it is."""

from __future__ import annotations

import re
from pathlib import Path

from prodial_kernels.config import ProdialConfig
from prodial_kernels.files.atomic import atomic_text

CARD_FILE = "README.md"
_MARK = "<!-- save_adapter wrote this card, and replaces it as long as this line is in it. -->"
_PRODIAL = "ProDiaL: W' = s ⊙ (W D_b) + α B A"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    directory: Path, config: ProdialConfig, base_model: str | None, *, in_peft: bool
) -> None:
    """Write the card, unless somebody else wrote one.

    Args:
        directory: That of the adapter.
        config: Of the adapter.
        base_model: The base model's name, or None. Only an id of the hub goes into what the hub
            reads.
        in_peft: Whether PEFT reads the adapter too.
    """
    path = directory / CARD_FILE
    try:
        own = _MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        own = True
    except (OSError, UnicodeDecodeError):
        own = False
    if own:
        atomic_text(path, card(config, base_model, in_peft=in_peft))


def card(config: ProdialConfig, base_model: str | None, *, in_peft: bool) -> str:
    """Return the card's text; arguments as in :func:`write_card`."""
    on_hub = base_model is not None and _HUB_ID.fullmatch(base_model) and base_model[0] not in "./"
    head = ["library_name: prodial-kernels", "tags:", "- prodial", "- adapter"]
    if on_hub:
        head = [f"base_model: {base_model}", *head, f"- base_model:adapter:{base_model}"]
    lora = not config.train_scale and not config.train_diagonal
    rows = {
        "method": ", ".join(
            ([] if not config.target_modules else ["LoRA" if lora else _PRODIAL])
            + [str(method) for method in config.methods]
        ),
        "base model": base_model or "unknown",
        "layers": ", ".join(
            [config.target_modules]
            if isinstance(config.target_modules, str)
            else config.target_modules
        ),
        "rank": config.r if config.target_modules else None,
        "lora_alpha": config.lora_alpha if config.target_modules else None,
        "n_blocks": config.n_blocks,
        "block_size": config.block_size,
        "trained beside": ", ".join((*config.modules_to_save, *config.train_ssm)),
    }
    table = [
        f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in ("", None)
    ]
    load = [
        "```py",
        "from transformers import AutoModelForCausalLM",
        "from prodial_kernels import load_adapter",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base_model or 'the base model'!r})",
        "load_adapter(model, DIRECTORY)  # refuses a base that differs in any value",
        "```",
    ]
    if in_peft:
        load += [
            "",
            "or with PEFT, after `import prodial_kernels.peft`: "
            "`PeftModel.from_pretrained(model, DIRECTORY)`.",
        ]
    return "\n".join(
        ["---", *head, "---", "", _MARK, "", f"# Adapter{_of(base_model)}", "",
         "Made with [prodial-kernels](https://arxiv.org/abs/2411.15224).", "",
         "| | |", "|---|---|", *table, "", *load, ""]
    )  # fmt: skip


def _of(base_model: str | None) -> str:
    return "" if base_model is None else f" of {base_model}"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
