"""From a request's messages, text or ids to valid prompt ids.

Conversations go through the model's own chat template. Control tokens that appear inside a message (``<|im_end|>``
typed by a user) are encoded as ordinary text, so that nobody can forge a role. What a message may contain is the
template's business; its objections become ``InvalidPrompt``. What gpt-oss needs besides is in ``harmony_prompt.py``.

After a prefix (``prefix.py``) a text begins no sequence, so it is rendered without the beginning-of-sequence token.
Training and serving both ask here, so that they agree.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2.exceptions import TemplateError

from workspace.errors import InvalidPrompt, InvalidSampling
from workspace.harmony_prompt import check_effort, harmony_messages
from workspace.models import LoadedModel
from workspace.sampling import SamplingParams
from workspace.tool_prompt import speaks_of_tools, with_tools


class Prompting:
    """Encodes prompts for one model. Safe to use from any thread."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        # Encoding changes settings of the shared tokenizer for the length of a call; decoding does not.
        self._encoding = threading.Lock()
        # A template's variables are the request's to set; the tokenizer's own arguments (another template, say) not.
        arguments = inspect.signature(loaded.tokenizer.apply_chat_template).parameters
        self._reserved = set(arguments) - {"add_generation_prompt", "continue_final_message", "kwargs"}
        self._bos: int | None = None  # what a rendered conversation begins with, once known
        self._bos_known = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        after_prefix: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of the conversation, up to where the assistant's answer begins. Raises ``InvalidPrompt``.

        ``after_prefix`` leaves out the beginning of sequence, which is in the prefix.
        """
        if not messages:
            raise InvalidPrompt("messages: at least one message is needed")
        reserved = sorted(self._reserved & template_kwargs.keys())
        if reserved:
            raise InvalidPrompt(f"chat template arguments: {', '.join(reserved)} cannot be set by a request")
        options = {"add_generation_prompt": True, **template_kwargs}
        if self._loaded.harmony is not None:
            messages = harmony_messages(messages)
        try:
            if self._loaded.harmony is None and speaks_of_tools(messages, tools):
                messages, tools = with_tools(messages, tools, str(self._loaded.tokenizer.chat_template))
            with self._encoding:
                ids = self._loaded.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **options,
                )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidPrompt(f"messages do not fit the chat template of {self._loaded.name}: {error}") from error
        found = [int(number) for number in ids]
        return found[1:] if after_prefix and found[0] == self._beginning() else found

    def encode(self, text: str, *, after_prefix: bool = False) -> list[int]:
        """Token ids of plain text; special tokens written out in it count as such."""
        with self._encoding:
            ids = self._loaded.tokenizer.encode(text, add_special_tokens=not after_prefix)
        return [int(number) for number in ids]

    def _beginning(self) -> int | None:
        """The beginning-of-sequence token of rendered conversations, or None if they have none.

        Some models (SmolLM2) name the mark of every turn their beginning of sequence. It has to stay: what is looked
        for stands once in a conversation of several turns.
        """
        if not self._bos_known:
            bos = self._loaded.tokenizer.bos_token_id
            turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
            try:
                ids = [] if bos is None else self.render(turns)
            except InvalidPrompt:
                ids = []
            self._bos = bos if ids[:1] == [bos] and ids.count(bos) == 1 else None
            self._bos_known = True
        return self._bos

    def prepare(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        after_prefix: bool = False,
    ) -> tuple[tuple[int, ...], SamplingParams]:
        """Checked ids for either kind of prompt; messages also bring the stop strings their template needs.

        ``tools`` and ``reasoning_effort`` go with messages; models that know no effort ignore it.
        """
        if not prompt:
            raise InvalidPrompt("prompt: at least one token or message is needed")
        if isinstance(prompt[0], Mapping):
            known = reasoning_effort is not None and self._loaded.harmony is not None
            effort = {"reasoning_effort": check_effort(str(reasoning_effort))} if known else {}
            conversation = cast("Sequence[Mapping[str, Any]]", prompt)
            ids = self.render(conversation, tools, after_prefix=after_prefix, **effort)
            if self._loaded.chat_stop:
                params = dataclasses.replace(params, stop=params.stop + self._loaded.chat_stop)
        else:
            ids = [int(number) for number in cast("Sequence[int]", prompt)]
        size = self._loaded.vocabulary_size
        outside = next((number for number in ids if not 0 <= number < size), None)
        if outside is not None:
            raise InvalidPrompt(f"prompt: token id {outside} is outside the vocabulary of {size}", "prompt")
        if params.logit_bias and (token := max(params.logit_bias)[0]) >= size:
            raise InvalidSampling("logit_bias", f"token id {token} is outside the vocabulary of {size}")
        return tuple(ids), params
