"""Measure everything that needs a GPU and has not been measured on this one yet, the most valuable first.

    python benchmarks/gpu/run.py --data DIR       for 9 minutes; repeat it until nothing is left
    python benchmarks/gpu/run.py --list           print which measurements are done
    python benchmarks/gpu/run.py --rehearse       all of it in a meaningless, tiny size, on a CPU

Needs a checkout, torch, numpy, rich and pytest, and no network. A measurement is done when its result is in
results/DEVICE/NAME.json. A failed measurement is recorded, does not stop the others, and is repeated when its code has
changed. See README.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]

from gpu.device_results import DeviceResults, add_arguments  # noqa: E402
from gpu.measurements import measurements  # noqa: E402
from gpu.rehearsal import rehearse  # noqa: E402
from gpu.session import Session  # noqa: E402
from steppe.experiments.training.stopping import on_signals  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Measure, list or rehearse; return the exit status."""
    args = parse(words)
    if args.rehearse:
        return rehearse(args.only)
    with on_signals() as stop:
        session = Session(args, stop)
        if args.list:
            session.show()
            return 0
        try:
            session.run()
        finally:
            _draw(session.results)
    return 128 + stop.signal if stop else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=9, help="the time limit of this call")
    parser.add_argument("--only", action="append", choices=[m.name for m in measurements()], help="may be repeated")
    parser.add_argument(
        "--again", action="store_true", help="repeat failed measurements although their code has not changed"
    )
    parser.add_argument("--classic", type=Path, help="for loop and step: the classic implementation's single file")
    parser.add_argument("--peers", type=Path, help="for step: a folder with the other implementations")
    parser.add_argument("--list", action="store_true", help="print which measurements are done, and measure nothing")
    parser.add_argument("--rehearse", action="store_true", help="all of it in a meaningless, tiny size, on a CPU")
    parser.set_defaults(interrupt=False)
    return parser.parse_args(words)


def _draw(results: DeviceResults) -> None:
    """Draw the figures of the results; without matplotlib, print that there are none."""
    try:
        from gpu import figure

        for file in figure.draw_all(results):
            print(f"Figure: {file}")
    except Exception as error:  # an error in a figure must not hide the results
        print(f"No figures: {type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
