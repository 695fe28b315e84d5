"""One line and an exit code for every refusal by typer or the file system, as for any other bad input."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from profiling.output.errors import CommandError

MANNERS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""The options of every program's `typer.Typer`."""

_UsageError = typer.BadParameter.__base__  # typer has a click of its own from 0.26 on, and exports this class only


def run(app: typer.Typer) -> Any:
    """Run the app on the process's arguments and exit with its code, or return its result if that is no exit code."""
    words = sys.argv[1:]
    for before, word in zip(["", *words], words, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):  # Path("") would be the present folder
            name = word[:-1] or (before if before.startswith("-") else "an argument")
            print(f"error: {name} is empty; give it a value, or leave it out", file=sys.stderr)
            sys.exit(2)
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if words:
            print(f"error: {_with_value(error, words)}; --help shows what there is", file=sys.stderr)
        else:
            error.show()  # the help
        code = error.exit_code
    except OSError as error:
        if not (line := _refused_path(error)):
            raise
        print(f"error: {line}", file=sys.stderr)
        code = CommandError.exit_code
    except typer.Abort:  # Ctrl-C
        code = 130
    if code is None or isinstance(code, int):
        sys.exit(code)
    return code


def guarded(command: Callable[[], int | None], tell: Callable[[BaseException], Any]) -> int:
    """The exit code of `command()`. `tell(error)` gets an exception with an `exit_code`, or a refused path.

    Any other exception is a fault of the program, and is raised.
    """
    try:
        return command() or 0
    except BaseException as raised:
        line = _refused_path(raised) if isinstance(raised, OSError) else None
        error = CommandError(line) if line else raised
        if not hasattr(error, "exit_code"):
            raise
        tell(error)  # here, since torchrun's report has the traceback of the exception in hand
        return error.exit_code


def require(what: str, name: str | None, known: Iterable[str]) -> None:
    """Raise CommandError, with the nearest of `known`, for another `name`; None is no name."""
    known = tuple(dict.fromkeys(known))
    if name is None or name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    raise CommandError(f"{what} {name!r} is unknown; {hint}")


def _refused_path(error: OSError) -> str | None:
    """The line for a path of the command line that the file system refuses: too long, forbidden, a loop of links.

    None where `error` is about another file: then it is a fault of the program.
    """
    if not isinstance(error.filename, str | bytes):
        return None
    name = os.fsdecode(error.filename)
    given = [word.partition("=")[2] if word.startswith("--") else word for word in sys.argv[1:]]
    if not any(word and Path(name).absolute().is_relative_to(Path(word).absolute()) for word in given):
        return None
    return f"{name}: {error.strerror}; name another path"


def _with_value(error: Exception, words: list[str]) -> str:
    """The text of `error` with the value given for its option, which not every click adds."""
    text = error.format_message().rstrip(".")
    names = getattr(getattr(error, "param", None), "opts", ())
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, is_joined, value = word.partition("=")
        given = repr(value if is_joined else after)
        if name in names and given not in text:
            return f"{text}, not {given}"
    return text
