"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one line: which file or flag, what is wrong with it, and what to do. The command
    line prints it without a traceback and exits with status 1.
    """
