"""Work for a process of its own, which imports nothing that takes long."""

import os
import time


def goes_on(told, seconds, _deadline, tell):
    """Tells all, and goes on for so many seconds."""
    for each in told:
        tell(each)
    time.sleep(seconds)


def hurried(work, _deadline, tell):
    """Works as if its time were up, in as few rounds as there may be."""
    work(0.0, tell)


def dies(_deadline, tell):
    """Tells one thing, and is gone."""
    tell("something")
    os._exit(7)
