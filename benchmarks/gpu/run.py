"""Everything that needs a GPU and has not been measured on this one yet, the most valuable first.

    python benchmarks/gpu/run.py --data DIR                 for 9 minutes; call it again until nothing is left
    python benchmarks/gpu/run.py --list                     what is done, what is not
    python benchmarks/gpu/run.py --rehearse                 all of it at a size that says nothing, on a CPU
    python benchmarks/gpu/run.py --from DIR --out DIR ...   on a machine that keeps nothing from call to call

It needs a checkout, torch, numpy, rich and pytest, and no network. A piece is done when its result is there,
results/DEVICE/NAME.json; one that fails is written down, does not stop the others, and is tried again when its code has
changed. README.md says more.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]

from gpu import carry, child  # noqa: E402
from gpu.place import Place, add_arguments, digest  # noqa: E402
from gpu.plan import BENCHMARKS, Piece, pieces  # noqa: E402
from gpu.train import GOES_ON, PLAIN  # noqa: E402
from steppe.experiments.errors import ExperimentError  # noqa: E402
from steppe.experiments.storage.files import write_json  # noqa: E402
from steppe.experiments.training.stopping import Stop, on_signals  # noqa: E402

RESERVE = 20.0  # seconds at the end, for figures and for what is carried on
WORTH_WHILE = 30.0  # seconds: the compiler alone may take as long
STUCK = 240.0  # seconds in which a piece must have saved something


class Call:
    """One call of the command: a part of the list, for a time."""

    def __init__(self, args: argparse.Namespace, stop: Stop) -> None:
        self.args, self.stop, self.place = args, stop, Place(args)
        self.ends = time.monotonic() + 60 * args.minutes - RESERVE
        self.cut = args.cut

    @property
    def left(self) -> float:
        """Seconds until it ends."""
        return self.ends - time.monotonic()

    def pieces(self) -> Iterator[Piece]:
        """What it is about."""
        return (piece for piece in pieces() if not self.args.only or piece.name in self.args.only)

    def stands(self, piece: Piece) -> str:
        """How it is with a piece: done, failed, begun or to do."""
        if self.place.result(piece.name) is not None:
            return "done"
        failure = self.place.failure(piece.name)
        if failure is not None and failure["code"] == digest(piece.code) and not self.args.again:
            return "failed"
        return "begun" if (self.place.state / piece.name).exists() else "to do"

    def run(self) -> None:
        """Go through the list until the time is up."""
        for piece in self.pieces():
            stands = self.stands(piece)
            if stands in ("done", "failed"):
                continue
            least = WORTH_WHILE + child.GRACE if piece.goes_on else 60 * piece.minutes
            if self.left < least:
                self._say(
                    piece, f"put off: it takes {least / 60:.1f} minutes, and {max(self.left, 0) / 60:.1f} are left"
                )
                continue
            if not self._piece(piece):
                return

    def show(self) -> None:
        """Print how it is with each piece."""
        for piece in self.pieces():
            failure = self.place.failure(piece.name) if self.stands(piece) == "failed" else None
            print(f"{self.stands(piece):7} {piece.name:12} {piece.title}{': ' + failure['reason'] if failure else ''}")

    def _piece(self, piece: Piece) -> bool:
        """Run a piece; return whether the call goes on."""
        if self.place.failure(piece.name) is not None:  # of other code, so what it left says nothing
            shutil.rmtree(self.place.state / piece.name, ignore_errors=True)
            self.place.works(piece.name)
        log = self.place.state / "logs" / f"{piece.name}.log"
        before, goes_on = self._fingerprint(piece), piece.goes_on
        seconds = min(60 * piece.minutes, self.left - child.GRACE) if goes_on else 60 * piece.minutes
        ended = child.run(self._words(piece), log, seconds, self.stop, grace=child.GRACE if goes_on else 5.0)
        took = f"{ended.seconds:.0f} s"
        if ended.status == 0 and self.place.result(piece.name) is not None:
            self._tidy(piece)
            self._say(piece, f"done in {took}{_verdict(log)}")
            return True
        if self.stop:
            self._say(piece, f"stopped after {took}")
            return False
        if ended.status == GOES_ON or (ended.asked and goes_on):
            if ended.seconds < STUCK or self._fingerprint(piece) != before:
                self._say(piece, f"not finished after {took}: it goes on at the next call")
                return False
            reason = f"it saved nothing in {took}"
        elif ended.asked:
            reason = f"it took longer than {piece.minutes:g} minutes"
        else:
            reason = f"exit status {ended.status}" if ended.status else "it ended without a result"
        if piece.goes_on and not (plain := self.place.state / piece.name / PLAIN).exists():
            plain.parent.mkdir(parents=True, exist_ok=True)
            plain.touch()
            self._say(piece, f"failed ({reason}); once more, without CUDA graphs")
            return self.left < WORTH_WHILE + child.GRACE or self._piece(piece)
        self.place.failed(piece.name, reason, log, digest(piece.code))
        self._say(piece, f"failed after {took}: {reason}; {log}")
        return True

    def _tidy(self, piece: Piece) -> None:
        """Let a result say what somebody would type, and not where things lie on this machine."""
        path = self.place.folder / f"{piece.name}.json"
        words = ["python", f"benchmarks/{piece.script}", *piece.options]
        given = [f"--{name} {name.upper()}" for name in self._takes(piece) if getattr(self.args, name) is not None]
        if not piece.script.startswith("gpu/"):  # ours say it themselves
            values = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**values, "command": " ".join([*words, *given])})

    def _takes(self, piece: Piece) -> tuple[str, ...]:
        """Which of our options are the piece's, too."""
        takes = {"loop": ("data", "classic"), "step": ("classic", "peers")}
        return takes.get(piece.name, ("data",) if piece.script.startswith("gpu/") else ())

    def _words(self, piece: Piece) -> list[str]:
        args, own = self.args, piece.script.startswith("gpu/")
        words = [sys.executable, str(BENCHMARKS / piece.script), *piece.options, "--device", args.device]
        words += ["--results", str(args.results), *(["--machine", args.machine] if args.machine else [])]
        words += ["--tiny"] if args.tiny else []
        words += ["--state", str(args.state)] if own else []
        for name in self._takes(piece):
            words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
        if self.cut and piece.training:
            words, self.cut = [*words, "--cut"], False
        return words

    def _fingerprint(self, piece: Piece) -> list[tuple[str, int]]:
        """What a piece has saved, and when; begun.json is written anyway."""
        files = (self.place.state / piece.name / "runs").rglob("*")
        return sorted((str(file), file.stat().st_mtime_ns) for file in files)

    def _say(self, piece: Piece, what: str) -> None:
        print(f"{piece.name}: {what}", flush=True)


