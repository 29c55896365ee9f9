"""A coverage-guided fuzzer (atheris) for the decoder of frames and the filter of pickles; its corpus is kept.

    pip install atheris
    python -m tests.attacks.fuzz results/corpus -max_total_time=1800

The first byte chooses the target: the header alone, or a whole frame. Anything but the expected errors is a finding.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["net.framing", "net.messages", "net.pickling", "net.transport", "net.wire"]):
    from net.framing import PREFIX
    from tests.attacks.decoding import decode, decode_header, frames


def one_input(data: bytes) -> None:
    """Decode what the fuzzer found."""
    if data[:1] < b"\x80":
        decode_header(data[1:])
    else:
        decode(data[1:])


def seed(directory: Path) -> None:
    """Begin a corpus with the valid frames, and their headers."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames()):
        _, _, _, buffers, length, _ = PREFIX.unpack_from(frame)
        start = PREFIX.size + 8 * buffers
        (directory / f"frame{number}").write_bytes(b"\xff" + frame)
        (directory / f"header{number}").write_bytes(b"\0" + frame[start : start + length])


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tests.attacks.fuzz CORPUS_DIRECTORY [-max_total_time=SECONDS]")
    warnings.simplefilter("ignore")
    seed(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
