"""A stand-in for CUDA graphs: what they freeze is frozen in a closure that is run again."""

from __future__ import annotations

from ume_models.rollout.graphs import CaptureError, Recording


class Rerun:
    """Records by keeping the closure; ``sizes`` are the bytes the next recordings claim."""

    def __init__(self, sizes=(), error=None):
        self.recorded = self.replays = self.drained = self.pools = 0
        self.sizes, self.error = list(sizes), error

    def record(self, work):
        work()
        if self.error is not None:
            raise CaptureError("no graphs today") from self.error
        self.recorded += 1

        def replay():
            self.replays += 1
            work()

        return Recording(replay, self.sizes.pop(0) if self.sizes else 0)

    def drain(self):
        self.drained += 1

    def fresh_pool(self):
        self.pools += 1
