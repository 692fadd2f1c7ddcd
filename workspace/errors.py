"""What can go wrong around the frozen model.

WorkspaceError
 |-- ModelError             the model cannot be had
 |    |-- UnknownModel          no such packaged name, directory or hub id
 |    |-- ModelDownloadFailed   the package with the weights could not be fetched
 |    |-- ChecksumMismatch      bytes differ from what was pinned or recorded
 |    `-- UnsupportedModel      it exists, but this engine cannot drive it
 |-- RequestError           this request cannot be served; another one can
 |    |-- InvalidSampling       a sampling parameter is out of range
 |    |-- InvalidPrompt         the messages or token ids cannot be turned into a prompt
 |    `-- PromptTooLong         the prompt leaves no room in the context
 `-- EngineError            the engine cannot take a request now
      |-- EngineBusy            the waiting queue is full
      `-- EngineStopped         it is not running
"""

from __future__ import annotations


class WorkspaceError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class ModelError(WorkspaceError):
    """The model cannot be had. Raised while loading, never while serving."""


class UnknownModel(ModelError):
    """No packaged model, directory or hub repository has this name."""


class ModelDownloadFailed(ModelError):
    """The package that holds the weights could not be fetched; the message carries the client's last words."""


class ChecksumMismatch(ModelError):
    """A file's bytes are not the ones that were pinned (after a download) or recorded (in the cache)."""

    def __init__(self, what: str, *, expected: str, found: str, advice: str):
        self.expected, self.found = expected, found
        super().__init__(f"{what}: expected {expected}, found {found}; {advice}")


class UnsupportedModel(ModelError):
    """The model exists, but the decode loop cannot drive it (no KV cache, no stated context length, ...)."""


class RequestError(WorkspaceError, ValueError):
    """This request cannot be served. ``param`` is the field at fault, in the request's own words."""

    param: str | None = None


class InvalidSampling(RequestError):
    """A sampling parameter is out of range."""

    def __init__(self, param: str, message: str):
        self.param = param
        super().__init__(f"{param}: {message}")


class InvalidPrompt(RequestError):
    """The messages do not fit the model's chat template, or token ids lie outside its vocabulary."""

    param = "messages"


class PromptTooLong(RequestError):
    """The prompt leaves no room for a single new token."""

    param = "messages"

    def __init__(self, prompt_tokens: int, context_length: int):
        self.prompt_tokens, self.context_length = prompt_tokens, context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {context_length} "
            "with at least one of them for the answer; shorten the messages"
        )


class EngineError(WorkspaceError):
    """The engine cannot take a request now."""


class EngineBusy(EngineError):
    """All places are taken. Try again when one of the running generations has ended."""

    def __init__(self, active: int, waiting: int):
        self.active, self.waiting = active, waiting
        super().__init__(f"{active} generations run and {waiting} wait, which is the limit; try again shortly")


class EngineStopped(EngineError):
    """The engine was not started, or has been stopped."""
