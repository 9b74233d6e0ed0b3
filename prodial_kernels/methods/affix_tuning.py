"""Affix-tuning: learned tokens inside every mixer, which the scan reads and nobody sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels._checks import check_choice, check_flag, check_integer
from prodial_kernels.methods.base import Method, option

POSITIONS = ("prefix", "suffix", "infix")


@dataclass(frozen=True)
class AffixTuning(Method):
    """k tokens per mixer, put in behind ``in_proj`` and dropped behind the scan.

    It does not begin at the pretrained function: its first tokens are drawn from N(0, 1), as the
    paper draws them. Its effect is no weight's: it cannot be merged into a plain model.

    Attributes:
        tokens: k, of each direction.
        position: ``"prefix"``: what a direction reads first. ``"infix"``: spread evenly over the
            sequence. ``"suffix"``: behind the sequence, where only a backward scan reads them in
            time; of mixers that scan both ways.
        mlp: Whether the tokens are ``W₂ tanh(W₁ e + b₁) + b₂`` of a learned e, with one W₁ for the
            model and one W₂ per mixer, rather than learned themselves. As in the paper that trains
            more parameters than a small model has.
        hidden: Width of that network; default: the features of ``in_proj``.
        shared: Whether both directions of a mixer read the same tokens.
    """

    name: ClassVar[str] = "affix-tuning"

    tokens: int = option(3, "number of tokens in each mixer")
    position: str = option("prefix", "where they stand", choices=POSITIONS)
    mlp: bool = option(False, "make them by a network that trains instead")
    hidden: int | None = option(None, "width of that network; default: in_proj's features")
    shared: bool = option(False, "one set of tokens for both directions")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("tokens", self.tokens, least=1)
        check_choice("position", self.position, POSITIONS)
        check_flag("mlp", self.mlp)
        check_flag("shared", self.shared)
        check_hidden(self.mlp, self.hidden)

    @property
    def inserted(self) -> int:
        """Its tokens, and what a sequence is filled up by to a multiple of 8."""
        return self.tokens + 7


def check_hidden(mlp: bool, hidden: int | None) -> None:
    """Raise for a width that is none, or that nothing would read."""
    if hidden is not None:
        check_integer("hidden", hidden, least=1)
        if not mlp:
            raise ValueError(f"hidden={hidden} is the width of the network of mlp=True; set both")
