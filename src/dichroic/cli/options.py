"""What options of the command line are given: numbers, lists, and text that a function parses."""

import argparse
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dichroic.config import settings
from dichroic.errors import ConfigError, DichroicError


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


def bounds(text: str) -> dict[str, list[float | None]]:
    """The bounds of `NAME=LOW:HIGH, …`, of which either may be left out."""
    found: dict[str, list[float | None]] = {}
    for part in listed(text):
        name, _, given = part.partition("=")
        try:
            ends = [float(end) if end.strip() else None for end in given.split(":")]
        except ValueError:
            ends = []
        if len(ends) != 2:
            raise ConfigError(f"{part!r}: expected NAME=LOW:HIGH, such as flux=0: or image=0:1")
        found[name.strip()] = ends
    return found


def ending(*endings: str) -> Callable[[str], Path]:
    """The path of an option, which must end so."""

    def convert(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(
                f"expected a name that ends in {' or '.join(endings)}, got {text!r}"
            )
        return Path(text)

    return convert


def add_probe(command: argparse.ArgumentParser) -> None:
    """An option that leaves out the probe of operators, kept as `probe`."""
    command.add_argument(
        "--no-probe",
        dest="probe",
        action="store_false",
        help="take operators at their word: that they are linear, and not zero for all observations",
    )


def add_settings(command: argparse.ArgumentParser) -> None:
    """An option for every setting of a fit, kept as `set:NAME`."""
    group = command.add_argument_group("settings (override the file's fit: section)")
    for name, (kind, default) in settings().items():
        if name == "order":
            group.add_argument(
                "--order", metavar="A,B/C", help="groups of sources, learned in turn"
            )
            continue
        if name == "bounds":
            group.add_argument(
                "--bounds",
                dest="set:bounds",
                type=parsed(bounds),
                metavar="NAME=LOW:HIGH,…",
                help="lower and upper bound on the entries of a source; either may be left out",
            )
            continue
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        options = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        several = typing.get_origin(kind) is tuple
        group.add_argument(
            f"--{name}",
            dest=f"set:{name}",
            type=str if options else listed if several else kind,
            choices=options,
            metavar=None if options else "A,B" if several else kind.__name__.upper(),
            help="(default none)" if several else f"(default {default})",
        )
