"""Counter-based noise: a number is a pure function of (seed, element, draw, sample, epoch).

Formula. Philox 4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3")
with the 64-bit seed as key (low word, high word) and the counter words

    (element // 4, draw, sample, epoch),          lane = element % 4

turns a counter into four 32-bit words x. From each word, in fp32 and in this order,

    u = min((fl(x) + 0.5) * 2^-32, 1 - 2^-24)

where fl rounds to nearest even: fl(x) and the sum both round, so 128 of the 2^32 words would give
1.0; the minimum keeps u inside (0, 1), between 2^-33 and 1 - 2^-24. Box-Muller on (u0, u1) and
(u2, u3) gives four normals, in lanes cos, sin, cos, sin:

    n = sqrt(-2 ln u0) * cos(2 pi u1),   sqrt(-2 ln u0) * sin(2 pi u1),   ...   |n| <= 6.77

Words and uniforms are bit-identical in Triton, torch and numpy. Triton and torch differ only in
the last bits of log, sin and cos: the normals agree to 2e-6. A number does not depend on which
other samples are requested, nor on their order.

Bytes per number of s bytes: s, written. Eager torch on int64 words moves 529 in 126 passes (s = 4).
Arithmetic matters as well as memory traffic: 71 instructions per number on sm_90.

Shapes: B samples; G counter groups of four elements. ``element`` runs over a sample's own numbers
in C order. ``sample`` and ``element // 4`` are taken modulo 2^32.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch
import triton
import triton.language as tl

from .launch import launch, require, runs_kernel

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW_32 = 0xFFFFFFFF
UNIFORM_MAX = 1.0 - 2.0**-24
TWO_PI = 2.0 * math.pi
GROUPS_PER_PROGRAM = 256
"""1024 numbers: two counters per thread at four warps."""
ROUNDS_JIT = tl.constexpr(ROUNDS)
CHECK_OVERFLOW = tl.constexpr(False)
"""Philox overflows by design; Triton's debug mode would raise."""


class Draw(IntEnum):
    """Purpose of a draw: the second counter word. Stored artefacts depend on the values."""

    START = 0
    POSTERIOR = 1
    MIXUP_PARTNER = 2
    MIXUP_WEIGHT = 3
    SCORING_CROP = 4
    STUDENT_CROP = 5
    FLIP = 6
    CUTMIX = 7
    ORDER = 8
    PATCH_SHUFFLE = 9
    TEACHER_CROP = 10
    SELECTION = 11
    PRIOR = 12
    REFRESH = 13
    AUGMENTATION = 14
    LATIN = 15
    FEATURES = 16
    NOISED = 17
    CEILING = 18
    ANCESTRAL = 64
    """Sampler step k draws with ANCESTRAL + k; nothing is reserved above."""


Words = TypeVar("Words", torch.Tensor, np.ndarray)


def philox_reference(
    seed: int,
    groups: Words,
    draw: int | Words,
    samples: Words,
    epoch: int | Words,
    *,
    rounds: int = ROUNDS,
) -> tuple[Words, Words, Words, Words]:
    """The four output words of each counter, int64 in [0, 2^32), in plain torch or numpy.

    ``groups``, ``samples`` and, unless they are integers, ``draw`` and ``epoch`` are int64 and
    broadcast against each other; the words have the common shape after three rounds. The 64-bit
    products wrap in int64; shifted-in sign bits and seed bits above 64 are masked off.
    """
    key_0, key_1 = seed & LOW_32, (seed >> 32) & LOW_32
    c0, c1, c2, c3 = groups & LOW_32, draw, samples & LOW_32, epoch
    for _ in range(rounds):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = ((product_1 >> 32) ^ c1 ^ key_0) & LOW_32, product_1 & LOW_32
        c2, c3 = ((product_0 >> 32) ^ c3 ^ key_1) & LOW_32, product_0 & LOW_32
        key_0, key_1 = (key_0 + KEY_STEP_0) & LOW_32, (key_1 + KEY_STEP_1) & LOW_32
    return c0, c1, c2, c3  # pyright: ignore[reportReturnType]


def unit_reference(words: torch.Tensor) -> torch.Tensor:
    """int64 words in [0, 2^32) → u, fp32 in (0, 1)."""
    return words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=UNIFORM_MAX)


