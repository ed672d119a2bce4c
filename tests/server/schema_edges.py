"""Values at and just beyond every bound of a JSON schema, each within a document that is valid otherwise."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

Schema = Mapping[str, Any]

ODD_TEXTS = ("", "a b", "abc\n", "a\0b", "\0", "-abc", "a" * 65)
"""One of them breaks any pattern of the interface."""


class Edge(NamedTuple):
    """A document at one bound of its schema, and one just beyond it."""

    place: str
    """Where the bound is and what it is called, such as ``samples[].step minimum``."""
    within: Any
    """None: not made for this bound."""
    beyond: Any


class Edges:
    """Finds the edges of the schemas of an OpenAPI document.

    Args:
        schemas: ``components.schemas``, which references lead to.
    """

    def __init__(self, schemas: Schema) -> None:
        self._schemas = schemas

    def example(self, schema: Schema) -> Any:
        """Return a valid value, with every optional property, one element in every list and 1 for every number."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return self.example(schema["anyOf"][0])
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        kinds: dict[str, Callable[[], Any]] = {
            "object": lambda: self._example_object(schema),
            "array": lambda: [self.example(schema["items"])],
            "string": lambda: "abc",
            "boolean": lambda: True,
        }
        return kinds.get(schema["type"], lambda: 1)()

    def _example_object(self, schema: Schema) -> dict[str, Any]:
        made = {name: self.example(inner) for name, inner in schema.get("properties", {}).items()}
        if isinstance(schema.get("additionalProperties"), dict):
            names = schema.get("propertyNames", {}).get("enum", ["abc"])
            made[names[0]] = self.example(schema["additionalProperties"])
        return made

    def of(self, schema: Schema, place: str = "") -> Iterator[Edge]:
        """Yield an edge for every bound in a schema and in all that it contains."""
        for option in self._resolved(schema).get("anyOf", [schema]):
            resolved = self._resolved(option)
            kind = resolved.get("type")
            if "const" in resolved or "enum" in resolved:
                continue  # these are not bounds: another value is of another type
            if kind == "object":
                yield from self._of_object(resolved, place)
            elif kind == "array":
                yield from self._of_array(resolved, place)
            elif kind == "string":
                yield from _of_text(resolved, place)
            elif kind in ("integer", "number"):
                yield from _of_number(resolved, place)

    def _of_object(self, schema: Schema, place: str) -> Iterator[Edge]:
        whole = self.example(schema)
        for name, inner in schema.get("properties", {}).items():
            for edge in self.of(inner, f"{place}.{name}".lstrip(".")):
                yield _within(edge, partial(_with, whole, name))
        if not isinstance(schema.get("additionalProperties"), dict):
            return
        (key, value), *_ = whole.items()
        for edge in self.of(schema["additionalProperties"], f"{place}{{}}"):
            yield _within(edge, lambda inner: {key: inner})
        for edge in self.of({"type": "string", **schema.get("propertyNames", {})}, f"{place} name"):
            yield _within(edge, lambda name: {name: value})
        if "maxProperties" in schema:
            many = {f"{key}{number}": value for number in range(schema["maxProperties"] + 1)}
            yield Edge(f"{place} maxProperties", None, many)

    def _of_array(self, schema: Schema, place: str) -> Iterator[Edge]:
        for edge in self.of(schema["items"], f"{place}[]"):
            yield _within(edge, lambda value: [value])
        if "maxItems" in schema:
            yield Edge(f"{place} maxItems", None, self.example(schema) * (schema["maxItems"] + 1))
        if schema.get("uniqueItems"):
            yield Edge(f"{place} uniqueItems", None, self.example(schema) * 2)

    def _resolved(self, schema: Schema) -> Schema:
        if "$ref" not in schema:
            return schema
        return cast("Schema", self._schemas[schema["$ref"].rpartition("/")[2]])


def _with(whole: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return whole | {name: value}


def _within(edge: Edge, wrap: Callable[[Any], Any]) -> Edge:
    return Edge(edge.place, None if edge.within is None else wrap(edge.within), wrap(edge.beyond))


def _of_text(schema: Schema, place: str) -> Iterator[Edge]:
    if schema.get("minLength"):
        yield Edge(f"{place} minLength", "a" * schema["minLength"], "a" * (schema["minLength"] - 1))
    if "maxLength" in schema:
        yield Edge(f"{place} maxLength", "a" * schema["maxLength"], "a" * (schema["maxLength"] + 1))
    if "pattern" in schema:
        pattern = schema["pattern"].replace("$", r"\Z")  # Python's $ also matches before a newline at the end
        broken = [text for text in ODD_TEXTS if not re.search(pattern, text)]
        assert broken, pattern
        yield from (Edge(f"{place} pattern, {text!r:.20}", None, text) for text in broken)


def _of_number(schema: Schema, place: str) -> Iterator[Edge]:
    for name, direction in (("minimum", -1), ("maximum", 1)):
        if name in schema:
            yield Edge(f"{place} {name}", schema[name], _next(schema, schema[name], direction))


def _next(schema: Schema, bound: float, direction: int) -> float:
    """Return the number of the schema's kind that follows its bound."""
    if schema["type"] == "integer":
        return bound + direction
    if schema.get("format") == "float":
        return direction * 2.0**128 if abs(bound) > 1 else float(np.nextafter(np.float32(bound), np.float32(direction)))
    return float(np.nextafter(bound, direction * np.inf))
