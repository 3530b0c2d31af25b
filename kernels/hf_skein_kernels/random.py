"""Counter-based random numbers, bit for bit those of `hf_skein/sketch/random.py`."""

from __future__ import annotations

import triton
import triton.language as tl


PILOT_STREAM = tl.constexpr(0)
COLUMN_STREAM = tl.constexpr(1)

_MASK = 0xFFFFFFFF


def random_key(seed: int, layer: int) -> int:
    """What seed and layer make of the state; as a signed 32-bit integer, which every launch takes alike."""
    state = 0
    for word in (seed, layer):
        state = (state + word + 0x9E3779B9) & _MASK
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
        state ^= state >> 16
    return state - 2**32 if state >= 2**31 else state


@triton.jit
def mix(state, word):
    """The state after one more word; both uint32. The finalizer of MurmurHash3."""
    state = state + word + 0x9E3779B9
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def uniform(key, i_head, STREAM: tl.constexpr, o_position):
    """Numbers strictly between 0 and 1, float64, for `key = random_key(seed, layer)`."""
    state = mix(key.to(tl.uint32, bitcast=True), i_head.to(tl.uint32))
    state = mix(state, tl.full([], STREAM, tl.uint32))
    return (mix(state, o_position.to(tl.uint32)).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def gumbel(b_uniform):
    """Standard Gumbel noise, in float32, by the inverse of its distribution function."""
    return (-tl.log(-tl.log(b_uniform))).to(tl.float32)
