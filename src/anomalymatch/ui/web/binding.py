"""Where the server listens, and what to type into a browser to get there."""

import errno
import os
import socket
from urllib.parse import urlencode

from anomalymatch.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to `host` and `port`.

    Raises:
        ConfigError: if that is impossible, with the reason.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"{port} is no port: ports go from 1 to 65,535, and 0 takes any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host} is no address of this machine: {error}") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # start again at once after a crash; elsewhere it would share a port that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # two servers that start at once must not both believe to have the port
    except OSError as error:
        listening.close()
        raise ConfigError(_refused(error, host, port)) from None
    return listening


def address_of(host: str, address: str, port: int, token: str | None) -> str:
    """What to type into a browser."""
    name = socket.gethostname() if address in ("0.0.0.0", "::") else host
    query = "" if token is None else "?" + urlencode({"token": token})
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/{query}"


def _refused(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: choose another one, or port 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is not for everyone: choose one from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: choose 127.0.0.1, or 0.0.0.0 for all that it has"
    return f"nothing can listen on port {port} of {host}: {error.strerror}"
