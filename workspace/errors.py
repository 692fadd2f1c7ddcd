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
 |    |-- InvalidGrammar        the schema that an answer shall fit cannot be used
 |    |-- UnsupportedGrammar    this model cannot be held to a grammar, or not to this one
 |    |-- PromptTooLong         the prompt leaves no room in the context
 |    |-- PrefixMismatch        a prefix of keys and values (a cartridge) is not of this model's shape
 |    `-- InvalidWorkspace      virtual tokens, deltas or layers do not fit the model or each other
 |-- StoreError             the store of virtual tokens cannot do what it was asked
 |    |-- InvalidSegment        what is to be written is not virtual tokens of this model
 |    |-- StoreFull             a write does not fit beside what is pinned
 |    |-- UnknownSegment        the session holds no segment of this id
 |    `-- SnapshotError         a snapshot cannot be restored; nothing of it was used
 |         |-- InvalidSnapshot       truncated, altered, or not what its header says
 |         |-- SnapshotVersion       another version wrote it
 |         `-- SnapshotMismatch      it is of another model
 |-- StateError             trained weights of the workspace cannot be used; the model serves without them
 |    |-- StateNotFound         no weights lie there
 |    |-- StateDamaged          files are missing, altered, unreadable, or hold NaN
 |    `-- StateMismatch         they are of another model, another shape, or another version
 |-- CaptureError           captured training data cannot be made or used
 |    |-- PromptsDamaged        the file of prompts holds what is no prompt
 |    |-- ManifestDamaged       the manifest is missing or unreadable, or names files that are not there
 |    |-- BlobDamaged           a captured text is altered, malformed, or holds NaN
 |    `-- CaptureMismatch       it is of another model, or was made with other options
 |-- TrainingError          training cannot begin or go on
 |    |-- TrainingConfigError   the recipe cannot be used
 |    |-- CheckpointDamaged     no checkpoint of the run can be read
 |    |-- CheckpointMismatch    checkpoints lie there, but of another model, recipe or data
 |    `-- TrainingDiverged      a loss or a gradient is not finite
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

    def __init__(self, message: str, param: str = "messages"):
        self.param = param
        super().__init__(message)


class InvalidGrammar(RequestError):
    """The schema that an answer shall fit cannot be used; the message names the keyword."""

    def __init__(self, param: str, message: str):
        self.param = param
        super().__init__(f"{param}: {message}")


class UnsupportedGrammar(RequestError):
    """This model cannot be held to a grammar, or a grammar became too complex on the way."""

    def __init__(self, message: str, param: str = "response_format"):
        self.param = param
        super().__init__(f"{param}: {message}")


class PromptTooLong(RequestError):
    """The prompt leaves no room for a single new token."""

    param: str | None = "messages"

    def __init__(self, prompt_tokens: int, context_length: int, cartridge_slots: int = 0):
        self.prompt_tokens, self.context_length = prompt_tokens, context_length
        before = f" after {cartridge_slots} slots of cartridges" if cartridge_slots else ""
        super().__init__(
            f"the prompt has {prompt_tokens} tokens{before}, but the model's context holds {context_length} "
            "with at least one of them for the answer; shorten the messages"
        )


class PrefixMismatch(RequestError):
    """A prefix of keys and values that is not of this model's shape; the message has both shapes."""

    param = "cartridges"


class StoreError(WorkspaceError):
    """The store of virtual tokens cannot do what it was asked; it is as it was before."""


class InvalidSegment(StoreError, ValueError):
    """Tensors of a wrong shape, of a layer that is not hooked, or not finite; or a description that makes no sense."""


class StoreFull(StoreError):
    """A write does not fit beside what is pinned, or is larger than the limits allow at all."""


class UnknownSegment(StoreError):
    """The session holds no segment of this id; it may have expired or have been dropped."""


class SnapshotError(StoreError):
    """A snapshot cannot be restored. ``source`` says where it came from; nothing of it was used."""

    def __init__(self, source: str, problem: str):
        self.source = source
        super().__init__(f"{source}: {problem}")


class InvalidSnapshot(SnapshotError):
    """Not a snapshot, cut off, altered, or with tensors that are not what its header says."""


class SnapshotVersion(SnapshotError):
    """Written in a format that this version does not read."""


class SnapshotMismatch(SnapshotError):
    """A sound snapshot, but of another model, dtype or choice of layers."""


class InvalidWorkspace(RequestError):
    """Virtual tokens, deltas or hooked layers that do not fit the model, or whose shapes contradict each other."""

    param = "workspace"


class StateError(WorkspaceError):
    """Trained weights of the workspace cannot be used. The message names the file."""


class StateNotFound(StateError):
    """There is no directory of trained weights at this path."""


class StateDamaged(StateError):
    """A file is missing, altered, unreadable, or holds numbers that no training should leave."""


class StateMismatch(StateError):
    """The weights are whole, but of another model, another shape, or another version."""


class CaptureError(WorkspaceError):
    """Captured training data cannot be made or used. The message names the file."""


class PromptsDamaged(CaptureError):
    """A line of the file of prompts is no prompt."""


class ManifestDamaged(CaptureError):
    """The manifest is missing, is not JSON lines, or names files that are missing or of another size."""


class BlobDamaged(CaptureError):
    """A captured text is altered, is no safetensors file, lacks tensors, or holds NaN."""


class CaptureMismatch(CaptureError):
    """Captured texts of another model, other layers, or other options."""


class TrainingError(WorkspaceError):
    """Training cannot begin or go on; what was saved before is whole."""


class TrainingConfigError(TrainingError, ValueError):
    """The recipe has an unknown key or a value out of range, or does not fit the data."""


class CheckpointDamaged(TrainingError):
    """There are checkpoints, and none of them can be read."""


class CheckpointMismatch(TrainingError):
    """There are checkpoints of another model, another recipe, or other data."""


class TrainingDiverged(TrainingError):
    """A loss or a gradient is NaN or infinite. The message says where, and which blobs were in the batch."""


class EngineError(WorkspaceError):
    """The engine cannot take a request now."""


class EngineBusy(EngineError):
    """All places are taken. Try again when one of the running generations has ended."""

    def __init__(self, active: int, waiting: int):
        self.active, self.waiting = active, waiting
        super().__init__(f"{active} generations run and {waiting} wait, which is the limit; try again shortly")


class EngineStopped(EngineError):
    """The engine was not started, or has been stopped."""
