"""The names of `dichroic`: what type checkers see is what there is."""

import ast
from pathlib import Path

import dichroic


def test_type_checkers_see_every_public_name_where_it_is():
    tree = ast.parse(Path(dichroic.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.asname: n.module for n in block.body for a in n.names}
    assert seen == {k: f"dichroic.{m}" for k, m in dichroic._MODULE.items()}
    assert len(seen) <= 60


def test_every_public_name_can_be_had():
    for name in dichroic.__all__:
        assert getattr(dichroic, name).__name__ == name
