"""How options of some types are written on the command line, where tyro's own way is not ours."""

import types
import typing
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REGISTRY = ConstructorRegistry()
# For an option that also stands alone, `--retry-failed` and `--retry-failed Timeout,Crash`: () and a tuple; else None.
OPTIONAL_LIST = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[A,B,...]",
    instance_from_str=lambda texts: tuple(word for text in texts for word in text.split(",") if word),
    is_instance=lambda value: value is None or isinstance(value, tuple),
    str_from_instance=lambda value: ["none"] if value is None else [",".join(value)],
)


@REGISTRY.primitive_rule
def _comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Tuples are written `a,b,c`, in one argument: `--tasks color,digit`, `--video.crop .3,.5,.7,.9`.

    A word may stand in the place of one, such as `--video.crop face`.
    """
    kind, optional, words = info.type, False, tuple[str, ...]()
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        words = tuple(word for a in inner for word in typing.get_args(a) if typing.get_origin(a) is typing.Literal)
        kind, optional = inner[0], len(inner) == 1 or bool(words)
    if typing.get_origin(kind) is not tuple:
        return None
    elements = typing.get_args(kind)
    length = None if elements[-1] is Ellipsis else len(elements)

    def construct(texts: list[str]) -> tuple[Any, ...] | str | None:
        if texts[0] in words:
            return texts[0]
        if optional and texts[0].lower() == "none":
            return None
        values = tuple(elements[0](text.strip()) for text in texts[0].split(",") if text.strip())
        if length is not None and len(values) != length:
            raise ValueError(f"expected {length} values separated by commas, got {texts[0]!r}")
        return values

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([",".join("ABCDEFG"[:length]) if length else "A,B,...", *words]),
        instance_from_str=construct,
        is_instance=lambda value: value is None or isinstance(value, tuple) or value in words,
        str_from_instance=lambda value: [
            "none" if value is None else value if value in words else ",".join(map(str, value))
        ],
    )


SWITCH = {"default": None, "none": None, "yes": True, "true": True, "no": False, "false": False}


@REGISTRY.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | None] | None:
    """A choice that may be left to the job: `--stem.motion yes`."""
    if info.type != bool | None:
        return None

    def construct(texts: list[str]) -> bool | None:
        if texts[0].lower() not in SWITCH:
            raise ValueError(f"expected default, yes or no, got {texts[0]!r}")
        return SWITCH[texts[0].lower()]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{default,yes,no}",
        instance_from_str=construct,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [next(word for word, meaning in SWITCH.items() if meaning is value)],
    )
