"""`python -m services.store`: runs the store service until SIGTERM."""

from mesh.process import uncollected_imports  # noqa: F401 - before the others.
from mesh.process.main import main
from services.store.app import run
from services.store.config import StoreConfig

if __name__ == "__main__":
    main("store", StoreConfig, run)
