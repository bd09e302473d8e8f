"""`gpt ...` and `python -m fusedgpt.gpt ...`: Ctrl-C ends it quietly while modules are still imported, too."""

import os
import signal
import sys


def start() -> None:
    """Run the command line of this process, and exit with its code."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup
        from .cli import main

        sys.exit(main())
    quiet = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from .cli import main

    try:
        signal.signal(signal.SIGINT, quiet)
        code = main()
    except KeyboardInterrupt:
        code = 130
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(code)


if __name__ == "__main__":
    start()
