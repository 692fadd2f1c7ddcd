"""What can go wrong between the history and a cartridge.

DistillationError
 |-- DistillConfigError     the configuration has an unknown key or a value out of range
 |-- DatasetError           rows for training cannot be written or read
 |    |-- BadRow                one row is not what the schema says; the message names it
 |    `-- DatasetDamaged        the file is missing, no parquet, or lacks columns
 |-- GenerationError        rows cannot be made
 |    |-- NothingToDistil       no experience of the domain can become a row
 |    |-- JournalMismatch       the journal of an interrupted run belongs to other settings or another history
 |    |-- ObservationTooLong   one observation alone does not fit the teacher's prompt
 |    |-- TeacherUnavailable    the teacher did not answer in as many attempts as allowed; what was made is kept
 |    `-- TeacherRefused        the teacher can answer no request of this kind (no log-probabilities, unknown model)
 |-- TrainerError           a cartridge cannot be trained, or training cannot go on; what was saved before is whole
 |    |-- TrainerDiverged       a loss or a gradient is not finite; the message names the rows
 |    |-- TrainerDiskFull       a checkpoint does not fit on the disk
 |    |-- CheckpointUnusable    checkpoints lie there, but damaged, or of another model, recipe or dataset
 |    `-- BackendMissing        the optional training library is not installed, or cannot train this model
 |-- EvaluationError        a candidate cannot be compared with anything
 |-- RunError               a run in the database cannot do that (``runs.py``): not found, in progress, lease lost
 `-- ExportError            a dataset or a cartridge cannot be given to somebody else
      `-- ExporterMissing       the optional library or its credentials are not there
"""

from __future__ import annotations


class DistillationError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class DistillConfigError(DistillationError, ValueError):
    """The configuration cannot be used. One line per problem, with the nearest known key where one was mistyped."""


class DatasetError(DistillationError):
    """Rows for training cannot be written or read; the file on disk is as it was."""


class BadRow(DatasetError, ValueError):
    """A row, a message or its log-probabilities contradict the schema of ``rows.py``."""


class DatasetDamaged(DatasetError):
    """The file is missing, is no parquet, or lacks columns that ``dataset.py`` documents."""


class GenerationError(DistillationError):
    """Rows cannot be made; those that were made before lie in the journal."""


class NothingToDistil(GenerationError):
    """The domain holds no experience that could become a row for training."""


class JournalMismatch(GenerationError):
    """The journal in the run's directory was written for other samples. Use another directory, or remove it."""


class ObservationTooLong(GenerationError, ValueError):
    """An observation that leaves no room in the prompt even without memory. Raise ``teacher.max_prompt_tokens``."""


class TeacherUnavailable(GenerationError):
    """The teacher could not be reached. Start it and run again: the run goes on where it stopped."""

    def __init__(self, name: str, attempts: int, cause: BaseException):
        self.attempts, self.cause = attempts, cause
        super().__init__(
            f"the teacher {name!r} failed {attempts} times in a row (last: {type(cause).__name__}: {cause}); "
            "start it or name another one, then run again: what it answered so far is kept"
        )


class TeacherRefused(GenerationError):
    """The teacher answered that it cannot do this at all; asking again would change nothing."""


class TrainerError(DistillationError):
    """A cartridge cannot be trained, or training cannot go on. Checkpoints that were written before are whole."""


class TrainerDiverged(TrainerError):
    """A loss or a gradient is NaN or infinite. The prefix is as it was before the step; the message names its rows."""


class TrainerDiskFull(TrainerError):
    """A checkpoint does not fit on the disk. Free some space and start again: the run goes on from the last one."""


class CheckpointUnusable(TrainerError):
    """Checkpoints lie in the folder that cannot be gone on from: damaged, or of another run. Use another folder."""


class BackendMissing(TrainerError):
    """An optional training library is not installed, or does not know this kind of model."""


class EvaluationError(DistillationError, ValueError):
    """The questions, arms or answers to be compared do not fit together."""


class ExportError(DistillationError):
    """What was made cannot be given to somebody else; it lies unharmed where it was."""


class ExporterMissing(ExportError):
    """An optional library is not installed, or no credentials were given for it."""
