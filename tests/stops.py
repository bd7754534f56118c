"""A stop that comes at a chosen time, for tests of what is interrupted."""

from steppe.experiments.training.stopping import Stop


class StopAfter(Stop):
    """Says no the first ``n`` times that it is asked, and yes from then on."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = 2 if self.left < 0 else 0
        return self.left < 0
