"""The time of a training: of its steps, of what is left, and how far a long step or evaluation is."""

import statistics
import sys
import time
from collections import deque

from lib import settings

QUIET = 60.0  # seconds after which a step or an evaluation that goes on says how far it is, in a log file
QUIET_ON_TERMINAL = 3.0  # the same on a terminal, where it is a bar
LONG_RUN = 3 * 86_400  # seconds from which a run is worth a warning


def duration(seconds):
    """A time as people say it."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.2g} seconds" if seconds < 10 else f"{seconds:,.0f} seconds"


def clock_time(seconds):
    """Whole seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def shorter(seconds):
    """What makes a run shorter, to end a line with; '' for one that is not long."""
    advice = "; a GPU, a smaller model or a smaller --max_iters makes that shorter"
    return advice if seconds > LONG_RUN else ""


class Clock:
    """Times the steps, without evaluations and saving. Of several processes only the first one speaks."""

    def __init__(self, rt):
        self.rt, self.is_terminal = rt, bool(sys.stderr) and sys.stderr.isatty()
        self.step_seconds = []  # of the steps since the last line of the log
        self.mean_seconds = deque(maxlen=20)  # of a step, at the last lines of the log
        self.has_spoken = False  # whether the time of the whole was said
        self.part_began = self.said = 0.0  # when the step or the evaluation began, and last said how far it is

    def begin_step(self, steps):
        """Begin a step, after which `steps` - 1 are left."""
        self.began, self.steps = time.perf_counter(), steps

    def at_micro_batch(self, step, done, count):
        """Say how far a long step is. In the first one, say as soon as that is known what all take."""
        self.at(f"step {step:,}, micro-batch", done, count)
        seconds = time.perf_counter() - self.began
        if done and not self.has_spoken and seconds > QUIET / 6:
            self.speak(seconds / done * count)

    def end_step(self):
        """Note the time of a step. After the first one, say what all take if that is long."""
        settings.show_bar("")
        self.step_seconds.append(time.perf_counter() - self.began)
        if not self.has_spoken:
            self.speak(self.step_seconds[-1])

    def speak(self, step_seconds):
        self.has_spoken, whole = True, step_seconds * self.steps
        if whole > QUIET:
            self.rt.say(f"a step takes {duration(step_seconds)}, all take about {duration(whole)}{shorter(whole)}")

    def lap(self):
        """The mean seconds of a step since the last lap."""
        self.mean_seconds.append(statistics.mean(self.step_seconds))
        self.step_seconds.clear()
        return self.mean_seconds[-1]

    def left(self, steps):
        """Seconds that so many steps will take."""
        return statistics.median(self.mean_seconds) * steps

    def at(self, what, done, count):
        """Say how far `what` is, of which `done` of `count` parts are done, if it takes long. 0 begins it."""
        now = time.monotonic()
        if done == 0:
            self.part_began = self.said = now
        if self.rt.rank or now - self.part_began < (QUIET_ON_TERMINAL if self.is_terminal else QUIET):
            return
        if self.is_terminal:
            bar = f"{what} [{'#' * round(20 * done / count):20}] {done} of {count} "
            settings.show_bar(bar if done < count else "")
        elif now - self.said >= QUIET and done < count:
            self.said = now
            settings.say(f"{what} {done} of {count}", file=sys.stderr)
