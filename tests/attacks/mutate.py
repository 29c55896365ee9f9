"""Mutated frames for the decoder: 100,000 by default, each refused with a typed error or decoded consistently.

python -m tests.attacks.mutate [--frames 100000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time

from neurosurgeon.net.frames import FIXED_START, PREFIX
from tests.attacks.decoding import decode, decode_header, frames

LENGTHS = (0, 1, 63, 64, 65, 255, 511, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return a frame with one to four mutations."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(7):
            case 0 if changed:
                changed[position] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[position] = rng.randrange(256)
            case 2:
                del changed[position:]
            case 3:
                del changed[position : position + rng.randint(1, 16)]
            case 4:
                changed[position:position] = rng.randbytes(rng.randint(1, 16))
            case 5:
                other = rng.choice(others)
                changed[position:] = other[rng.randrange(len(other)) :]
            case _:
                size = rng.choice(("!H", "!I", "!Q", "<I", "<Q"))
                changed[position : position + 8] = struct.pack(size, rng.choice(LENGTHS) % 256 ** struct.calcsize(size))
    return bytes(changed)


def in_header(data: bytes, rng: random.Random) -> bytes:
    """Return a frame that is mutated inside its header alone, where the pickle is."""
    _, _, _, buffers, length, _ = PREFIX.unpack_from(data)
    start = FIXED_START + 8 * buffers
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[start + rng.randrange(length)] = rng.randrange(256)
    return bytes(changed)


def run(count: int, seed: int) -> tuple[int, int]:
    """Feed mutated frames to the decoder; return how many were accepted, and refused.

    Raises: any error of the decoder that is not one of the expected ones.
    """
    rng, originals = random.Random(seed), frames()
    accepted = 0
    for number in range(count):
        original = rng.choice(originals)
        frame = in_header(original, rng) if number % 2 else mutate(original, rng, originals)
        try:
            accepted += decode(frame) is not None
            decode_header(frame[FIXED_START:].rstrip(b"\0"))
        except Exception:
            print(f"frame {number} of seed {seed}: {frame.hex()}", file=sys.stderr)
            raise
    return accepted, count - accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    args = parser.parse_args()
    start_s = time.monotonic()
    accepted, refused = run(args.frames, args.seed)
    print(
        f"{args.frames} mutated frames in {time.monotonic() - start_s:.0f} s: {refused} refused with a typed error, "
        f"{accepted} still valid and decoded consistently, 0 crashes, 0 unexpected exceptions"
    )


if __name__ == "__main__":
    main()
