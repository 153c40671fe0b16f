"""YAML whose values know the line that they came from, so that a mistake in a recipe is named by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be carried out; the message names the file, the line, and what was expected."""


class Located:
    """A node of a YAML file: plain values, with the place of each.

    Attributes:
        file: the name that messages give the file.
        line: of this node, from 1.
        value: the plain Python value, all the way down.
    """

    def __init__(self, file: str, node: yaml.Node, value: Any) -> None:
        self.file, self.line, self.value = file, node.start_mark.line + 1, value
        self._node = node

    @classmethod
    def read(cls, text: str, file: str) -> Located:
        """Raises RecipeError for what is no YAML, is empty, or names a key twice."""
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise RecipeError(f"{file}:1: the recipe is empty. Copy one: mamba-study list --show icl > my.yaml")
            _refuse_repeated_keys(node, file)
            return cls(file, node, loader.construct_document(node))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError(f"{file}:{line}: no YAML: {error.problem}") from error
        finally:
            loader.dispose()

    def error(self, problem: str) -> RecipeError:
        """An error about this node."""
        return RecipeError(f"{self.file}:{self.line}: {problem}")

    def items(self) -> dict[str, Located]:
        """The entries of a mapping, each at the line of its key.

        Raises RecipeError unless it is one.
        """
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error(f"expected 'key: value' lines, not {_kind(self.value)}")
        found = {}
        for key, node in self._node.value:
            entry = Located(self.file, node, self.value[key.value])
            entry.line = key.start_mark.line + 1
            found[str(key.value)] = entry
        return found

    def elements(self) -> list[Located]:
        """The elements of a list; a value that is no list is a list of one.

        Raises RecipeError for an empty one.
        """
        if not isinstance(self._node, yaml.SequenceNode):
            return [self]
        if not self._node.value:
            raise self.error("the list is empty, so there would be nothing to run. Give at least one value.")
        return [Located(self.file, node, value) for node, value in zip(self._node.value, self.value, strict=True)]

    @property
    def is_list(self) -> bool:
        return isinstance(self._node, yaml.SequenceNode)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self._node, yaml.MappingNode)


def read_file(path: Path) -> str:
    """The text of a recipe. Raises RecipeError for what cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe ({error}); give a YAML file.") from error


def _refuse_repeated_keys(node: yaml.Node, file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{file}:{line}: a key is a word, such as models")
            if key.value in seen:
                raise RecipeError(f"{file}:{line}: {key.value} is there already, in line {seen[key.value]}")
            seen[key.value] = line
            _refuse_repeated_keys(value, file)
    elif isinstance(node, yaml.SequenceNode):
        for element in node.value:
            _refuse_repeated_keys(element, file)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a list" if isinstance(value, list) else f"{value!r}"
