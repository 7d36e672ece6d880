"""The command line. This file is its boundary: every fault leaves as one plain message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from posttrain.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, PosttrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Faults go to stderr, without a traceback unless --debug is given."""
    from posttrain.cli.app import app

    words = list(sys.argv[1:] if argv is None else argv)
    _never_fail_on_printing()
    try:
        app(args=words, prog_name="posttrain")
    except SystemExit as left:
        if left.code == EXIT_INTERRUPTED:
            print("interrupted", file=sys.stderr)
        return left.code if isinstance(left.code, int) else EXIT_OK if left.code is None else EXIT_INTERNAL
    except PosttrainError as fault:
        if "--debug" in words:
            traceback.print_exc()
        print(fault, file=sys.stderr)
        return fault.exit_code
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        else:
            print(
                f"internal error: {type(error).__name__}: {error}. This is our fault, not yours; "
                f"run posttrain --debug {' '.join(words)} for the traceback.",
                file=sys.stderr,
            )
        return EXIT_INTERNAL
    return EXIT_OK


def _never_fail_on_printing() -> None:
    """A terminal that cannot show a character shows a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
