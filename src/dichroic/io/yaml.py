"""YAML from strangers: plain values only, each key once, and bounded in size, depth and what aliases stand for.

An alias repeats what it stands for, so that a few lines can state billions of values; what counts is the
number of values with all aliases written out.
"""

from typing import Any

import yaml

from dichroic.errors import ConfigError

MOST_BYTES = 2**19
MOST_VALUES = 100_000
MOST_DEPTH = 64
MOST_DIGITS = 1000
_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")


def parse_yaml(data: bytes) -> Any:
    """The plain value that `data` states; raises `ConfigError`, with the line where there is one."""
    try:
        loader = _Loader(data)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with these bounds."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values below each finished node, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[union-attr]
        self._depth += 1
        _refuse(self._depth > MOST_DEPTH, f"nested more than {MOST_DEPTH} deep", mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes and isinstance(node, yaml.ScalarNode):
            self._sizes[id(node)] = 1
        _refuse(id(node) not in self._sizes, "an alias inside what it stands for", mark)
        return node

    def compose_sequence_node(self, anchor: Any) -> Any:
        node = super().compose_sequence_node(anchor)
        return self._measured(node, node.value)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            _refuse(name in seen, f"key {name!r} appears twice", key.start_mark)
            seen.add(name)
        return self._measured(node, [part for pair in node.value for part in pair])

    def _measured(self, node: Any, parts: list[Any]) -> Any:
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        _refuse(size > MOST_VALUES, f"more than {MOST_VALUES:,} values", node.start_mark)
        self._sizes[id(node)] = size
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        _refuse(kind not in _KINDS, f"a value of kind {node.tag!r}", node.start_mark)
        if kind == "str" or not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        _refuse(len(node.value) > MOST_DIGITS, "a number that is too long", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise yaml.MarkedYAMLError(
                problem=f"{node.value!r} is no {kind}", problem_mark=node.start_mark
            ) from error


def _refuse(fault: bool, problem: str, mark: Any) -> None:
    if fault:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
