"""Random numbers as a pure function of (seed, example, purpose, index): Philox4x32-10 in torch int64 arithmetic.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), checked against the known
answers of their Random123 library. There is no state to save, restore or share between processes: a prompt can be
made again from its number, in any batch and on any device. One call turns 4 counter words and 2 key words into 4
random words:

    key      k0, k1   low and high half of the seed
    counter  c0       which block of 4 values of the array
             c1       the purpose (what the array is for)
             c2, c3   low and high half of the example

so two different (seed, example, purpose, index) never share a value. Nothing reads a number back to the host and no
shape depends on data: the functions can be captured in a CUDA graph. `bits` and `uniform` are bit-identical on every
device; `normal` goes through log, sin and cos and agrees between devices to a few units in the last place.
"""

import math

import torch

from training.errors import BadInput

LOW = 0xFFFFFFFF  # the low 32 bits
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round


def philox4x32(counter, key, rounds=10):
    """Philox4x32: 4 random 32-bit words for each counter.

    counter: 4 int64 tensors of 32-bit words whose shapes broadcast (words 1 and 3 may be plain ints). key: 2 ints
    below 2^32. Returns 4 int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product of two 32-bit words wraps around in int64, which keeps all of its 64 bits. The high half is cut to
        # 32 bits after the xors; the low half stays uncut, since the next round's cut removes what is above it.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(LOW)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, c3 = p1, p0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1 & LOW, c2, c3 & LOW


def _words(seed, examples, purpose, n_blocks):
    """The 4 words of blocks 0 .. n_blocks - 1 of each example's array: 4 tensors (len(examples), n_blocks)."""
    if not 0 <= seed < 2**64:
        raise BadInput(f"a seed is an integer from 0 to 2^64 - 1, got {seed}")
    block = torch.arange(n_blocks, device=examples.device)
    example = examples[:, None]
    return philox4x32((block, purpose, example & LOW, example >> 32), (seed & LOW, seed >> 32))


def bits(seed, examples, purpose, count):
    """The first `count` random 32-bit words of each example's array, int64 (len(examples), count) in [0, 2^32).

    seed: int in [0, 2^64). examples: int64 tensor (n,). purpose: int in [0, 2^32). Value i depends on
    (seed, example, purpose, i) alone, so a smaller count gives a prefix. Raises BadInput for a seed out of range.
    """
    return torch.stack(_words(seed, examples, purpose, math.ceil(count / 4)), -1).flatten(1)[:, :count]


def uniform(seed, examples, purpose, shape):
    """Uniform float32 in [0, 1), multiples of 2^-24, (len(examples), *shape); arguments as for `bits`."""
    return ((bits(seed, examples, purpose, math.prod(shape)) >> 8).float() * 2**-24).unflatten(1, shape)


def normal(seed, examples, purpose, shape):
    """Standard normal float32 (len(examples), *shape), row-major: fewer rows are a prefix of more rows.

    Box-Muller: two words give two normals. The largest possible value is sqrt(64 ln 2) = 6.66. Arguments as for `bits`.
    """
    count = math.prod(shape)
    words = [w.float() for w in _words(seed, examples, purpose, math.ceil(count / 4))]
    radius = torch.stack(words[0::2], -1).add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()  # of u in (0, 1]
    angle = torch.stack(words[1::2], -1).mul_(2 * math.pi * 2**-32)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)  # (n, blocks, 2, 2)
    return values.flatten(1)[:, :count].unflatten(1, shape)
