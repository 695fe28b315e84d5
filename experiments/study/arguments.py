"""The words of `python -m experiments.NAME`: what is wrong with them is said in one line, with exit code 2."""

import argparse
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, which prints no usage before an error, and takes no part of an option's name for the option."""

    def __init__(self, doc: str):
        super().__init__(description=doc.splitlines()[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End the process, since the words are none of this command's."""
        self.fail(f"{message}; --help lists what there is")

    def fail(self, message: str) -> NoReturn:
        """End the process with this line, as a UsageError does."""
        self.exit(2, f"error: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """What reads a whole number of at least `least`. It raises ArgumentTypeError for any other text."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {least}")
        return number

    return read
