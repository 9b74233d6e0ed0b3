"""Which tile sizes a product of a given shape is launched with. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

# The widest rank that rides along. Above it a companion does not fit beside the main accumulator,
# and a loop over slices of L in the epilogue computed wrong results (triton 3.6.0, H100).
MAX_FUSED_RANK = 64


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of ``_gemm_kernel``. ``programs`` = 0 launches one program per tile."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    programs: int = 0
    flatten: bool = False
    subtile: bool = False
    tma: bool = True


@dataclass(frozen=True)
class OutputSideConfig:
    """Tile sizes of ``_output_side_kernel``.

    ``items`` sets the number of splits; ``programs`` share them.
    """

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    items: int = 264
    programs: int = 264
    tma: bool = False


@dataclass(frozen=True)
class ExactScaleConfig:
    """Tile sizes of ``_exact_scale_kernel``; ``window`` is at least the block size.

    ``shares`` programs divide the inputs: few, since nearly always they have nothing to do.
    """

    block_m: int = 32
    block_n: int = 32
    window: int = 128
    num_warps: int = 8
    num_stages: int = 2
    shares: int = 8


@dataclass(frozen=True)
class InputSideConfig:
    """Tile sizes of ``_input_side_kernel``; ``programs`` sets the number of splits."""

    block_m: int = 32
    window: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 660


def choose_gemm(
    m: int, n: int, *, companion: bool, capability: tuple[int, int], processors: int
) -> GemmConfig:
    """Return the tile sizes for an [m, n] product of 16-bit operands.

    Measured on an H100 (benchmarks/results); other devices get sizes that fit them all.

    Args:
        m: Rows of the result.
        n: Columns of the result.
        companion: Whether the LoRA companion rides along, which rules flattening out.
        capability: The device's compute capability.
        processors: Its number of multiprocessors.
    """
    if capability[0] != 9:
        # Within the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
        return pointer_gemm(64)
    flatten = not companion
    if ceil_div(m, 128) * ceil_div(n, 256) >= 2 * processors:
        return GemmConfig(
            128, 256, 64, num_warps=8, num_stages=3, group_m=4 if companion and n <= 768 else 8,
            programs=processors, flatten=flatten, subtile=True,
        )  # fmt: skip
    if companion:
        return GemmConfig(64, 256, 64, num_warps=4, num_stages=4, programs=processors, subtile=True)
    if ceil_div(m, 128) * ceil_div(n, 128) < processors:
        return GemmConfig(
            128, 128, 64, num_warps=4, num_stages=3, programs=2 * processors, flatten=True,
            subtile=True,
        )  # fmt: skip
    return GemmConfig(
        128, 128, 64, num_warps=8, num_stages=4, programs=processors, flatten=True, subtile=True
    )


def turns_tokens(m: int, n: int, *, blocks: bool, scale: bool, channel_first: bool) -> bool:
    """Whether forward makes U = X D_bᵀ and scales the product, instead of V = s ⊙ (W D_b).

    Either is read and written once beside the product, so the smaller of X [m, k] and W [n, k] is
    turned; without blocks nothing has to be.

    Args:
        m: Tokens.
        n: Columns of the result.
        blocks: Whether there are blocks.
        scale: Whether there is a scale.
        channel_first: Whether X is; its rows are not those that are turned.
    """
    if channel_first:
        return scale and not blocks
    return m < n if blocks else scale


def pointer_gemm(block_n: int, programs: int = 0) -> GemmConfig:
    """Return the tile sizes of a product whose operands the copy engine does not load."""
    return GemmConfig(128, block_n, 32, num_warps=8, num_stages=3, programs=programs, tma=False)


@dataclass(frozen=True)
class BackwardPlan:
    """How backward divides the device.

    Attributes:
        gemm: Tile sizes of the product towards the input.
        output_side: Tile sizes of the sums over the tokens of dY.
        companion: T = α dY B rides along with the product; otherwise it is a product of its own.
        side_processors: Multiprocessors that the output side (and T, where it is a product of its
            own) gets beside the product; 0 where they run one after the other on all of them.
    """

    gemm: GemmConfig
    output_side: OutputSideConfig
    companion: bool
    side_processors: int

    def on(self, processors: int) -> BackwardPlan:
        """Return the plan with as many programs as its share of ``processors`` takes."""
        if not self.side_processors:
            return self
        return replace(
            self,
            gemm=replace(self.gemm, programs=processors - self.side_processors),
            output_side=replace(self.output_side, programs=self.side_processors),
        )


@lru_cache(maxsize=1024)
def choose_backward(
    m: int,
    n: int,
    k: int,
    r_pad: int,
    *,
    wants_t: bool,
    output_side: bool,
    through_weight: bool,
    bias: bool,
    channel_first: bool,
    capability: tuple[int, int],
    processors: int,
) -> BackwardPlan:
    """Return the plan of backward for dY [m, n] and X [m, k].

    The product is bound by arithmetic, the output side and T by memory, so side by side they can
    cost less than in turn; but a product that runs in rounds of whole tiles loses a round or none.
    Compares the plans by rates measured on an H100.

    Args:
        m: Tokens.
        n: Columns of dY.
        k: Columns of dX.
        r_pad: Padded rank.
        wants_t: Whether T is needed.
        output_side: Whether a sum over the tokens of dY is needed.
        through_weight: Whether the product is needed.
        bias: Whether the layer has one.
        channel_first: Whether dX is, which the product then computes as [k, m]; no companion
            rides along with its rows of features.
        capability: The device's compute capability.
        processors: Its number of multiprocessors.
    """
    plans = []
    rides = wants_t and through_weight and not channel_first and r_pad <= MAX_FUSED_RANK
    shape = (k, m) if channel_first else (m, k)
    for companion in (True, False) if rides else (False,):
        gemm = choose_gemm(
            *shape, companion=companion, capability=capability, processors=processors
        )
        tiles = ceil_div(shape[0], gemm.block_m) * ceil_div(shape[1], gemm.block_n)
        # Per µs: operations of one multiprocessor, bytes of one, bytes of the memory.
        tile = 2 * gemm.block_m * gemm.block_n * n / (4.7e6 if companion else 5.4e6)
        side = 4 * m * n * output_side + 2 * m * n * (wants_t and not companion)
        rounds = ceil_div(tiles, processors)
        # T as a product of its own is one more launch.
        launch = 0 if companion else 4
        plans.append((rounds * tile + side / 2.6e6 + launch, companion, gemm, 0))
        if through_weight and gemm.programs and side:
            for more in range(rounds, rounds + 3):
                shared = processors - ceil_div(tiles, more)
                if shared > 0:
                    time = max(more * tile, side / (shared * 40e3))
                    plans.append((time + launch, companion, gemm, shared))
    _, companion, gemm, shared = min(plans, key=lambda plan: plan[0])
    return BackwardPlan(
        gemm,
        choose_output_side(
            n, r_pad, bias=bias, capability=capability, programs=shared or processors
        ),
        companion,
        shared,
    ).on(processors)


def choose_output_side(
    n: int, r_pad: int, *, bias: bool, capability: tuple[int, int], programs: int
) -> OutputSideConfig:
    """Return the tile sizes for the sums over the tokens of [m, n] gradients.

    Args:
        n: Columns.
        r_pad: Padded rank of the LoRA term.
        bias: Whether there is one, for which a wide tile leaves no registers.
        capability: The device's compute capability.
        programs: Multiprocessors it may fill, one program each.
    """
    if capability[0] != 9:
        if r_pad <= 64:
            return OutputSideConfig(32, 64)
        return OutputSideConfig(16, 64 if r_pad <= 128 else 32, num_stages=2)
    block_m = 64 if r_pad <= 128 else 16
    block_n = 64 if r_pad <= 128 else 32
    if r_pad <= 64 and not bias:
        # At rank 64 this spills a few registers, and is still a fifth faster than half the rows.
        block_n = 128
    columns = ceil_div(n, block_n)

    def busy(splits: int) -> float:
        # The share of the programs' time that the last round leaves used; few splits are cheaper.
        items = columns * splits
        return items / (ceil_div(items, programs) * programs) - 0.005 * splits

    items = columns * max(range(1, 17), key=busy)
    return OutputSideConfig(
        block_m, block_n, num_warps=8, num_stages=3, items=items, programs=programs, tma=True
    )


def choose_exact_scale(capability: tuple[int, int], *, even: bool) -> ExactScaleConfig:
    """Return the tile sizes for the scale's gradient computed anew.

    Args:
        capability: The device's compute capability.
        even: Whether all rows are tokens and begin at multiples of 16 elements; other addresses
            take the registers that a wide tile would.
    """
    if capability[0] != 9:
        return ExactScaleConfig()
    return ExactScaleConfig(64, 128 if even else 64, 128, num_warps=8, num_stages=3)


def choose_input_side(
    r_pad: int,
    block_size: int,
    *,
    dropout: bool,
    channel_first: bool,
    capability: tuple[int, int],
) -> InputSideConfig:
    """Return the tile sizes for the walk over the inputs.

    Args:
        r_pad: Padded rank.
        block_size: P.
        dropout: Whether a mask is drawn on the way.
        channel_first: Whether the inputs are.
        capability: The device's compute capability.
    """
    large = block_size > 64 or r_pad > 64 or (dropout and (r_pad > 32 or channel_first))
    if large or (capability[0] != 9 and (block_size > 1 or r_pad > 32)):
        # What a program sums is large; fewer rows and more warps keep it in registers.
        stages = 3 if r_pad <= 64 else 2 if r_pad <= 128 else 1
        return InputSideConfig(16, num_warps=8, num_stages=stages)
    return InputSideConfig()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The rank as the kernels take it: a power of two, at least 16."""
    return max(16, 1 << (r - 1).bit_length())


def split_tokens(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Split the sum over m tokens so that ``columns`` times the splits is about ``programs``.

    Fixed by the shape alone, not by the device, so that results repeat across devices.

    Returns:
        (number of splits, tokens in each: a multiple of ``block_m``).
    """
    wanted = max(1, min(ceil_div(programs, columns), ceil_div(m, block_m)))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return ceil_div(m, rows), rows
