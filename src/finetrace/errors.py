"""The one exception a person is meant to read."""

from __future__ import annotations


class FinetraceError(Exception):
    """A problem the user can mend: one sentence saying what, where, and what to do.

    The command line prints the sentence and exits with status 2; Python callers catch it.
    """

    exit_code = 2
