"""Faults of what is around a process: its terminal, its output, its home and cache. None of them ends training early."""

from functools import partial

from . import causes, commands
from .disk import _as_nobody
from .place import Cause, Place
from .scenario import Scenario

OUTPUTS: dict[str, Cause] = {
    "a full standard output": partial(causes.print_to, "/dev/full"),
    "a closed standard output": causes.close_output,
    "| head -1": causes.pipe_to_head,
    "an ASCII terminal, LC_ALL=C": causes.ascii_output,
    "a terminal of 20 columns": partial(causes.terminal, 20),
    "a terminal that is closed": causes.terminal_that_closes,
    "a picture that fails": causes.fail_pictures,
}


SLOW = ("a closed standard output", "a picture that fails")  # others of `make test` try these


def trains(cause: Cause, place: Place) -> None:
    """Training reaches its last step with every file as it is to be; only its exit code may tell of the output."""
    ended = place.gpt(commands.TRAIN, cause)
    ended.expect(0, 2, 141)
    place.require_equal("run")


def writes(cause: Cause, place: Place) -> None:
    """Text is generated as far as the output takes it; no traceback."""
    place.take("run")
    place.gpt(["generate", "run", "--prompt", "é", "--max-tokens", "5"], cause).expect(0, 2, 141)


def evaluates(cause: Cause, place: Place) -> None:
    place.take("run")
    place.gpt(["evaluate", "run"], cause).expect(0, 2, 141)


def no_home(place: Place) -> None:
    """No HOME, no cache folder named, and a user without a home."""
    bare = partial(causes.set_environment, HOME="", XDG_CACHE_HOME="", TIKTOKEN_CACHE_DIR="")
    place.gpt(commands.TRAIN, _as_nobody(place), partial(causes.become_nameless), bare).expect(0)
    place.require_equal("run")


def read_only_cache(place: Place) -> None:
    """A cache folder that nobody can write."""
    place.gpt(commands.TRAIN, partial(causes.set_environment, XDG_CACHE_HOME="/proc/none")).expect(0)
    place.require_equal("run")


SCENARIOS = (
    *(
        Scenario("environment", f"{name}: training", partial(trains, cause), name not in SLOW)
        for name, cause in OUTPUTS.items()
    ),
    *(
        Scenario("environment", f"{name}: generating", partial(writes, cause))
        for name, cause in OUTPUTS.items()
    ),
    *(
        Scenario("environment", f"{name}: evaluating", partial(evaluates, cause))
        for name, cause in OUTPUTS.items()
    ),
    Scenario("environment", "no HOME", no_home, True),
    Scenario("environment", "a cache that cannot be written", read_only_cache, True),
)
