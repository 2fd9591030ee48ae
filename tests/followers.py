"""Trackers that end a fit, or keep what they are told."""


class Killed(BaseException):
    """What a kill looks like from inside: no handler of ordinary errors sees it."""


class KillAt:
    """A tracker that ends the fit at a lap."""

    def __init__(self, lap):
        self.left = lap

    def lap(self, metrics):
        self.left -= 1
        if not self.left:
            raise Killed

    def progress(self, what, done, total):
        pass


class Rows:
    """A tracker that keeps the metrics of all laps."""

    def __init__(self):
        self.rows = []

    def lap(self, metrics):
        self.rows.append(metrics)

    def progress(self, what, done, total):
        pass
