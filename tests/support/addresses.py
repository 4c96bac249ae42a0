"""Where processes of a test find each other."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def free_address() -> Iterator[str]:
    """Process 0 may listen there, and no other program gets the port meanwhile."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        yield f"localhost:{held.getsockname()[1]}"
