"""A connection that writes HTTP/2 frames as an attacker would, and reads replies or does not.

gRPC's own clients read their replies, end their requests and respect limits. The headers are
written as literals without indexing, the simplest form of HPACK (RFC 7541, section 6.2.2).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from benchmarks.hostile.matrix import SERVICE

_ATTACKER_ADDRESS = "127.0.0.2"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_MAX_FRAME_BYTES = 16_384
_READ_BYTES = 65_536
_FRAME_HEADER_BYTES = 9
_DEFAULT_WINDOW_BYTES = 65_535
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4
_LENGTH_PREFIX = 0x7F
CANCEL = 8
"""The error code of a reset by the caller."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def grpc_message(body: bytes, *, is_compressed: bool = False, length: int | None = None) -> bytes:
    """Return a message with gRPC's prefix; `length` overrides the stated length."""
    stated = len(body) if length is None else length
    return struct.pack(">BI", is_compressed, stated) + body


def header_block(fields: Sequence[tuple[str, str]]) -> bytes:
    """Return header fields as literals."""
    return b"".join(b"\0" + _literal(name) + _literal(value) for name, value in fields)


def _literal(text: str) -> bytes:
    data = text.encode()
    if len(data) < _LENGTH_PREFIX:
        return bytes([len(data)]) + data
    return bytes([_LENGTH_PREFIX]) + varint(len(data) - _LENGTH_PREFIX) + data


def varint(number: int) -> bytes:
    """Return a number in groups of seven bits, as HPACK and protobuf write it."""
    data = bytearray()
    while number >> 7:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


async def open_connection(
    host: str, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect from an address of the attacker's own.

    The service limits the connections of each address, and closes the newest beyond that: with one
    address for all users, the attack would end connections of the others.
    """
    return await asyncio.open_connection(host, port, local_addr=(_ATTACKER_ADDRESS, 0))


class Http2Connection:
    """One connection to the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_stream = 1
        self._reading: asyncio.Task[None] | None = None
        self._received = bytearray()
        self.is_closed = False
        """Whether the service has closed the connection; known only while it is read."""
        self.in_flight = 0
        """Calls that the service has not ended; counted only while the connection is read."""
        self.window_bytes = _DEFAULT_WINDOW_BYTES
        """Bytes of requests that the service still accepts on this connection."""

    @classmethod
    async def open(cls, address: str, *, window_bytes: int, reads: bool) -> Self:
        """Connect.

        Args:
            address: Where the service listens.
            window_bytes: Bytes of a reply that the service may send before it must wait.
            reads: Whether to read, and discard, what the service sends.
        """
        host, port = address.rsplit(":", 1)
        connection = cls(*await open_connection(host, int(port)))
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window_bytes)
        connection.send(_PREFACE + frame(SETTINGS, 0, 0, settings))
        if reads:
            connection._reading = asyncio.create_task(connection._discard())
        # The service's settings arrive first on each connection; they need not be read for this.
        await asyncio.sleep(0.05)
        connection.send(frame(SETTINGS, ACK, 0))
        return connection

    async def _discard(self) -> None:
        with suppress(OSError):
            while data := await self._reader.read(_READ_BYTES):
                self._received += data
                self._handle_frames()
        self.is_closed = True

    def _handle_frames(self) -> None:
        """Handle the complete frames among the received bytes, and remove them."""
        received = self._received
        at = 0
        while len(received) >= at + _FRAME_HEADER_BYTES:
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", received, at)
            end = at + _FRAME_HEADER_BYTES + (high << 16 | low)
            if len(received) < end:
                break
            if kind == RST_STREAM or (kind in {DATA, HEADERS} and flags & END_STREAM):
                self.in_flight -= 1
            elif kind == WINDOW_UPDATE and stream == 0:
                [increment] = struct.unpack_from(">I", received, end - 4)
                self.window_bytes += increment
            at = end
        del received[:at]

    def send(self, data: bytes) -> None:
        """Write frames, unless the connection is closed."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the kernel has taken what was written."""
        with suppress(OSError):
            await self._writer.drain()

    def start_call(
        self,
        rpc: str,
        metadata: Sequence[tuple[str, str]],
        message: bytes | None,
        *,
        extra: Sequence[tuple[str, str]] = (),
    ) -> int:
        """Send the headers and, unless it is None, the message, and end the request.

        An empty message ends the request without one.

        Returns:
            The number of the stream.
        """
        stream = self._next_stream
        self._next_stream += 2
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE.full_name}/{rpc}"),
            (":authority", "hostile"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
            *extra,
        ]
        self.in_flight += 1
        self._send_headers(stream, header_block(fields))
        if message is not None:
            self.window_bytes -= len(message)
            for start in range(0, len(message) or 1, _MAX_FRAME_BYTES):
                part = message[start : start + _MAX_FRAME_BYTES]
                is_last = start + len(part) == len(message)
                self.send(frame(DATA, END_STREAM if is_last else 0, stream, part))
        return stream

    def _send_headers(self, stream: int, block: bytes) -> None:
        parts = [
            block[start : start + _MAX_FRAME_BYTES]
            for start in range(0, len(block), _MAX_FRAME_BYTES)
        ]
        for index, part in enumerate(parts):
            flags = END_HEADERS if index == len(parts) - 1 else 0
            self.send(frame(CONTINUATION if index else HEADERS, flags, stream, part))

    def reset(self, stream: int) -> None:
        """Cancel a call."""
        self.send(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    async def close(self) -> None:
        """Close the connection."""
        if self._reading is not None:
            self._reading.cancel()
        self._writer.transport.abort()
