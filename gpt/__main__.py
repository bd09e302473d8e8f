"""`python -m fusedgpt.gpt ...` is `gpt ...`."""

import sys

from .cli import main

sys.exit(main())
