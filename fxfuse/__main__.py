"""``python -m fxfuse`` is the command ``fxfuse``."""

from fxfuse.cli import main

main()
