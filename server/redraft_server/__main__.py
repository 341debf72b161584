"""`redraft-server`: read the settings, load the models, serve until told to end.

Exit status: 0 after a drain, 2 for a wrong setting, 3 for a model that cannot be served, 130 for Ctrl-C while
loading. Each problem is one line on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import prometheus_client
import uvloop

from redraft.errors import ConfigError, RedraftError
from redraft.telemetry.logging import configure_logging
from redraft_server.config import ModelConfig
from redraft_server.garbage import settle
from redraft_server.settings import PROGRAM, ConfigErrors, load_config, to_yaml

EXIT_CONFIG = 2
EXIT_MODEL = 3
EXIT_INTERRUPTED = 130

_log = logging.getLogger("redraft.app")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    try:
        invocation = load_config(sys.argv[1:] if argv is None else argv)
    except ConfigErrors as error:
        return _fail(EXIT_CONFIG, *error.problems)
    config = invocation.config
    if invocation.print_config:
        sys.stdout.write(to_yaml(config))
        return 0
    _tame_threads(config.model)
    configure_logging(config.logging.format, config.logging.level)
    if config.logging.format == "json":
        _speak_json()
    # a second series for every counter is of no use here
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    # Only now: the application may import torch, which reads the thread settings once.
    from redraft_server import app as application

    try:
        app = application.build(config)
        settle()
        uvloop.run(application.serve(app, _announce))
    except ConfigError as error:
        return _fail(EXIT_CONFIG, str(error))
    except RedraftError as error:
        return _fail(EXIT_MODEL, str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _tame_threads(model: ModelConfig) -> None:
    """OpenMP threads that spin while idle would take the cores from the event loop."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if model.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(model.threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    # grpc's own complaint about a taken port would stand beside our line about it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _speak_json() -> None:
    """Have libraries log what they would print: a line that is no JSON is lost on a collector, or worse."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def _announce(app: object) -> None:
    from redraft_server.app import App
    from redraft_server.banner import exposure_notice, show_banner, traffic_log_notice

    assert isinstance(app, App)
    if app.config.logging.format == "text":
        show_banner(app)
    _log.info("serving", extra={"address": app.address, "model": app.engine.info.model})
    notice = traffic_log_notice(app.config)
    if notice is not None:
        _log.warning("the traffic log is %s", notice)
    exposed = exposure_notice(app.config)
    if exposed is not None:
        _log.warning("%s", exposed)


def _fail(status: int, *problems: str) -> int:
    for problem in problems:
        sys.stderr.write(f"{PROGRAM}: {' '.join(problem.split())}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
