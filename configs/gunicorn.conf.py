"""gunicorn settings for one stateful process: for ``python app.py`` and ``gunicorn -c configs/gunicorn.conf.py``.

One worker, many threads; never preload (threads would live only in the arbiter), never ``max_requests`` (it would
kill every kernel), never reload. gunicorn waits the whole ``graceful_timeout`` for open streams and only then calls
``worker_exit``, at the very moment it also sends SIGKILL; so the stop event is set in the signal handler itself,
the streams end by themselves, and the flush gets its time. Each line was measured, see docs/operations.md.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from settings import SettingsError, load_settings, prepare_process_environment
from storage.errors import StorageError
from storage.files import DataDirInUse

WORKER_BOOT_ERROR = 3

prepare_process_environment()
_settings = load_settings()
_host = _settings.server.host

bind = f"[{_host}]:{_settings.server.port}" if ":" in _host else f"{_host}:{_settings.server.port}"
wsgi_app = "app:app"
workers, worker_class, threads = 1, "gthread", _settings.server.threads
preload_app, max_requests, reload = False, 0, False
timeout, keepalive = 120, 5
limit_request_line = 8190  # the most that gunicorn allows; longer ones get its own 414, in HTML
graceful_timeout = int(_settings.server.grace_seconds)
control_socket_disable = True
proc_name = "olympus"
forwarded_allow_ips = "127.0.0.1"
accesslog = None  # web/ops.py writes one structured line per request
errorlog, loglevel = "-", "warning"


def post_worker_init(worker):
    """The application is loaded and this is the process that serves: start what must run."""
    runtime = worker.wsgi.extensions["olympus"]
    try:
        runtime.start(heartbeat=worker.notify, listening=[s.getsockname() for s in worker.sockets])
    except (DataDirInUse, SettingsError, StorageError) as error:
        sys.stderr.write(f"olympus: cannot start: {error}\n")
        sys.exit(WORKER_BOOT_ERROR)  # the arbiter then halts instead of trying again and again
    previous = signal.getsignal(signal.SIGTERM)

    def on_term(signum, frame):
        runtime.stop_event.set()  # nothing else here: a handler may run in the middle of anything
        previous(signum, frame)

    signal.signal(signal.SIGTERM, on_term)


def worker_int(worker):
    """SIGINT and SIGQUIT take this way."""
    worker.wsgi.extensions["olympus"].stop_event.set()


def worker_exit(server, worker):
    """Bounded: stop the trainers, flush, close. gunicorn kills what takes longer than the grace time."""
    wsgi = getattr(worker, "wsgi", None)
    if wsgi is not None:
        wsgi.extensions["olympus"].shutdown(deadline=0.8 * graceful_timeout)
