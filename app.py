"""WSGI entry point: ``app`` for gunicorn, ``python app.py`` to run the server with no flags.

Importing this starts nothing: ``create_app()`` is pure. gunicorn's hooks (configs/gunicorn.conf.py) start and stop
the runtime in the one worker process. On systems without gunicorn, ``flask run --no-reload`` is not supported;
use WSL.
"""

from __future__ import annotations

import sys
from pathlib import Path

from settings import SettingsError, load_settings, prepare_process_environment

prepare_process_environment()  # before anything imports torch

CONFIG = Path(__file__).resolve().parent / "configs" / "gunicorn.conf.py"


def main() -> int:
    """Check the settings, then run gunicorn in this process; returns its exit status."""
    try:
        load_settings()
    except SettingsError as error:
        sys.stderr.write(f"olympus: the configuration cannot be used:\n{error}\n")
        return 2
    from gunicorn.app.wsgiapp import WSGIApplication

    sys.argv = ["olympus", "--config", str(CONFIG)]
    WSGIApplication("%(prog)s [OPTIONS]", prog="olympus").run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
else:
    from web.app import create_app

    app = create_app()
