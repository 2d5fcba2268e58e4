/**
 * The conversation form of DeepSeek-V3.2, whose folder has no Jinja template. Each user's turn opens the assistant's;
 * reasoning stays in turns behind the last user message alone. Arguments of calls are objects here, not JSON text.
 * The tools themselves are described in the system message, as for other templates that do not show them.
 */
export const DSML_TEMPLATE = `{%- set thinking = thinking | default(false) -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- bos_token or '' -}}
{%- for m in messages -%}
{%- set reasons = thinking and loop.index0 >= ns.last_user -%}
{%- if m.role == 'system' -%}
{{- m.content or '' -}}
{%- elif m.role == 'user' -%}
{{- '<｜User｜>' + (m.content or '') + '<｜Assistant｜>' + ('<think>' if reasons else '</think>') -}}
{%- elif m.role == 'assistant' -%}
{%- if reasons -%}{{- (m.reasoning_content or '') + '</think>' -}}{%- endif -%}
{{- m.content or '' -}}
{%- if m.tool_calls -%}
{{- '\\n\\n<｜DSML｜function_calls>\\n' -}}
{%- for call in m.tool_calls -%}
{{- '<｜DSML｜invoke name="' + call.function.name + '">\\n' -}}
{%- for name, value in call.function.arguments.items() -%}
{{- '<｜DSML｜parameter name="' + name + '" string="' + ('true' if value is string else 'false') + '">' -}}
{{- (value if value is string else value | tojson) + '</｜DSML｜parameter>\\n' -}}
{%- endfor -%}
{{- '</｜DSML｜invoke>\\n' -}}
{%- endfor -%}
{{- '</｜DSML｜function_calls>' -}}
{%- endif -%}
{{- eos_token or '' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '\\n\\n<function_results>' -}}{%- endif -%}
{{- '\\n<result>' + (m.content or '') + '</result>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
{{- '\\n</function_results>\\n\\n' + ('<think>' if reasons else '</think>') -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}`;
