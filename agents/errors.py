"""What can go wrong in an agent's life.

AgentError
 |-- UnknownAgent           no kind of agent has this name
 |-- AgentConfigError       a kind of agent lacks what it needs
 |-- NoCartridge            it acts with a cartridge, and there is none to act with
 |-- OutOfTurn              feedback for an action that was not taken
 |-- LogDamaged             a file of experiences cannot be read
 |-- EnvironmentDataError   the texts of an environment are missing or too few
 `-- EpisodesMismatch       the folder holds episodes of another agent, environment or configuration
"""

from __future__ import annotations


class AgentError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class UnknownAgent(AgentError, ValueError):
    """No kind of agent has this name; the message lists those that exist."""


class AgentConfigError(AgentError, ValueError):
    """What an agent of this kind needs was not given, or a value is out of range."""


class NoCartridge(AgentError):
    """The memory names no cartridge. Distill the domain and promote the result, or name one."""


class OutOfTurn(AgentError):
    """``observe`` without an action before it, or twice for the same one."""


class LogDamaged(AgentError):
    """A line of a file of experiences is not what this program writes; the message has file and line."""


class EnvironmentDataError(AgentError, ValueError):
    """The texts that an environment is made of are missing, malformed, or too few for what was asked."""


class EpisodesMismatch(AgentError):
    """Episodes are continued with what they were begun with; take another folder for another life."""
