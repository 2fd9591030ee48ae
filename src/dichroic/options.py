"""What options of the command line are given: numbers, lists, and text that a function parses."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dichroic.errors import DichroicError


def positive(text: str) -> int:
    """The number that `text` is, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for an option, whose mistakes are shown with its name."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except DichroicError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def listed(text: str) -> list[str]:
    """The parts of `A, B, …`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """The numbers of `1, 2, …`."""
    return [int(part) for part in listed(text)]


def ending(*endings: str) -> Callable[[str], Path]:
    """The path of an option, which must end so."""

    def convert(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(
                f"expected a name that ends in {' or '.join(endings)}, got {text!r}"
            )
        return Path(text)

    return convert
