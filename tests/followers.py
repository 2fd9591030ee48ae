"""Trackers that end a fit, or keep what they are told."""


class Killed(BaseException):
    """What a kill looks like from inside: no handler of ordinary errors sees it."""


class KillAt:
    """A tracker that ends the fit at an iteration."""

    def __init__(self, iteration):
        self.left = iteration

    def iteration(self, metrics):
        self.left -= 1
        if not self.left:
            raise Killed

    def progress(self, what, done, total):
        pass


class Rows:
    """A tracker that keeps the metrics of all iterations."""

    def __init__(self):
        self.rows = []

    def iteration(self, metrics):
        self.rows.append(metrics)

    def progress(self, what, done, total):
        pass
