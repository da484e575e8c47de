"""What is asked of the own Envoy's admin endpoint, on its unix socket."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


async def post(path: str, target: str) -> bool:
    """Posts to `target` at the admin socket `path`. Says whether Envoy did it; never raises."""
    request = f"POST {target} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(request.encode())
            answer = await reader.readline()
            writer.close()
    except (OSError, TimeoutError) as err:
        log.warning("Envoy's admin socket %s does not answer %s: %s", path, target, err)
        return False
    is_done = b" 200 " in answer
    if not is_done:
        log.warning("Envoy refused %s: %s", target, answer.decode("latin-1").strip())
    return is_done
