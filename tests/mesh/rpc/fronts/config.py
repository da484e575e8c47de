"""Configuration of the test service: SHOAL_FRONTS_..."""

from __future__ import annotations

from mesh.process.config import ServiceConfig


class FrontsConfig(ServiceConfig):
    instance: str = "fronts-0"
