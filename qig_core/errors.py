"""What can go wrong in the kernel mathematics.

KernelMathError
 |-- InvalidConfig   a KernelConfig that no network can be built from (unknown key, odd head width, too few loops)
 |-- InvalidInput    ids, masks, covariances or probabilities of the wrong shape, range or type
 `-- FisherNotReady  the optimizer was asked to step with a model Fisher that was never estimated
"""

from __future__ import annotations


class KernelMathError(Exception):
    """Base of this package's errors; the message says what to change."""


class InvalidConfig(KernelMathError, ValueError):
    """The configuration cannot exist; the message names the field and the allowed values."""


class InvalidInput(KernelMathError, ValueError):
    """A tensor or a text does not fit; the message gives the shape or range that was expected."""


class FisherNotReady(KernelMathError, RuntimeError):
    """``fisher="model"`` needs ``update_fisher`` before the first ``step``."""
