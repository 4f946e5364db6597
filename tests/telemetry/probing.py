"""A probe that asks a port of this machine."""

import socket

import anyio

from tests.receiver import PATIENCE


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


async def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and the body of an answer."""
    with anyio.fail_after(PATIENCE):
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(
                f"{method} {path} HTTP/1.0\r\nHost: probe\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b""
            while True:
                try:
                    answer += await stream.receive()
                except anyio.EndOfStream:
                    break
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body
