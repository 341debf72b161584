"""moto's S3 on a free loopback port, which is the first line it prints. Run by the Python of build/tools/s3.

S3 checks a condition and writes in one go; moto does the one after the other, so here requests wait for each other. And
a request whose body was cut off is dropped, as S3 does, whatever part of it had come.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """Reads a request whole, then lets the application have it alone: a client that stalls holds up nobody."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        stream, length = environ["wsgi.input"], environ.get("CONTENT_LENGTH")
        body = stream.read(int(length)) if length else b""
        if environ.get("wsgi.input_terminated") and not length:
            body = stream.read()
        if length and len(body) < int(length):
            raise ConnectionAbortedError("the body was cut off")
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            return list(self._application(environ, start_response))


def main() -> None:
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
