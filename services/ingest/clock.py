"""Clock of jobs: mesh.mongo_clock, under the name by which ingest knows it."""

from mesh.mongo_clock import SYNC_S, Clock, DatabaseClock, earliest, latest, milliseconds, utc_now

__all__ = ["SYNC_S", "Clock", "DatabaseClock", "earliest", "latest", "milliseconds", "utc_now"]
