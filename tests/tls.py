"""TLS in front of the tests' own servers: the programs in their wheels are built without it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

Address = tuple[str, int] | str  # host and port, or the path of a unix socket


@contextmanager
def tls_in_front_of(server: Address, context: ssl.SSLContext) -> Iterator[int]:
    """Accept TLS on a free port of loopback and hand each connection on to the server in the clear. Yields the port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    front = asyncio.run_coroutine_threadsafe(_listen(server, context), loop).result(30)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_end(front), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


async def _listen(server: Address, context: ssl.SSLContext) -> asyncio.Server:
    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened = asyncio.open_unix_connection(server) if isinstance(server, str) else asyncio.open_connection(*server)
        server_reader, server_writer = await opened
        await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))

    return await asyncio.start_server(hand_on, "127.0.0.1", 0, ssl=context)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.CancelledError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def _end(front: asyncio.Server) -> None:
    front.close()
    others: Sequence[asyncio.Task[None]] = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
