"""A coverage-guided fuzzer (atheris) for the decoder of frames and the filter of pickles; its corpus is kept.

    pip install atheris
    python -m tests.attacks.fuzz results/corpus -max_total_time=1800

Any other error than the expected ones is a finding. Inputs that reached new code so far are in corpus.zip, which the
tests decode.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "neurosurgeon.net.frames",
        "neurosurgeon.net.messages",
        "neurosurgeon.net.header",
        "neurosurgeon.net.connection",
        "neurosurgeon.net.wire",
    ]
):
    from neurosurgeon.net.frames import FIXED_START, PREFIX
    from tests.attacks.decoding import corpus, decode_input, frames


def seed(directory: Path) -> None:
    """Begin a corpus with the inputs of earlier runs, the valid frames, and their headers."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(corpus()):
        (directory / f"kept{number}").write_bytes(data)
    for number, frame in enumerate(frames()):
        _, _, _, buffers, length, _ = PREFIX.unpack_from(frame)
        start = FIXED_START + 8 * buffers
        (directory / f"frame{number}").write_bytes(b"\xff" + frame)
        (directory / f"header{number}").write_bytes(b"\0" + frame[start : start + length])


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tests.attacks.fuzz CORPUS_DIRECTORY [-max_total_time=SECONDS]")
    warnings.simplefilter("ignore")
    seed(Path(sys.argv[1]))
    atheris.Setup(sys.argv, decode_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
