"""The real Harmony vocabulary, twice: as OpenAI's library reads it, and as a transformers tokenizer.

The vocabulary file comes with the package ``bpe-openai``; openai-harmony checks its hash. The chat template is ours,
written from the format's guide; it behaves as the one that gpt-oss models ship (same variables, same text) wherever
the tests go, without built-in tools and without that template's blank lines after instructions.
"""

from __future__ import annotations

import base64
import functools
import gzip
import os
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

FIRST_SPECIAL = 199_998
_NAMED = {
    199_998: "startoftext",
    199_999: "endoftext",
    200_002: "return",
    200_003: "constrain",
    200_005: "channel",
    200_006: "start",
    200_007: "end",
    200_008: "message",
    200_012: "call",
    200_018: "endofprompt",
}
#: The 21 special tokens by their ids.
SPECIALS = {number: f"<|{_NAMED.get(number, f'reserved_{number}')}|>" for number in range(FIRST_SPECIAL, 200_019)}
RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL = 200_002, 200_003, 200_005, 200_006, 200_007, 200_008, 200_012

TEMPLATE = """\
{%- macro kind(spec) -%}
{%- if spec.enum -%}"{{ spec.enum | join('" | "') }}"
{%- elif spec.type == "array" -%}{{ kind(spec["items"]) if spec["items"] else "any" }}[]
{%- elif spec.type == "integer" -%}number
{%- elif spec.type in ("string", "number", "boolean") -%}{{ spec.type }}
{%- else -%}any
{%- endif -%}
{%- endmacro -%}
{%- macro declare(function) -%}
{{- "// " + function.description + "\\n" }}
{{- "type " + function.name + " = " }}
{%- if function.parameters and function.parameters.properties %}
{{- "(_: {\\n" }}
{%- for name, spec in function.parameters.properties.items() %}
{%- if spec.description %}
{{- "// " + spec.description + "\\n" }}
{%- endif %}
{{- name + ("" if name in (function.parameters.required or []) else "?") + ": " + kind(spec) + "," }}
{%- if spec.default is defined %}
{{- " // default: " + (spec.default if spec.enum else spec.default | tojson) }}
{%- endif %}
{{- "\\n" }}
{%- endfor %}
{{- "}) => any;\\n\\n" }}
{%- else %}
{{- "() => any;\\n\\n" }}
{%- endif %}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- (model_identity or "You are ChatGPT, a large language model trained by OpenAI.") + "\\n" }}
{{- "Knowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort or "medium") + "\\n\\n" }}
{{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
{%- if tools %}
{{- "\\nCalls to these tools must go to the commentary channel: 'functions'." }}
{%- endif %}
{{- "<|end|>" }}
{%- set opening = messages[0].content if messages[0].role in ("system", "developer") else "" %}
{%- set turns = messages[1:] if messages[0].role in ("system", "developer") else messages %}
{%- if opening or tools %}
{{- "<|start|>developer<|message|>" }}
{%- if opening %}
{{- "# Instructions\\n\\n" + opening }}
{%- endif %}
{%- if tools %}
{{- ("\\n\\n" if opening else "") + "# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n" }}
{%- for tool in tools %}
{{- declare(tool.function) }}
{%- endfor %}
{{- "} // namespace functions" }}
{%- endif %}
{{- "<|end|>" }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for turn in turns %}
{%- if turn.role == "user" %}
{{- "<|start|>user<|message|>" + turn.content + "<|end|>" }}
{%- elif turn.role == "assistant" and turn.tool_calls %}
{%- set later = namespace(final=false) %}
{%- for other in turns[loop.index:] if other.role == "assistant" and not other.tool_calls %}
{%- set later.final = true %}
{%- endfor %}
{%- set thought = turn.thinking or turn.content %}
{%- if thought and not later.final %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + thought + "<|end|>" }}
{%- endif %}
{%- set call = turn.tool_calls[0].function %}
{%- set called.name = call.name %}
{{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
{{- call.arguments | tojson + "<|call|>" }}
{%- elif turn.role == "assistant" %}
{{- "<|start|>assistant<|channel|>final<|message|>" + turn.content + "<|end|>" }}
{%- elif turn.role == "tool" %}
{%- if called.name is none %}
{{- raise_exception("a tool answers, but none was called") }}
{%- endif %}
{{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
{{- turn.content | tojson + "<|end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start|>assistant" }}
{%- endif %}
"""


def _vocabulary() -> bytes:
    """The file ``o200k_base.tiktoken``: a token in base64 and its rank per line."""
    packed = distribution("bpe-openai").locate_file("bpe_openai/data/o200k_base.tiktoken.gz")
    return gzip.decompress(Path(str(packed)).read_bytes())  # importing the package would load far more


@functools.cache
def harmony_encoding() -> HarmonyEncoding:
    """OpenAI's own encoding, from the file in ``bpe-openai``."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "o200k_base.tiktoken").write_bytes(_vocabulary())
        before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        try:
            return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            if before is not None:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


class _Converter(TikTokenConverter):  # type: ignore[misc]
    """Reads the vocabulary from the package instead of a file, so that ``tiktoken`` is not needed."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        pairs = (line.split() for line in _vocabulary().splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.cache
def harmony_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary as a transformers tokenizer with our template. Shared: do not change it."""
    converter = _Converter(
        vocab_file="o200k", pattern=GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"], extra_special_tokens=SPECIALS.values()
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
