"""The fork server imports this: it uses every command once, so that a forked one takes 0.3 s where a fresh one takes 5."""

import atexit
import contextlib
import gc
import os
import tempfile

from ...gpt.cli import main
from . import commands


def _use_everything() -> None:
    with tempfile.TemporaryDirectory(prefix="fusedgpt-soak-") as folder, contextlib.chdir(folder):
        commands.write_texts()
        # not os.devnull opened as a file: what a child prints goes where descriptor 1 leads
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            for argv in (
                commands.TRAIN,
                commands.TOKENIZE,
                commands.TOKENIZER,
                commands.EXPORT,
                commands.IMPORT,
            ):
                if code := main(argv):
                    raise RuntimeError(f"gpt {' '.join(argv)} ended with {code}")


_use_everything()
gc.freeze()  # a collection in a forked process would copy every page that holds an object
atexit.register(gc.unfreeze)  # of the server, else libtriton reports its objects as leaked
