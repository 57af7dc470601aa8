"""The mini-language of config strings: "crop(4) | flip | cutout(8, fill=0.5)".

A spec is a chain of calls with literal arguments. It names augmentations, models, optimizers and
schedules, so that one string on the command line chooses a function and its arguments.
"""

import ast
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_origin

import jax
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.config.names import PATTERN, find

_MAX_FLOAT = float(np.finfo(np.float32).max)


class Call(NamedTuple):
    """One call of a spec: `name(*args, **kwargs)`, where name may be "module:function"."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parse(text: str | list[Call], kind: str = "") -> list[Call]:
    """Parses a spec into its calls; "" is the empty chain.

    A list of calls is returned unchanged, so that their arguments may be traced.

    Args:
        text: the spec, such as "crop(4)|flip".
        kind: the config key of the spec, for messages.

    Raises:
        UserError: the text is not a chain of calls with literal arguments.
    """
    if not isinstance(text, str):
        return text
    if not text.strip():
        return []
    own: list[str] = []  # names "module:function", which Python's grammar lacks

    def by_number(match):
        if match[1] is None:  # a text in quotes
            return match[0]
        own.append(match[1])
        return f"{_OWN}{len(own) - 1}"

    source = re.sub(rf"'[^']*'|\"[^\"]*\"|({PATTERN})", by_number, text.strip())
    try:
        calls = _calls(ast.parse(source, mode="eval").body)
    # TypeError: an unhashable key of a dict; the last two: parentheses without end.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{kind and f'{kind} '}{text!r} is not understood: write names with literal arguments, "
            "joined by |, such as 'crop(4)|flip'."
        ) from error
    return [
        call._replace(name=own[int(call.name[len(_OWN) :])]) if call.name.startswith(_OWN) else call
        for call in calls
    ]


_OWN = "_own_"


def _calls(node: ast.expr) -> list[Call]:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _calls(left) + _calls(right)
        case ast.Name(id=name):
            return [Call(name, (), {})]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {k.arg: ast.literal_eval(k.value) for k in keywords if k.arg is not None}
            if len(named) != len(keywords):
                raise ValueError("** is not a literal argument")
            return [Call(name, tuple(map(ast.literal_eval, args)), named)]
    raise ValueError(ast.unparse(node))


def build(
    text: str | list[Call], table: Mapping[str, Callable], kind: str, **context: Any
) -> list[Any]:
    """Calls the functions of `table` that a spec names, in the spec's order.

    Args:
        text: the spec, such as "crop(4)|flip".
        table: the functions that the spec may name.
        kind: the config key of the spec, for messages.
        context: further arguments, given to each function that has a parameter of that name. The
            spec cannot set them, and messages do not show them.

    Raises:
        UserError: an unknown name or bad arguments; the message lists the known names.
    """
    return [_apply(call, table, kind, context) for call in parse(text, kind)]


def build_one(
    text: str | list[Call], table: Mapping[str, Callable], kind: str, **context: Any
) -> Any:
    """Calls the one function that a spec names; see `build`."""
    built = build(text, table, kind, **context)
    if len(built) != 1:
        raise UserError(f"{kind} {text!r}: expected one of {', '.join(sorted(table))}.")
    return built[0]


def require(condition: Callable[[], bool], message: str) -> None:
    """Raises ValueError with the message unless an argument of a spec fulfils the condition.

    A swept number is traced and passes: each of its values has been checked on its own.
    """
    try:
        holds = bool(condition())
    except jax.errors.TracerBoolConversionError:
        return
    if not holds:
        raise ValueError(message)


def _apply(call: Call, table: Mapping[str, Callable], kind: str, context: dict[str, Any]) -> Any:
    function = find(call.name, table, kind)
    signature = inspect.signature(function)
    shown = signature.replace(
        parameters=[p for p in signature.parameters.values() if p.name not in context],
        return_annotation=inspect.Signature.empty,
    )
    try:
        given = shown.bind(*call.args, **call.kwargs).arguments
        for name, value in given.items():
            _check_argument(shown.parameters[name], value)
        bound = inspect.BoundArguments(signature, {**given, **context})
        return function(*bound.args, **bound.kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{kind} {call.name!r}: {error}. Write it as {call.name}{shown}."
        ) from error


def _check_argument(parameter: inspect.Parameter, value: Any) -> None:
    """Raises ValueError where a literal is not of the type in the parameter's annotation."""
    annotation = parameter.annotation
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return
    if annotation is not parameter.empty and not _fits(value, annotation):
        raise ValueError(
            f"{parameter.name}={value!r} must be {inspect.formatannotation(annotation)}, with "
            "numbers of at most 32 bits"
        )


def _fits(value: Any, annotation: Any) -> bool:
    """Returns whether a literal is of a type; an int is also a float, a swept number is both."""
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, one) for one in get_args(annotation))
    if get_origin(annotation) is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = get_args(annotation)
        if kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if annotation in (int, float):
        if isinstance(value, jax.Array):
            return True
        kind, limit = (int, 2**31 - 1) if annotation is int else (int | float, _MAX_FLOAT)
        return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= limit
    return isinstance(value, annotation) if isinstance(annotation, type) else True
