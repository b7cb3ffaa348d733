# SPDX-License-Identifier: Apache-2.0
"""Reads our docstrings for the reference: `Example:`, lines about several arguments, comments beside fields."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function, Object

EXAMPLE = re.compile(r"^Example\b.*?::?$", re.MULTILINE)
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+):((?: .*|\n {8}.*)(?:\n {8}.*)*)$", re.MULTILINE)
QUOTE = re.compile(r"^( {4}\w+: )>", re.MULTILINE)  # "> 0" is no quotation
COMMENT = re.compile(r"^.*?\s{2}# (.*)$")


class OurDocstrings(Extension):
    """An extension of griffe, which mkdocstrings uses."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)
            names = arguments(obj)
            value = SEVERAL.sub(lambda match: one_by_one(match, names), obj.docstring.value)
            obj.docstring.value = QUOTE.sub(r"\1\>", value)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Make a section `Attributes:` of the comments beside the fields of a record."""
        if cls.docstring is None or re.search(r"^(Args|Attributes):$", cls.docstring.value, re.MULTILINE):
            return
        fields = [f"    {field.name}: {comment(field)}" for field in cls.members.values() if is_field(field)]
        if fields:
            section = "\n\nAttributes:\n" + "\n".join(fields)
            words, mark, example = cls.docstring.value.partition("\n\nExamples:")
            cls.docstring = Docstring(words + section + mark + example, parent=cls, lineno=cls.docstring.lineno)


def arguments(obj: Object) -> set[str]:
    function = obj.members.get("__init__") if isinstance(obj, Class) else obj
    return {argument.name for argument in function.parameters} if isinstance(function, Function) else set()


def one_by_one(match: re.Match[str], names: set[str]) -> str:
    """A row for each of the arguments or errors that one line describes, so that each has its type and default."""
    several = match[1].split(", ")
    if all(name.endswith("Error") for name in several):
        names = set(several)
    return "\n".join(f"    {name}:{match[2]}" for name in several) if names.issuperset(several) else match[0]


def is_field(field: Any) -> bool:
    return isinstance(field, Attribute) and field.annotation is not None and field.is_public


def comment(field: Attribute) -> str:
    match = COMMENT.match(field.lines[0]) if field.lines else None
    return match[1].replace("*", r"\*") if match else "&nbsp;"
