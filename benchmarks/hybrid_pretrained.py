"""A pretrained pair as a hybrid.

python -m benchmarks.hybrid_pretrained --pretrain --out PAIR   # the pair, about 25 minutes of one core; restartable
"""

import argparse
from pathlib import Path

from benchmarks.hybrid_pretrained_pair import pretrain
from benchmarks.hybrid_pretrained_texts import missing


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache/mixwright/pretrained_pair")
    parser.add_argument("--pretrain", action="store_true")
    given = parser.parse_args()
    if absent := missing(given.data):
        raise SystemExit(f"skipped: {given.data} lacks {', '.join(absent)}; name the folder with --data.")
    if given.pretrain:
        pretrain(given.out, given.data)


if __name__ == "__main__":
    main()
