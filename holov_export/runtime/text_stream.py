"""Tokens become text while they arrive: no half characters, no lost spaces, and stop strings split over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"


class TextStream:
    """Turns ids into text piece by piece; the pieces joined are the text.

    A piece ends where a character ends: bytes of an unfinished one are held back. Text that could be the beginning of a
    stop string is held back too, and once a stop string is complete nothing after its beginning is ever given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """`tokenizer` is a tokenizers.Tokenizer; `stop` are non-empty strings."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Text is decoded from `_start`, a piece behind `_read`: a tokenizer drops the space before its first word
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; often empty. After `stopped` always empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        known, text = self._decoded(self._start, self._read), self._decoded(self._start, len(self._ids))
        if len(text) <= len(known) or text.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._released(text[len(known) :])

    def finish(self) -> str:
        """What was held back: nothing more will come."""
        if self.stopped:
            return ""
        known, text = self._decoded(self._start, self._read), self._decoded(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        piece = self._released(text[len(known) :])
        held, self._held = self._held, ""
        return piece + held

    def _decoded(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _released(self, piece: str) -> str:
        """Add `piece` to what is held back and give out what can no longer belong to a stop string."""
        text = self._held + piece
        hits = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
