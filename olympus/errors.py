"""What can go wrong with the kernels' lives, with what the user should do next in each message.

OlympusError
 |-- KernelNotFound      404  no kernel has that id
 |-- CheckpointNotFound  404  the kernel has no such checkpoint
 |-- InvalidAction       409  the kernel's state does not allow that (resume of a training kernel)
 |    |-- DuplicateKernel 409  the name is taken
 |    `-- VoteLost       409  the kernels voted against a new one; the vote travels with the answer
 |-- InvalidRequest      422  the request is well formed but cannot be carried out (unknown network option)
 |-- KernelLimitReached  429  as many kernels exist as the settings allow
 |-- CheckpointInvalid   500  a checkpoint's files do not match its manifest
 |-- NotReady            503  not started yet, or stopping; try again
 |    `-- ModelNotReady  503  the language model is loading, failed, or switched off
 `-- StorageFull         507  no room for another checkpoint

``status`` and ``code`` are class attributes, so that the HTTP layer needs no table of its own. Tracebacks never
travel in a message: they are logged where they happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class OlympusError(Exception):
    """Base of this package's errors; the message may be shown to a client."""

    status: int = 500
    code: str = "internal_error"
    #: Seconds after which a retry makes sense, or None.
    retry_after: float | None = None
    #: Further members of the answer (RFC 9457, section 3.2), JSON types.
    extensions: Mapping[str, Any] = {}


class KernelNotFound(OlympusError):
    """No kernel has that id; ``GET /olympus/kernels`` lists them."""

    status = 404
    code = "kernel_not_found"


class CheckpointNotFound(OlympusError):
    """The kernel has no such checkpoint, or none yet."""

    status = 404
    code = "checkpoint_not_found"


class InvalidAction(OlympusError):
    """The kernel's state does not allow that action now; the message says which state does."""

    status = 409
    code = "invalid_action"


class DuplicateKernel(InvalidAction):
    """A kernel with that name exists; choose another name, or pass ``force``."""

    code = "duplicate_kernel"


class VoteLost(InvalidAction):
    """The vote on a new kernel was lost; ``extensions`` has every ballot with its numbers."""

    code = "vote_lost"

    def __init__(self, message: str, extensions: Mapping[str, Any]):
        super().__init__(message)
        self.extensions = extensions


class InvalidRequest(OlympusError):
    """A value is out of range or unknown for this kernel; the message names it."""

    status = 422
    code = "invalid_request"


class KernelLimitReached(OlympusError):
    """As many kernels exist as ``kernels.max_kernels`` allows; delete one first."""

    status = 429
    code = "kernel_limit_reached"
    retry_after: float | None = 60.0


class CheckpointInvalid(OlympusError):
    """Files are missing or their SHA-256 differs from the manifest: the checkpoint must not be used."""

    code = "checkpoint_invalid"


class NotReady(OlympusError):
    """The server is starting or stopping; try again shortly."""

    status = 503
    code = "not_ready"
    retry_after: float | None = 2.0


class ModelNotReady(NotReady):
    """The language model is loading, failed to load, or is switched off."""

    code = "model_not_ready"
    retry_after: float | None = 5.0


class StorageFull(OlympusError):
    """No room for another checkpoint: free disk space, or raise ``kernels.retention``."""

    status = 507
    code = "storage_full"
