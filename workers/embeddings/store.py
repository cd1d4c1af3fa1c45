"""The store of kept embeddings: a folder or an S3 prefix, with the bytes of each embedding at its address."""

from __future__ import annotations

from collections.abc import Iterator

from db.settings import Settings
from workers.embeddings.address import EmbeddingError, EmbeddingFault, is_address
from workers.errors import AssetError, ErrorKind, SourceError, TransientError, redact
from workers.storage.objects import open_objects
from workers.storage.place import Objects, StoredObject

# The largest known embedding is SAM-HQ's of vit_h: 12 MiB in fp16.
MOST_BYTES = 64 * 1024 * 1024


class EmbeddingStore:
    """Reads, writes and deletes embeddings by address. Threads may share it.

    Every call raises EmbeddingError, and no other error: absent, damaged (too large), or away.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def read(self, address: str) -> bytes:
        _require_address(address)
        try:
            return self._objects.read(address, MOST_BYTES)
        except AssetError as error:
            faults = {ErrorKind.NOT_FOUND: EmbeddingFault.ABSENT, ErrorKind.TOO_LARGE: EmbeddingFault.DAMAGED}
            raise EmbeddingError(faults.get(error.kind, EmbeddingFault.AWAY), redact(str(error))) from error
        except (TransientError, SourceError) as error:
            raise _away(error) from error

    def write(self, address: str, content: bytes) -> None:
        """Write the bytes as a whole: a reader never sees a part of them."""
        _require_address(address)
        try:
            self._objects.write(address, content)
        except (AssetError, TransientError, SourceError) as error:
            raise _away(error) from error

    def delete(self, name: str) -> None:
        """Delete what `stored` listed, or an address. It is no error when it is gone."""
        try:
            self._objects.delete(name)
        except (AssetError, TransientError, SourceError) as error:
            raise _away(error) from error

    def stored(self) -> Iterator[StoredObject]:
        """Everything in the store: embeddings by address, and what killed writers left under other names."""
        try:
            yield from self._objects.stored()
        except (AssetError, TransientError, SourceError) as error:
            raise _away(error) from error


def open_store(settings: Settings) -> EmbeddingStore | None:
    """The store that MASKFLEET_EMBEDDINGS names, None when it is not set. Raises SourceError for a wrong address."""
    return None if settings.embeddings is None else EmbeddingStore(open_objects(settings.embeddings))


def _require_address(address: str) -> None:
    if not is_address(address):
        raise EmbeddingError(EmbeddingFault.FOREIGN, f"{address[:80]!r} is no address of an embedding")


def _away(error: Exception) -> EmbeddingError:
    return EmbeddingError(EmbeddingFault.AWAY, redact(str(error)))
