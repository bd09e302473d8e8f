"""The commands of the soak: small enough to run hundreds of times, with all that a run has (samples, dropout, micro-steps)."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ...data.tales import TALES

STEPS, SAVES, EVALUATES = 12, 3, 4  # steps, and steps between checkpoints and between evaluations
TEXT, OTHER_TEXT = Path("texts/text.txt"), Path("texts/other.txt")
SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--context-length", "32", "--tokenizer", "char"]
RHYTHM = (
    f"--steps {STEPS} --save-interval {SAVES} --eval-interval {EVALUATES} --log-interval 2 --eval-windows 4 "
    "--sample-tokens 8 --prompt é --batch-size 4 --micro-batch 2 --warmup-steps 2 --device cpu"
).split()
TRAIN = ["train", "--data", str(TEXT), *SHAPE, *RHYTHM, "--out", "run"]
RESUME = ["train", "--resume", "run"]
HALF = [*TRAIN, "--steps", str(STEPS // 2), "--schedule", "constant"]
WHOLE = [*RESUME, "--steps", str(STEPS)]
SHARDED = ["train", "--data", "shards", *TRAIN[3:]]
OFTEN = [*TRAIN, "--save-interval", "1"]
BACKGROUND = [*OFTEN, "--async-save"]
TOKENIZE = ["tokenize", str(TEXT), "--tokenizer", "char", "--out", "shards"]
TOKENIZER = ["tokenizer", "train", str(TEXT), "--vocab-size", "300", "--out", "tokenizer.json"]
EXPORT = ["export", "run", "exported"]
IMPORT = ["import", "exported", "imported"]
TUNE = ["train", "--resume", "imported", "--data", str(OTHER_TEXT), *RHYTHM]


class Job(NamedTuple):
    """A command that is killed: what it needs in its folder, what it makes there, and the name of that in the reference."""

    name: str
    command: list[str]
    makes: str
    reference: str
    needs: tuple[str, str] | None = None  # in the reference, and in the folder
    again: list[str] | None = (
        None  # how to go on once `makes` is there; None: it is there whole or not at all
    )


JOBS = (
    Job("training", TRAIN, "run", "run", again=RESUME),
    Job("the first half", HALF, "run", "half", again=RESUME),
    Job("resuming", WHOLE, "run", "resumed", ("half", "run"), WHOLE),
    Job("saving at each step", OFTEN, "run", "often", again=RESUME),
    Job("saving in the background", BACKGROUND, "run", "background", again=RESUME),
    Job("tokenizing", TOKENIZE, "shards", "shards"),
    Job("training a tokenizer", TOKENIZER, "tokenizer.json", "tokenizer.json"),
    Job("exporting", EXPORT, "exported", "exported", ("run", "run")),
    Job("importing", IMPORT, "imported", "imported", ("exported", "exported")),
    Job("fine-tuning", TUNE, "imported", "tuned", ("imported", "imported"), TUNE),
)


def write_texts() -> None:
    """Write the texts to train on into the working folder; the same ones each time."""
    for file, seed in ((TEXT, 0), (OTHER_TEXT, 1)):
        file.parent.mkdir(exist_ok=True)
        file.write_text("é " + "\n".join(islice(TALES.stream(seed), 60)) + "\n", encoding="utf-8")
