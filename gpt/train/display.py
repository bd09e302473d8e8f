"""Progress of a run: a live line on a terminal, otherwise one plain line per log interval, and a final summary."""

import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...data.loader import TokenLoader
from ...data.shards import TokenShards
from ...data.untrusted import printable
from ...kernels import explain
from ..config import RunConfig
from ..evaluate import CorpusReport
from ..model import GPT
from ..output import Output


class Display:
    """Prints the progress of a run, as long as stdout can be written; a context manager around its steps."""

    def __init__(self) -> None:
        self.console = Console(file=cast(IO[str], Output()), highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(printable(text, keep="\n")))

    def start(
        self,
        config: RunConfig,
        model: GPT,
        loader: TokenLoader,
        shards: TokenShards,
        device: torch.device,
        step: int,
    ) -> None:
        shape, settings = config.model, config.train
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        passes = settings.steps * settings.batch_size / loader.n_windows
        self.say(
            f"data   {settings.data}: {shards.train_tokens:,} tokens to train on, {shards.val_tokens:,} to validate; "
            f"{shards.tokenizer.kind} tokenizer of {shape.vocab_size:,}"
        )
        self.say(
            f"model  {model.num_params():,} parameters: {shape.n_layer} layers of width {shape.n_embd}, "
            f"{shape.n_head} heads, context {shape.context_length}"
        )
        parts = f" in micro-batches of {settings.sequences}" if settings.accumulation > 1 else ""
        self.say(
            f"train  {settings.steps:,} steps of {settings.batch_size} x {shape.context_length} tokens{parts} "
            f"({passes:.2g} passes), {settings.optimizer}, {settings.dtype} on {name}"
        )
        terms = {"label smoothing": settings.label_smoothing, "z-loss": settings.z_loss}
        if on := [f"{name} {value:g}" for name, value in terms.items() if value]:
            self.say(f"       training loss with {' and '.join(on)}; validation loss is plain cross-entropy")
        probe = torch.empty(0, dtype=getattr(torch, settings.dtype), device=device)
        self.say(f"       {explain('attention', probe)}")
        self.say("       losses are in nats a token")
        if step:
            self.say(f"       continued from step {step:,}")
        self.task = self.bar.add_task("training", total=settings.steps, completed=step, numbers="")
        self.width = len(f"{settings.steps:,}")

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def progress(self, record: dict[str, Any], steps: int) -> None:
        """Show the record of a log interval."""
        loss = f"{record['loss']:.4f}" if "loss" in record else "-"
        if "spike" in record:
            loss += f" (spike: {record['highest_loss']:.4f})"
        numbers = f"loss {loss}  {_count(record['tokens_per_second'])} tokens/s"
        if "mfu" in record:
            numbers += f"  MFU {record['mfu']:.1%}"
        numbers += f"  {record['memory'] / 2**30:.1f} GiB"
        self.bar.update(self.task, completed=record["step"], numbers=numbers)
        if not self.console.is_terminal:
            left = (steps - record["step"]) * record["seconds_per_step"]
            self.say(f"step {record['step']:>{self.width},}/{steps:,}  {numbers}  {_duration(left)} left")

    def evaluation(self, record: dict[str, Any]) -> None:
        line = f"step {record['step']:>{self.width},}  validation loss "
        if "val_loss" in record:
            line += f"{record['val_loss']:.4f}  perplexity {record['val_perplexity']:,.2f}"
        else:
            line += "is not a finite number"
        if "train_loss" in record:
            line += f"  training loss {record['train_loss']:.4f}"
        if "best_possible" in record:
            line += f"  best possible {record['best_possible']:.4f}"
        self.say(line)

    def sample(self, text: str) -> None:
        text = printable(text.strip(), keep="\n\t").replace("\n", "\n    ")
        self.console.print(Text(f"    {text}", style="dim"))

    def end(
        self,
        out: Path,
        steps: int,
        report: CorpusReport | None,
        loss: float | None,
        bits: float | None,
    ) -> None:
        """The run has ended: its validation loss in nats a token and bits a byte where they are known, and what can be done next."""
        if report:
            self.say("\n" + "\n".join(report.lines()))
        elif bits is not None:
            self.say(f"\nvalidation loss: {loss:.4f} nats a token, {bits:.4f} bits a byte")
        gpt = program()
        self.say(
            f"\nloss curve  {out / 'loss_curve.png'}\n"
            f"generate    {gpt} generate {out}\n"
            f"go on       {gpt} train --resume {out} --steps {2 * steps}\n"
            f"your text   {gpt} train --data FILE.txt --out runs/mine"
        )


def program() -> str:
    """The command by which the shell calls this program: `gpt` if it is on the PATH."""
    script = Path(sys.executable).with_name("gpt")
    if not script.exists():
        return "python -m fusedgpt.gpt"
    found = shutil.which("gpt")
    return "gpt" if found and Path(found).samefile(script) else os.path.relpath(script)


def _count(number: float) -> str:
    return (
        f"{number / 1e6:.2f} M"
        if number >= 1e6
        else f"{number / 1e3:.1f} k"
        if number >= 1e3
        else f"{number:.0f}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
