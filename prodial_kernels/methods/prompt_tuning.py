"""Prompt-tuning: learned tokens before the sequence, at the model's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels._checks import check_choice, check_flag, check_integer
from prodial_kernels.methods.affix_tuning import check_hidden
from prodial_kernels.methods.base import Method, option

POSITIONS = ("auto", "prefix", "both")


@dataclass(frozen=True)
class PromptTuning(Method):
    """k tokens beside the embedded sequence, dropped again behind the last norm.

    Callers see their own length, labels and class tokens where they were. It does not begin at the
    pretrained function: its first tokens are drawn from N(0, 1), as the paper draws them. Its
    effect is no weight's: it cannot be merged into a plain model.

    Attributes:
        tokens: k, in all.
        position: ``"prefix"``: before the sequence; ``"both"``: the first half (rounded up) before,
            the others behind it, where only models that read both ways see them; ``"auto"``:
            ``"both"`` in those, ``"prefix"`` in others.
        mlp: Whether the tokens are ``W₂ tanh(W₁ e + b₁) + b₂`` of a learned e, rather than learned
            themselves.
        hidden: Width of that network; default: the model's.
    """

    name: ClassVar[str] = "prompt-tuning"

    tokens: int = option(8, "number of tokens in all")
    position: str = option("auto", "where they stand", choices=POSITIONS)
    mlp: bool = option(False, "make them by a network that trains instead")
    hidden: int | None = option(None, "width of that network; default: the model's")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("tokens", self.tokens, least=1)
        check_choice("position", self.position, POSITIONS)
        check_flag("mlp", self.mlp)
        check_hidden(self.mlp, self.hidden)

    @property
    def inserted(self) -> int:
        """Its tokens."""
        return self.tokens
