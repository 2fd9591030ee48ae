"""Draw the layers of the package, as import-linter holds them, with what each package is for.

Run: python docs/draw_layers.py    writes docs/images/layers.svg
"""

import ast
import textwrap
import tomllib
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, GAP = 12.0, 0.62, 0.14


def layers() -> list[list[str]]:
    """The packages of each layer, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rows = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [[name.strip() for name in row.split(":")] for row in rows]


def purpose(package: str) -> str:
    """The first line of a package's docstring."""
    path = ROOT / "src" / package.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def main() -> None:
    """Write the picture."""
    rcParams["svg.hashsalt"] = "layers"
    rows = layers()
    figure = Figure(figsize=(WIDTH, len(rows) * (HEIGHT + GAP)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(-len(rows) * (HEIGHT + GAP), 0))
    axes.set_axis_off()
    for i, row in enumerate(rows):
        each = (WIDTH - GAP * (len(row) + 1)) / len(row)
        for j, package in enumerate(row):
            x, y = GAP + j * (each + GAP), -(i + 1) * (HEIGHT + GAP) + GAP / 2
            style = "round,pad=0,rounding_size=0.08"
            box = FancyBboxPatch((x, y), each, HEIGHT, boxstyle=style, fc="#eef3f8", ec="#4a6a8a")
            axes.add_patch(box)
            text = textwrap.shorten(purpose(package), int(each * 17), placeholder=" …")
            name = package.removeprefix("dichroic.")
            axes.text(x + 0.12, y + 0.4, name, weight="bold", size=10, va="center")
            axes.text(x + 0.12, y + 0.17, text, size=7.5, va="center")
    figure.savefig(ROOT / "docs/images/layers.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
