"""`python -m tests.attacks`: the whole attack, and a table of what was tried, right and wrong.

python -m tests.attacks --lines 2000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks.attack import WHOLE, Sizes, attack
from tests.attacks.judged import Tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in vars(WHOLE).items():
        parser.add_argument(f"--{name}", type=int, default=count)
    sizes = Sizes(**vars(parser.parse_args()))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pliant-attack-") as folder:
        tallies = attack(Path(folder), sizes)
    show(tallies, time.monotonic() - started)
    sys.exit(any(tally.wrong for tally in tallies))


def show(tallies: list[Tally], seconds: float) -> None:
    for tally in tallies:
        for each in tally.interrupted:
            print(f"{tally.kind}, ended by Ctrl-C: {each}")
        for each in tally.wrong:
            print(f"{tally.kind}: {each}")
    print(f"\n{'kind':16}{'tried':>8}{'right':>8}{'wrong':>8}{'Ctrl-C':>8}   ends")
    for tally in tallies:
        codes = ", ".join(f"{code}: {times}" for code, times in sorted(tally.codes.items()))
        counts = (tally.tried, tally.right, len(tally.wrong), len(tally.interrupted))
        print(f"{tally.kind:16}{''.join(f'{count:8}' for count in counts)}   {codes}")
    print(f"{seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
