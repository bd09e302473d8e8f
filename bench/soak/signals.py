"""Signals: once and twice, in every part of the loop and at random moments."""

import random
import re
import signal
from collections.abc import Callable
from functools import partial

from . import causes, commands
from .place import Ended, Failed, Place, steps
from .scenario import Scenario

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SLOWEST = 2.0  # seconds to save and end, on a machine that does nothing else
PARTS = ("evaluate", "sample", "log", "save")


def _stopped(place: Place, ended: Ended, *numbers: int) -> None:
    """Hold a stopped run to it: exit code, a checkpoint of the step that it names, and the same end as without a stop."""
    ended.expect(*(CODES[signal.Signals(number)] for number in numbers))
    if not (named := re.search(r"stopped after step ([\d,]+)", ended.output)):
        raise Failed(f"does not say after which step it stopped: …{ended.output[-300:]}")
    step = int(named[1].replace(",", ""))
    if step and steps(place.run)[-1:] != [step]:
        raise Failed(f"stopped after step {step}, but the newest checkpoints are {steps(place.run)}")
    place.finish()


def inside(part: str, time: int, numbers: tuple[int, ...], place: Place) -> None:
    """Signals that come when a part of the loop begins."""
    action = partial(causes.receive, *numbers)
    _stopped(place, place.gpt(commands.TRAIN, partial(causes.on_entering, part, time, action)), *numbers)


def between(numbers: tuple[int, ...], place: Place) -> None:
    """Signals that come before a step."""
    action = partial(causes.receive, *numbers)
    _stopped(place, place.gpt(commands.TRAIN, partial(causes.at_step, 7, action)), *numbers)


def anywhere(seed: int, place: Place) -> None:
    """A signal, or two, before some change of a file, the first one and the second one at different ones."""
    draw = random.Random(seed)
    numbers = [draw.choice(list(CODES)) for _ in range(draw.choice((1, 2)))]
    moments = sorted(draw.sample(range(15, 80), len(numbers)))
    events: list[Callable[[], None]] = [
        partial(causes.at_event, moment, partial(causes.receive, number))
        for moment, number in zip(moments, numbers, strict=True)
    ]
    ended = place.gpt(commands.TRAIN, *events)
    if ended.code == 0 or not place.run.exists():  # it came too late, or before there was a run
        place.finish()
    elif ended.code in (130, 143, 129) and "stopped after step" not in ended.output:
        place.finish()  # before the first step
    else:
        _stopped(place, ended, *numbers)


def in_background(number: int, place: Place) -> None:
    """A signal while a checkpoint is written in the background: that one and the last step's are there."""
    ended = place.gpt(commands.BACKGROUND, partial(causes.at_step, 7, partial(causes.receive, number)))
    ended.expect(CODES[signal.Signals(number)])
    if steps(place.run)[-2:] != [6, 7]:
        raise Failed(f"stopped after step 7, but the newest checkpoints are {steps(place.run)}")
    place.go_on().expect(0)
    place.require_equal("run", "background")


def during_resume(number: int, place: Place) -> None:
    """A signal while a run is being opened: nothing of it is lost."""
    place.take("stopped", "run")
    place.gpt(commands.RESUME, partial(causes.at_event, 2, partial(causes.receive, number)))
    place.finish()


SCENARIOS = (
    *(
        Scenario(
            "signals",
            f"{signal.Signals(number).name} in {part}",
            partial(inside, part, 2, (number,)),
            number == signal.SIGTERM,
        )
        for number in CODES
        for part in PARTS
    ),
    *(
        Scenario(
            "signals",
            f"{signal.Signals(number).name} between two steps",
            partial(between, (number,)),
            number == signal.SIGHUP,
        )
        for number in CODES
    ),
    *(
        Scenario(
            "signals",
            f"{signal.Signals(number).name} twice in {part}",
            partial(inside, part, 2, (number, number)),
            number == signal.SIGINT and part in ("evaluate", "save"),
        )
        for number in CODES
        for part in PARTS
    ),
    *(
        Scenario("signals", f"{signal.Signals(number).name}, --async-save", partial(in_background, number))
        for number in CODES
    ),
    *(Scenario("signals", f"at random, seed {seed}", partial(anywhere, seed)) for seed in range(24)),
    *(
        Scenario("signals", f"{signal.Signals(number).name} while resuming", partial(during_resume, number))
        for number in CODES
    ),
)
