"""The `normwise` command. No logic of its own: `commands` holds the words, the packages do the work."""

from __future__ import annotations

import signal
import sys

from normwise.errors import MissingExtraError


def main() -> None:
    """Run the command line; without its packages, say in one sentence how to get them."""
    try:
        from normwise.commands import app

        app()
    except ImportError as error:
        if (error.name or "").startswith("normwise"):
            raise
        missing = MissingExtraError("the command line", "tune")
        print(f"error: {missing} ({error.name} is missing)", file=sys.stderr)  # noqa: T201 - typer may be what is missing
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
