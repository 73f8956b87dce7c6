"""An HTTP/2 client for misbehaviour: it does not read replies, or sends half a request."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Self

from google.protobuf.message import Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings

SERVICE = "chathistory.v1.ChatHistoryService"
_PIECE = 16 * 1024


class RawConnection:
    """One HTTP/2 connection, as an async context manager."""

    def __init__(self, address: str, *, window_bytes: int = 0) -> None:
        """Take the server's address, and how many bytes of each reply the client reads."""
        self.host, _, self.port = address.rpartition(":")
        self.statuses: dict[int, str] = {}
        """Status of each finished call, as a number in decimal, by stream."""
        self.n_bytes_received = 0
        self.sent: Counter[int] = Counter()
        """Bytes of the requests, by stream."""
        self.closed = asyncio.Event()
        """Set when the server has closed the connection."""
        self.local_name = ""
        self._changed = asyncio.Event()
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.local_settings = Settings(
            client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window_bytes}
        )

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self.host, int(self.port))
        name = self._writer.get_extra_info("sockname")
        self.local_name = f"ipv4:{name[0]}:{name[1]}"
        self._h2.initiate_connection()
        self._flush()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._writer.transport.abort()

    async def call(self, method: str, request: Message, *, timeout: str | None = None) -> int:
        """Send a complete request, and return its stream."""
        stream = self.start_call(method, timeout=timeout)
        await self.send(stream, self.frame(request))
        self.end(stream)
        return stream

    @staticmethod
    def frame(request: Message) -> bytes:
        """Return a request as gRPC sends it."""
        data = request.SerializeToString()
        return b"\0" + struct.pack(">I", len(data)) + data

    def start_call(self, method: str, *, timeout: str | None = None) -> int:
        """Send the headers of a call only, and return its stream.

        Args:
            method: Name of the RPC.
            timeout: Its timeout as gRPC writes it, such as `20m` for 20 milliseconds.
        """
        stream = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/{method}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if timeout is not None:
            headers.append(("grpc-timeout", timeout))
        self._h2.send_headers(stream, headers)
        self._flush()
        return stream

    async def send(self, stream: int, data: bytes) -> None:
        """Send data on a stream as fast as the server's windows allow."""
        while data:
            while not (room := min(self.window(stream), _PIECE, len(data))):
                self._changed.clear()
                await self._changed.wait()
            self._h2.send_data(stream, data[:room])
            self.sent[stream] += room
            data = data[room:]
            self._flush()
            await asyncio.sleep(0)

    def end(self, stream: int) -> None:
        """End a request."""
        self._h2.end_stream(stream)
        self._flush()

    def window(self, stream: int) -> int:
        """Return how many more bytes the server lets the client send on a stream."""
        return self._h2.local_flow_control_window(stream)

    def reset(self, stream: int) -> None:
        """Cancel a call."""
        self._h2.reset_stream(stream, 8)
        self._flush()

    async def wait_for(self, count: int) -> None:
        """Wait until this number of calls have a status."""
        while len(self.statuses) < count:
            self._changed.clear()
            await self._changed.wait()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    async def _read(self) -> None:
        with suppress(ConnectionError):
            while data := await self._reader.read(1 << 20):
                for event in self._h2.receive_data(data):
                    self._handle(event)
                self._flush()
                self._changed.set()
        self.closed.set()

    def _handle(self, event: object) -> None:
        if isinstance(event, DataReceived):
            self.n_bytes_received += len(event.data)
        elif isinstance(event, ResponseReceived | TrailersReceived):
            headers = {str(name): str(value) for name, value in event.headers or []}
            if "grpc-status" in headers:
                self.statuses[event.stream_id] = headers["grpc-status"]
        elif isinstance(event, StreamReset):
            self.statuses.setdefault(event.stream_id, f"reset {event.error_code}")
        elif isinstance(event, ConnectionTerminated):
            self.statuses.setdefault(0, f"goaway {event.error_code}")
