"""When a checkpoint is written, what a failing disk means for a run, and how a run is stopped that has gone wrong."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..checkpoint import NotFinite, State, versions
from ..evaluate import mean_loss
from ..output import warn
from .display import program
from .divergence import REPORT, fault, highest_sane, write_report
from .interruption import Interrupted, TrainingError
from .session import Session


def save(session: Session, checked: bool = False) -> None:
    """Write a checkpoint from which the run goes on exactly as if it had not stopped, unless the weights are not worth one.

    Args:
        checked: they are known to be.

    Raises:
        TrainingError: it cannot be written, or the weights are not finite, or the run's last ones not worth a checkpoint.
    """
    step = session.step
    skipped, in_row = map(int, step.skips.tolist())
    if not checked and in_row >= session.config.train.max_skipped:
        stop(session, skipped_steps(in_row))
    why = None if checked else fault(session)
    if why and session.last:
        stop(session, why)
    session.tried = step.step
    if why:
        warn(f"no checkpoint of step {step.step:,}: {why}")
        return
    state = State(
        step=step.step,
        loader=session.loader.state_dict(),
        scaler=step.state() or None,
        losses=session.pending(),
        skipped=skipped,
        in_row=in_row,
        files=session.sizes,
        config=session.config.flat(),
        versions=versions(),
        tokenizer=session.shards.tokenizer.fingerprint(),
        grad_norm=session.norm.item() if session.losses else None,
    )
    try:
        with written(session):
            session.log.require_in_place()
            session.writer.save(session.model, session.optimizers, state, session.log.history)
    except NotFinite as error:
        stop(session, str(error))


def rescue(session: Session, error: BaseException) -> None:
    """Save the last finished step of a run that ends with `error`, unless that has been tried."""
    if not session.step.whole or session.tried == session.step.step:
        return
    session.loader.seek(session.position)
    try:
        save(session)
        with written(session):
            session.writer.wait()
    except Exception as second:
        if isinstance(error, Interrupted):
            raise
        warn(f"no checkpoint of step {session.step.step:,}: {second}")


@contextmanager
def written(session: Session) -> Iterator[None]:
    """A block that writes into the run's folder: what fails there ends the run or is left out, as `on_save_error` says.

    Raises:
        TrainingError: in place of OSError. A folder that is gone, and an error of the last step, always end the run.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        again = f"go on with: {program()} train --resume {session.out}"
        if isinstance(error, FileNotFoundError):
            raise TrainingError(
                f"the run's folder is gone at step {session.step.step:,} ({what}); put it back, then {again}"
            ) from error
        if session.config.train.on_save_error == "stop" or session.last:
            raise TrainingError(f"{what}, at step {session.step.step:,}; mend that, then {again}") from error
        warn(f"{what}, at step {session.step.step:,}; training goes on without it")


def skipped_steps(in_row: int) -> str:
    return f"the last {in_row:,} steps were skipped, since their losses or gradients were not finite"


def stop(session: Session, reason: str) -> NoReturn:
    """End a run that has gone wrong, with a report, and with a checkpoint if the weights still predict something.

    Raises:
        TrainingError: always.
    """
    with session.optional("the report"):
        write_report(session, reason)
    if session.tried != session.step.step:
        session.tried = session.step.step
        loss = mean_loss(session.model, session.validation[:1], session.step.dtype)
        if math.isfinite(loss) and loss <= highest_sane(session.config):
            save(session, checked=True)
    with session.optional("saving"):
        session.writer.wait()
    saved = session.writer.saved
    back = f"the checkpoint of step {saved:,} is the last good one" if saved else "there is no checkpoint yet"
    raise TrainingError(
        f"stopped after step {session.step.step:,}: {reason}; {back}, and {session.out / REPORT} has the batch and the "
        "norms by layer. A lower --lr (and --muon-lr), more --warmup-steps or a smaller --grad-clip help; in float16 so "
        "does --dtype bfloat16"
    )
