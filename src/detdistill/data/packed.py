"""Many byte strings as one: what a column of names or masks is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


class Packed(Sequence[bytes]):
    """A read-only sequence of byte strings in one blob, with no Python object for each.

    A forked process reads it without writing to its pages, as counting references to objects would.

    Attributes:
        blob: the bytes of all strings, and perhaps of others.
        starts_N, ends_N: int64, the place of each string in the blob.
    """

    __slots__ = ("blob", "ends_N", "starts_N")

    def __init__(self, blob: bytes, starts_N: NDArray[np.int64], ends_N: NDArray[np.int64]) -> None:
        self.blob = blob
        self.starts_N = starts_N
        self.ends_N = ends_N

    @classmethod
    def pack(cls, strings: Sequence[bytes]) -> Packed:
        """The strings in one blob."""
        lengths_N = np.fromiter(map(len, strings), np.int64, len(strings))
        ends_N = np.cumsum(lengths_N)
        return cls(b"".join(strings), ends_N - lengths_N, ends_N)

    @classmethod
    def pack_texts(cls, texts: Iterable[str]) -> Packed:
        """Texts in one blob; file names may have characters that no encoding has (``surrogatepass``)."""
        return cls.pack([text.encode("utf-8", "surrogatepass") for text in texts])

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, place: int) -> bytes:  # type: ignore[override]
        return self.blob[self.starts_N[place] : self.ends_N[place]]

    def __iter__(self) -> Iterator[bytes]:
        for start, end in zip(self.starts_N.tolist(), self.ends_N.tolist(), strict=True):
            yield self.blob[start:end]

    def text(self, place: int) -> str:
        """One string of :meth:`pack_texts`."""
        return self[place].decode("utf-8", "surrogatepass")

    def texts(self) -> Iterator[str]:
        """All strings of :meth:`pack_texts`."""
        return (string.decode("utf-8", "surrogatepass") for string in self)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """The bytes of each string."""
        return self.ends_N - self.starts_N

    def take(self, places_M: NDArray[np.int64] | NDArray[np.bool_]) -> Packed:
        """The strings at these places; the blob is shared, unless more than half of it would be idle."""
        taken = Packed(self.blob, self.starts_N[places_M], self.ends_N[places_M])
        return taken if 2 * taken.lengths_N.sum() >= len(self.blob) else Packed.pack(list(taken))
