"""The hash of texts: how a shard, and a stream that is read again, know that the texts are those of before.

The one decision: every text stands behind its length, so that no two lists of texts give the same bytes.
"""

import hashlib
from collections.abc import Iterable

Text = str | None


class TextHash:
    """sha256 over texts, each behind its length in bytes (8, little-endian); stops after `samples` texts."""

    def __init__(self, samples: int | None = None) -> None:
        """Start with no text added."""
        self._hash, self._samples, self._added = hashlib.sha256(), samples, 0

    def add(self, text: Text) -> None:
        """Add one text; None counts as empty."""
        if self._added != self._samples:
            data = (text or "").encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)
            self._added += 1

    @classmethod
    def of(cls, texts: Iterable[Text]) -> "TextHash":
        """Return the hash of all these texts."""
        total = cls()
        for text in texts:
            total.add(text)
        return total

    def digest(self) -> bytes:
        """Return the hash of what was added, 32 bytes."""
        return self._hash.digest()

    def hexdigest(self) -> str:
        """Return the hash of what was added."""
        return self._hash.hexdigest()


def hash_texts(texts: Iterable[Text]) -> str:
    """Return the hash that a shard keeps of its texts."""
    return TextHash.of(texts).hexdigest()
