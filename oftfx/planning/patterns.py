"""Regular expressions that came with a file: such as can take for ever are refused, for nobody can stop one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_MOST = 6
"""Repetitions in a row; each multiplies the ways in which a path can be parted among them by its length."""
_LONGEST = 20_000


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression.

    Raises:
        re.error: it is none, or it could take for ever: it repeats what repeats or has several ways itself, as
            ``(a+)+`` does, or has more than six repetitions in a row.
    """
    if len(pattern) > _LONGEST:
        raise re.error(f"it has {len(pattern):,} characters, expected {_LONGEST:,} at most")
    try:
        found = re.compile(pattern)
        parser: Any = getattr(re, "_parser", None)
        if parser is not None and _repetitions(parser.parse(pattern)) > _MOST:
            raise re.error(f"it has more than {_MOST} repetitions in a row, which can take for ever")
    except (RecursionError, OverflowError) as error:
        raise re.error(f"it is too deep or too large: {error}") from None
    return found


def _repetitions(parts: Iterable[Any], inside: bool = False) -> int:
    """How many follow each other at most; one inside another is as many as there are."""
    count = 0
    for operator, argument in parts:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            many = most > _MOST
            if inside and most > 1:
                raise re.error("it repeats what repeats itself, as in '(a+)+', which can take for ever")
            count += many + _repetitions(body, inside or many)
        elif name == "BRANCH":
            if inside:
                raise re.error("it repeats a choice, as in '(a|b)*', which can take for ever; write '[ab]*'")
            count += max(_repetitions(part, inside) for part in argument[1])
        elif name == "SUBPATTERN":
            count += _repetitions(argument[-1], inside)
        elif name in ("ASSERT", "ASSERT_NOT"):
            count += _repetitions(argument[1], inside)
        elif name == "ATOMIC_GROUP":
            count += _repetitions(argument, inside)
        elif name == "GROUPREF_EXISTS":
            count += max(_repetitions(part, inside) for part in argument[1:] if part is not None)
    return count
