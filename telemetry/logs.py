"""Structured logs on standard output: one line an event, for people or for machines.

``configure`` is called once, by the process that serves; modules take ``structlog.get_logger(__name__)``. Lines of
the standard library's loggers (gunicorn, transformers, alembic) go the same way and look the same. Each line that
belongs to a request carries its ``request_id``. Prompts and answers are logged only where the caller has asked
``telemetry.log_prompts``; this module adds none.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from settings import TelemetrySettings

#: Without the values of local variables: they would put prompts into the log, and drawing those of a training step
#: takes minutes in which nothing else of the process runs.
_JSON_TRACEBACKS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def configure(settings: TelemetrySettings) -> None:
    """Set up structlog and the standard library's root logger; calling it again replaces the set-up."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # a second configure() must reach loggers made before it
    )
    handler = _StandardOutput()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_rendering(settings)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("alembic", "httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


class _StandardOutput(logging.StreamHandler[TextIO]):
    """Writes to whatever is standard output at that moment, as the standard library's last resort does for errors.

    A handler that keeps the stream of the moment it was made writes into a closed file once somebody has redirected
    the output for a while.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard output as it is now."""
        return sys.stdout


def _rendering(settings: TelemetrySettings) -> list[Any]:
    tidy = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if settings.log_format == "json":
        return [tidy, _JSON_TRACEBACKS, structlog.processors.JSONRenderer(default=str)]
    plain = structlog.dev.plain_traceback
    return [tidy, structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=plain)]


def bind_request(request_id: str) -> None:
    """From here on, every line of this thread carries ``request_id``; what an earlier request left is dropped."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
