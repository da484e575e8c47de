"""What the test service is told: SHOAL_FRONTS_..."""

from __future__ import annotations

from mesh.config import ServiceConfig
from mesh.limits import MESSAGE_BYTES


class FrontsConfig(ServiceConfig):
    instance: str = "fronts-0"
    message_bytes: int = MESSAGE_BYTES
    """Of grpc.aio."""
