"""How the commands behind training end: what went wrong as one line, and the exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from abmll.exhausted import Exhausted, memory_told


def exit_status(command: Callable[[], None]) -> int:
    """Runs it. 0; 2 for a mistake of the user's or a file that cannot be had; 1 where memory ran out."""
    try:
        with memory_told():
            command()
    except BrokenPipeError:  # the reader, such as `head`, has enough
        sys.stderr.close()
    except Exhausted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
