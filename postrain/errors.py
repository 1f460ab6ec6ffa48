"""The exception that a user's mistake raises, and the words that messages share."""

from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right: a path, a config key, a row of data, a model folder.

    The message is one line that says what was expected, what was found, where (``file:line`` of the
    data, the key of the config, the tensor of the file) and what to do. The command line prints it
    without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


def one_line(error: BaseException) -> str:
    """The text of an error on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]


def shorten(items: Iterable[object], limit: int, separator: str = ", ") -> str:
    """``a, b, c and 4 more``: the first ``limit`` items, and the number of the others."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more
