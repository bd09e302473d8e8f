"""Runs that have gone wrong: losses that are no numbers or far above guessing, and the report of a run that is stopped."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.files import write_file
from ..config import RunConfig
from ..metrics import training_lines
from .session import Session

REPORT = "stopped.json"
PATIENCE = 100  # steps


def highest_sane(config: RunConfig) -> float:
    """Twice the loss of guessing, ln V and its z-loss: an untrained model is at about half of it, in nats a token."""
    guess = math.log(config.model.vocab_size)
    return 2 * (guess + config.train.z_loss * guess**2)


def diverged(history: Sequence[dict[str, Any]], limit: float) -> bool:
    """Whether the loss of every line over the last `PATIENCE` steps is above `limit`."""
    last = None
    for line in training_lines(history):
        last = line["step"] if last is None else last
        if last - line["step"] >= PATIENCE:
            return True
        if line.get("loss", math.inf) <= limit:
            return False
    return False


def fault(session: Session) -> str | None:
    """Why the weights are not worth a checkpoint, as the newest line of the log and the steps since then tell; or None."""
    recent = [line.get("loss") for line in training_lines(session.log.history)][:1]
    if session.losses:
        recent.append(session.recent_loss())
    limit = highest_sane(session.config)
    if any(loss is not None and loss <= limit for loss in recent):
        return None
    if recent[-1] is None:
        return "no recent loss is a finite number"
    return f"its loss, {recent[-1]:.4g}, is far above that of guessing, {limit / 2:.4g}"


def write_report(session: Session, reason: str) -> None:
    """Write stopped.json: the losses, and the last step's batch with the norms of weights and gradients by layer.

    The gradients are computed anew on that batch, with its dropout masks and the present weights.
    """
    step, size = session.step, session.config.train.batch_size
    lines = [{"step": line["step"], "loss": line.get("loss")} for line in training_lines(session.log.history)]
    first = session.position - size
    session.loader.seek(first)
    step.step -= 1
    step.abandon()  # and count the dropout seed from the step before
    for _ in range(session.config.train.accumulation):
        step.micro_step(*next(session.loader))
    layers: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for name, p in session.model.named_parameters():
        parts = name.split(".")
        layers.setdefault(".".join(parts[: 2 if parts[0] == "h" else 1]), []).append((p.detach(), p.grad))
    report = {
        "reason": reason,
        "step": step.step + 1,
        "skipped in a row": int(step.in_row.item()),
        "losses": lines[:20],
        "batch": {
            "first window": first,
            "windows": size,
            "epoch": first / session.loader.n_windows,
            "loss": _plain(step.loss),
        },
        "norms": {
            layer: {
                "weights": _norm([weight for weight, _ in tensors]),
                "gradients": _norm([g / step.loss_scale for _, g in tensors if g is not None]),
            }
            for layer, tensors in layers.items()
        },
    }
    step.abandon()
    step.step += 1
    session.loader.seek(session.position)
    write_file(session.out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")


def _norm(tensors: list[Tensor]) -> float | str:
    return _plain(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))


def _plain(number: Tensor) -> float | str:
    """As JSON has it, which knows neither nan nor inf."""
    value = number.item()
    return value if math.isfinite(value) else str(value)
