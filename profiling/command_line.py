"""The manners of every command: what typer refuses is one line and exit code 2, as any other bad input is."""

import sys
from typing import Any, NoReturn

import typer

MANNERS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""What every program's `typer.Typer` is made with."""

_UsageError = typer.BadParameter.__base__  # typer has a click of its own from 0.26 on, and exports this class only


def run(app: typer.Typer) -> NoReturn:
    """Run the app on the process's arguments and exit with its code."""
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
            text = error.format_message().rstrip(".")
            print(f"error: {text}{_value(error, words)}; --help shows what there is", file=sys.stderr)
        else:
            error.show()  # the help
        code = error.exit_code
    except typer.Abort:  # Ctrl-C
        code = 130
    sys.exit(code)


def _value(error: Exception, words: list[str]) -> str:
    """What was given for the option that `error` is about, which its own text does not say."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, is_joined, value = word.partition("=")
        if name in names:
            return f", not {value if is_joined else after!r}"
    return ""
