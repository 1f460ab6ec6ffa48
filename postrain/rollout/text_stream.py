"""The text of an answer as its tokens come."""

from collections.abc import Sequence

from postrain.data.rendering.tokenizer import Tokenizer


class TextWindow:
    """Token ids one at a time -> text: the pieces of ``push`` and ``end`` join to the decoding of all ids, or to that
    before the first of the texts ``stops`` in it. ``stop`` is the one that has come.

    Text is held back while it ends in half a character, or in what may become one of ``stops``. Only the newest ids are
    decoded, those of the last text that was given out and what came since: the cost of a token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.stop = tokenizer, tuple(stops), None
        self._ids: list[int] = []
        self._read = 0  # of these ids, those whose text has been taken
        self._held = ""  # text that has been taken, and not given out

    def push(self, token: int) -> str:
        if self.stop is not None:
            return ""
        self._ids.append(token)
        return self._give(self._take(), last=False)

    def ends_with(self, token: int) -> bool:
        """Takes a token whose text nobody reads; whether one of ``stops`` has come."""
        self.push(token)
        return self.stop is not None

    def end(self) -> str:
        return "" if self.stop is not None else self._give(self._take(last=True), last=True)

    def _take(self, last: bool = False) -> str:
        """The text of the ids that are new. What decoders do at the beginning of a text they do to both."""
        text = self.tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[len(self.tokenizer.decode(self._ids[: self._read])) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return new

    def _give(self, text: str, last: bool) -> str:
        text = self._held + text
        places = [(place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.stop = min(places, key=lambda found: found[0])
            return text[:place]
        sizes = range(0 if last else min(max(map(len, self.stops), default=1) - 1, len(text)), 0, -1)
        held = next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
