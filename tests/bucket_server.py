"""A stand-in for Google Cloud Storage on loopback, as a program: `gcp-storage-emulator`, with what TensorStore needs.

    python bucket_server.py BUCKET...     prints its port, then serves empty buckets, in memory

The emulator does not say which generation of an object it delivers, so that nobody could see that one was replaced.
"""

import sys
import time
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects


def download(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
    """Delivers an object, and says of which generation."""
    objects.download(request, response, storage, *arguments, **options)
    if response.status < 300:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = str(found["generation"])


def main(*names: str) -> None:
    """Serves until the process is ended."""
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler is objects.download:
                handlers[method] = download
    running = server.create_server("127.0.0.1", 0, in_memory=True)
    running.start()
    for name in names:
        buckets.create_bucket(name, running._storage)
    print(running._api._httpd.server_address[1], flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
