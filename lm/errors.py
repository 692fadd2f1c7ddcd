"""What can go wrong between us and a language model.

LanguageModelError
 |-- InvalidSpec            the model's specification ("kind:rest") cannot be used
 |-- InvalidCall            what was asked cannot be asked of this client
 |-- UnknownCartridge       the model has no cartridge of this id
 |-- RequestRefused         the server said no (4xx), and would say it again; ``status`` and its words
 |-- Unavailable            no answer within the tries: not there, too busy, too slow, or failing
 |-- InvalidResponse        it answered, but not in the form that was agreed
 |    `-- InvalidTrace          ids and log-probabilities that contradict each other
 |         `-- AmbiguousTokens      token strings that do not say which ids they are
 `-- GenerationFailed       the in-process engine ended the answer with an error
"""

from __future__ import annotations


class LanguageModelError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class InvalidSpec(LanguageModelError, ValueError):
    """A specification names no kind of client that exists, or lacks what its kind needs."""


class InvalidCall(LanguageModelError, ValueError):
    """Arguments out of range, or a feature that this client does not have."""


class UnknownCartridge(LanguageModelError):
    """The model that is asked holds no cartridge of this id, or one that does not fit it."""

    def __init__(self, cartridge: str, problem: str = "there is no such cartridge here; register or promote it first"):
        self.cartridge = cartridge
        super().__init__(f"cartridge {cartridge!r}: {problem}")


class RequestRefused(LanguageModelError):
    """A 4xx answer: repeating the request would not help. ``status`` is HTTP's, ``detail`` the server's words."""

    def __init__(self, url: str, status: int, detail: str):
        self.url, self.status, self.detail = url, status, detail
        super().__init__(f"{url} refused the request with HTTP {status}: {detail}")


class Unavailable(LanguageModelError):
    """All tries ended in a broken connection, a timeout, 429 or 5xx. Try later, or give more tries or time."""

    def __init__(self, url: str, tries: int, last: str):
        self.url, self.tries, self.last = url, tries, last
        super().__init__(
            f"{url} gave no answer in {tries} tries (the last: {last}); is the server up and not overloaded?"
        )


class InvalidResponse(LanguageModelError):
    """A 2xx answer that is not what the API promises."""


class InvalidTrace(InvalidResponse):
    """Ids and log-probabilities that do not belong together."""


class AmbiguousTokens(InvalidTrace):
    """Token strings that more than one id, or none, could have produced; the exact ids cannot be known.

    Take a server that gives ids (``toka:`` or ``engine:``), or allow ambiguous candidates to be dropped.
    """


class GenerationFailed(LanguageModelError):
    """The engine ended the answer with an error or cancelled it; the message is the engine's."""
