"""A real S3 server for tests, benchmarks and the operations story: moto, from `make tools`, in memory."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import s3fs

REGION = "us-west-2"
"""Any but us-east-1, which refuses the LocationConstraint that s3fs sends."""
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
_APP = Path(__file__).with_name("s3_app.py")


class S3Process:
    """Starts on enter, ends on exit; what it held is gone then.

    Args:
        python: of build/tools/s3.
        unchecked_requests: how many requests are let through without a look at their credentials. Default: all.
    """

    def __init__(self, python: Path, *, unchecked_requests: int | None = None) -> None:
        self._python = python
        self._unchecked = unchecked_requests
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.port = 0

    def __enter__(self) -> Self:
        environment = {} if self._unchecked is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(self._unchecked)}
        self._process = subprocess.Popen(
            [str(self._python), str(_APP)], env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the S3 server did not start:\n{self._log.read()[-4000:]}")
        self.port = int(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def admin(self) -> Any:
        """An s3fs file system of its own, straight to the server, that remembers nothing."""
        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            client_kwargs={"region_name": REGION},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def make_bucket(self, name: str) -> None:
        """A new, empty bucket."""
        self.admin().mkdir(name, region_name=REGION)


def environment(port: int) -> Mapping[str, str]:
    """What a program needs to use the server, or what stands before it, at a port; nothing of the user's own."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