def _verdict(log: Path) -> str:
    """The last line of a log, where it is one that sums up."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return f": {lines[-1].removeprefix('= ')}" if lines and lines[-1].startswith("= ") else ""


def _draw(place: Place) -> None:
    """Draw what there is, where matplotlib is there."""
    try:
        from gpu import figure

        for file in figure.draw_all(place):
            print(f"Figure: {file}")
    except Exception as error:  # what is measured is worth more, and is still to be carried on
        print(f"No figures: {type(error).__name__}: {error}")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=9, help="end before so many have passed")
    parser.add_argument("--only", action="append", choices=[p.name for p in pieces()], help="may be repeated")
    parser.add_argument("--again", action="store_true", help="try what has failed again, though its code is the same")
    parser.add_argument("--out", type=Path, help="write what must be carried on into this folder, at the end")
    parser.add_argument("--from", dest="origin", type=Path, help="go on from a folder that --out wrote")
    parser.add_argument("--classic", type=Path, help="for loop and step: the classic implementation's single file")
    parser.add_argument("--peers", type=Path, help="for step: a folder with pytorch_optimizer")
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing")
    parser.add_argument("--rehearse", action="store_true", help="all of it at a size that says nothing, on a CPU")
    parser.add_argument("--cut", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; answer with the exit status."""
    args = parse(words)
    if args.rehearse:
        from gpu.rehearsal import rehearse

        return rehearse(args.only)
    with on_signals() as stop:
        call = Call(args, stop)
        try:
            if args.origin is not None and not carry.bring_back(args.origin, args.state, args.results):
                print(f"{args.state} is as new as {args.origin}, and is gone on with")
        except ExperimentError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if args.list:
            call.show()
            return 0
        try:
            call.run()
        finally:
            carry.count(args.state)
            _draw(call.place)
            if args.out is not None:
                for left in carry.collect(args.state, call.place.folder, args.out, [p.name for p in pieces()]):
                    print(f"no room for {left}: where it is not kept, its run begins anew")
    return 128 + stop.signal if stop else 0


if __name__ == "__main__":
    sys.exit(main())