def _unit_lanes_reference(
    seed: int,
    draw: int | torch.Tensor,
    samples_B: torch.Tensor,
    epoch: int | torch.Tensor,
    count: int,
) -> torch.Tensor:
    groups = torch.arange(triton.cdiv(count, 4), device=samples_B.device)
    words = philox_reference(seed, groups, draw, samples_B[:, None], epoch)
    return unit_reference(torch.stack(torch.broadcast_tensors(*words), dim=-1))


def uniform_reference(
    seed: int, draw: int, samples_B: torch.Tensor, epoch: int, count: int
) -> torch.Tensor:
    """``count`` uniforms per sample, fp32 [B, count] in (0, 1), in plain torch."""
    lanes_BG4 = _unit_lanes_reference(seed, draw, samples_B, epoch, count)
    return lanes_BG4.flatten(1)[:, :count].contiguous()


def normal_reference(
    seed: int,
    draw: int | torch.Tensor,
    samples_B: torch.Tensor,
    epoch: int | torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normals [B, *shape] in plain torch; computed in fp32, then cast."""
    count = math.prod(shape)
    lanes_BG4 = _unit_lanes_reference(seed, draw, samples_B, epoch, count)
    radius = lanes_BG4[..., 0::2].log().mul_(-2.0).sqrt_()
    angle = lanes_BG4[..., 1::2] * TWO_PI
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return normals.flatten(1)[:, :count].reshape(len(samples_B), *shape).to(dtype).contiguous()


def unit_numpy(words: np.ndarray) -> np.ndarray:
    """``unit_reference`` in numpy."""
    shifted = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return np.minimum(shifted, np.float32(UNIFORM_MAX))


def uniform_numpy(seed: int, draw: int, samples: np.ndarray, epoch: int, count: int) -> np.ndarray:
    """``uniform`` in numpy: the same bits, for callbacks that must not touch torch."""
    require_words(seed, draw, epoch)
    groups = np.arange(-(-count // 4))
    words = philox_reference(seed, groups, draw, np.asarray(samples, np.int64)[:, None], epoch)
    lanes_BG4 = unit_numpy(np.stack(words, axis=-1))
    return np.ascontiguousarray(lanes_BG4.reshape(len(samples), -1)[:, :count])


@triton.jit
def philox_block(group, draw, sample, epoch, seed_lo, seed_hi, ROUNDS: tl.constexpr = ROUNDS_JIT):
    """Four uint32 words per counter; the arguments are integers of 32 bits or more, any sign."""
    c0 = tl.to_tensor(group).to(tl.uint32)
    c1 = tl.to_tensor(draw).to(tl.uint32)
    c2 = tl.to_tensor(sample).to(tl.uint32)
    c3 = tl.to_tensor(epoch).to(tl.uint32)
    key_0 = tl.to_tensor(seed_lo).to(tl.uint32)
    key_1 = tl.to_tensor(seed_hi).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):  # pyright: ignore[reportGeneralTypeIssues]
        high_0 = tl.umulhi(c0, 0xD2511F53)
        high_1 = tl.umulhi(c2, 0xCD9E8D57)
        low_0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=CHECK_OVERFLOW)
        low_1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=CHECK_OVERFLOW)
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=CHECK_OVERFLOW)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=CHECK_OVERFLOW)
    return c0, c1, c2, c3


@triton.jit
def unit_of(word):
    """One word → u, fp32 in (0, 1)."""
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


@triton.jit
def normal_of(word_0, word_1):
    """Box-Muller of two words: the cos lane and the sin lane."""
    radius = tl.sqrt_rn(-2.0 * tl.log(unit_of(word_0)))
    angle = 6.283185307179586 * unit_of(word_1)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normal_block(group, draw, sample, epoch, seed_lo, seed_hi, ROUNDS: tl.constexpr = ROUNDS_JIT):
    """[4 G] fp32 normals in element order, from [G] consecutive counters of one sample."""
    word_0, word_1, word_2, word_3 = philox_block(
        group, draw, sample, epoch, seed_lo, seed_hi, ROUNDS
    )
    n0, n1 = normal_of(word_0, word_1)
    n2, n3 = normal_of(word_2, word_3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["draw", "epoch", "seed_lo", "seed_hi"])
def noise_kernel(
    out_ptr,
    samples_ptr,
    count,
    draw,
    epoch,
    seed_lo,
    seed_hi,
    NORMAL: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUNDS: tl.constexpr = ROUNDS_JIT,
):
    """Program (row, block) writes 4 GROUPS numbers of one sample."""
    row = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    sample = tl.load(samples_ptr + row)
    group = first_group + tl.arange(0, GROUPS)
    if NORMAL:
        values = normal_block(group, draw, sample, epoch, seed_lo, seed_hi, ROUNDS)
    else:
        w0, w1, w2, w3 = philox_block(group, draw, sample, epoch, seed_lo, seed_hi, ROUNDS)
        u0, u1, u2, u3 = unit_of(w0), unit_of(w1), unit_of(w2), unit_of(w3)
        values = tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))
    element = first_group * 4 + tl.arange(0, 4 * GROUPS)
    out = out_ptr + row.to(tl.int64) * count + element
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=element < count)


def signed(word: int, bits: int) -> int:
    """Reinterpret an unsigned integer as signed, so that an argument's type never varies.

    Kernels take int32 words; an operator's schema allows only int64.
    """
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def kernel_words(seed: int, draw: int, epoch: int) -> tuple[int, int, int, int]:
    """(draw, epoch, seed_lo, seed_hi) as the int32 arguments of a kernel that draws noise."""
    words = (draw, epoch, seed & LOW_32, (seed >> 32) & LOW_32)
    return tuple(signed(word, 32) for word in words)  # pyright: ignore[reportReturnType]


def require_words(seed: int, draw: int, epoch: int) -> None:
    """Raise ValueError unless seed (64 bits), draw and epoch (32 bits) fit their unsigned types."""
    for name, value, bits in (("seed", seed, 64), ("draw", draw, 32), ("epoch", epoch, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")


@torch.library.custom_op("patchbloom::noise_into", mutates_args={"out"})
def noise_into(
    out: torch.Tensor, samples_B: torch.Tensor, seed: int, draw: int, epoch: int, gaussian: bool
) -> None:
    """Fill ``out`` [B, ...]: ``normal`` and ``uniform`` after their checks."""
    count = math.prod(out.shape[1:])
    if not runs_kernel(out):
        if gaussian:
            values = normal_reference(seed, draw, samples_B, epoch, out.shape[1:])
        else:
            values = uniform_reference(seed, draw, samples_B, epoch, count)
        out.copy_(values)
        return
    grid = (len(samples_B), triton.cdiv(count, 4 * GROUPS_PER_PROGRAM))
    constants = {"NORMAL": gaussian, "GROUPS": GROUPS_PER_PROGRAM}
    launch(noise_kernel, grid, out, samples_B, count, *kernel_words(seed, draw, epoch), **constants)


def uniform(
    seed: int,
    draw: int,
    samples_B: torch.Tensor,
    epoch: int,
    count: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``count`` uniforms per sample: fp32 [B, count] in (0, 1), on ``samples_B``'s device.

    Element e of a sample is u of its Philox word e, before Box-Muller. ``samples_B`` is int64.
    Raises TypeError or ValueError when a tensor does not fit or a word is out of range.
    """
    require("samples_B", samples_B, dtype=torch.int64, shape=("B",))
    require_words(seed, draw, epoch)
    if out is None:
        out = torch.empty(len(samples_B), count, device=samples_B.device, dtype=torch.float32)
    require("out", out, dtype=torch.float32, shape=(len(samples_B), count), like=samples_B)
    noise_into(out, samples_B, signed(seed, 64), int(draw), epoch, False)
    return out


def normal(
    seed: int,
    draw: int,
    samples_B: torch.Tensor,
    epoch: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard normals [B, *shape] on ``samples_B``'s device.

    ``samples_B`` is int64; ``dtype`` (or ``out``'s) is float32, float16 or bfloat16. Raises
    TypeError or ValueError when a tensor does not fit or a word is out of range.
    """
    require("samples_B", samples_B, dtype=torch.int64, shape=("B",))
    require_words(seed, draw, epoch)
    sizes = (len(samples_B), *shape)
    if out is None:
        out = torch.empty(sizes, dtype=dtype, device=samples_B.device)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    require("out", out, dtype=dtypes, shape=sizes, like=samples_B)
    noise_into(out, samples_B, signed(seed, 64), int(draw), epoch, True)
    return out
