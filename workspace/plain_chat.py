"""A chat template for base models that have none: a plain transcript, and the stop string that ends a turn.

A base model was never trained to end its turn, so without the stop string it would go on to write the user's next
line. Models with their own template are left alone.
"""

from __future__ import annotations

#: Renders system text, then "User:" and "Assistant:" lines. Tools cannot be expressed and are refused.
PLAIN_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- if tools -%}
{{- raise_exception('this model has no chat template of its own, so it cannot be given tools') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- 'User: ' + message['content'] + '\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'] + '\\n' -}}
{%- else -%}
{{- raise_exception('this model has no chat template of its own; roles are system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""

#: Ends the assistant's turn in a plain transcript.
PLAIN_STOP = ("\nUser:",)
