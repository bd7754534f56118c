"""A stop signal at a chosen time, for tests of interrupted runs."""

from steppe.experiments.training.stopping import Stop


class StopAfter(Stop):
    """False for the first ``n`` checks, and true after them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __bool__(self) -> bool:
        self.left -= 1
        self.signal = 2 if self.left < 0 else 0
        return self.left < 0
