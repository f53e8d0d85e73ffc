"""Module paths that a config names: one by one, by their beginnings, by globs or by regular expressions.

A pattern is matched in bounded time, whatever it is: names and beginnings are looked up in sets, of other patterns
there may be `MOST` of at most `LONGEST` characters that repeat nothing more than `REPEATS` times by number (``regex``
writes such repetitions out), and they are matched by ``regex``, which stops after `SECONDS`; all matches together may
take two seconds, and 20 us for each.
"""

import fnmatch
import math
import re
import time
from collections.abc import Iterable
from typing import Any, Literal

from marlin_w4a16.checkpoints.files import CheckpointError

MOST, LONGEST, REPEATS, SECONDS = 1000, 1000, 1000, 0.1
_GRACE, _EACH = 2.0, 2e-5  # seconds
_SPECIAL = frozenset("*?[")
_NUMBERS = re.compile(r"\{(\d*),?(\d*)\}")
Kind = Literal["glob", "re", "transformers"]


class Names:
    """Some patterns, and which paths they match.

    Args:
        patterns: in the order in which they are tried; names go before them all, and beginnings next.
        kind: ``"glob"``: a path is matched with all below it; ``"re"``: regular expressions where they begin with
            ``re:``, else exact names; ``"transformers"``: regular expressions, or how paths end.
        where: what errors call them.

    Raises:
        CheckpointError: a pattern is no regular expression, or there are more, or longer ones, than are matched.
    """

    def __init__(self, patterns: Iterable[str], kind: Kind, where: str) -> None:
        self._where, self._kind, self._spent, self._matches = where, kind, 0.0, 0
        self._globs = kind == "glob"
        self._names, self._starts, odd = dict[str, str](), dict[str, str](), list[str]()
        for pattern in dict.fromkeys(patterns):
            plain = pattern.removesuffix("*") if self._globs else pattern
            if _SPECIAL & set(plain) if self._globs else pattern.startswith("re:") or kind == "transformers":
                odd.append(pattern)
            elif plain == pattern:
                self._names[pattern] = pattern
            else:
                self._starts[plain] = pattern
        self._lengths = sorted({len(start) for start in self._starts})
        if len(odd) > MOST:
            raise CheckpointError(f"{where}: found {len(odd)} patterns, expected at most {MOST} beside plain names")
        self._odd = [(pattern, self._compiled(pattern)) for pattern in odd]

    def exact(self, path: str) -> str | None:
        """The pattern that is this path."""
        return self._names.get(path)

    def find(self, path: str) -> str | None:
        """The first pattern that matches a path."""
        return self._named(path) or self._started(path) or self._matched(path)

    def _named(self, path: str) -> str | None:
        while path not in self._names:
            path = path.rpartition(".")[0] if self._globs else ""
            if not path:
                return None
        return path

    def _started(self, path: str) -> str | None:
        starts = (path[:length] for length in self._lengths if length <= len(path))
        return next((self._starts[start] for start in starts if start in self._starts), None)

    def _matched(self, path: str) -> str | None:
        for pattern, compiled in self._odd:
            began = time.monotonic()
            try:
                found = compiled.match(path, timeout=SECONDS)
            except TimeoutError:
                raise self._slow(pattern, path) from None
            self._spent, self._matches = self._spent + time.monotonic() - began, self._matches + 1
            if found is not None or (self._kind == "transformers" and path.endswith(pattern)):
                return pattern
            if self._spent > _GRACE + _EACH * self._matches:
                raise self._slow(pattern, path)
        return None

    def _compiled(self, pattern: str) -> Any:
        import regex

        if len(pattern) > LONGEST:
            found = f"a pattern of {len(pattern)} characters ({pattern[:40]!r}...)"
            raise CheckpointError(f"{self._where}: found {found}, expected at most {LONGEST}")
        plain = fnmatch.translate(pattern) if self._globs else pattern.removeprefix("re:")
        repeats = (max(int(number[:9] or 1) for number in pair) for pair in _NUMBERS.findall("".join(plain.split())))
        if not self._globs and (times := math.prod(max(1, number) for number in repeats)) > REPEATS:
            found = f"{pattern!r}, which may repeat a part {times} times"
            raise CheckpointError(f"{self._where}: found {found}, expected at most {REPEATS}")
        try:
            return regex.compile(plain)
        except Exception as error:  # whatever regex raises of what is none, RuntimeError and RecursionError too
            raise CheckpointError(
                f"{self._where}: found {pattern!r}, expected a regular expression: {error}"
            ) from error

    def _slow(self, pattern: str, path: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: found {pattern!r}, which takes too long to match {path!r}, expected a pattern that is "
            "matched at once"
        )
