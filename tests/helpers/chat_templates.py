"""List chat templates, each with the content format that vLLM detects in it."""

from __future__ import annotations

_FOR, _END = "{% for m in messages %}", "{% endfor %}"
_MACRO = "{% macro show(x) %}{% for part in x %}{{ part }}{% endfor %}{% endmacro %}"
# Chat templates, each with the content format that vLLM reads from its syntax (test_render_vllm.py compares).
CONTENT_FORMATS = {
    _FOR + "{{ m.content }}" + _END: "string",
    _FOR + "{% for part in m['content'] %}{{ part.text }}{% endfor %}" + _END: "openai",
    "{% for m in messages[1:] %}{% for part in m.content | list %}{{ part }}{% endfor %}" + _END: "openai",
    "{% set all = messages %}{% for m in all %}{% for part in m.content %}{% endfor %}" + _END: "openai",
    _FOR + "{% set content = m.content %}{% for part in content %}{% endfor %}" + _END: "openai",
    _FOR + "{% set body = m.content %}{% for part in body %}{% endfor %}" + _END: "string",
    _FOR + "{% for key, value in m.content %}{% endfor %}" + _END: "string",
    _FOR + "{% for call in m.tool_calls %}{{ call }}{% endfor %}" + _END: "string",
    _MACRO + _FOR + "{{ show(m.content) }}" + _END: "openai",
    _MACRO + _FOR + "{{ show(x=m['content']) }}" + _END: "openai",
    _MACRO + _FOR + "{{ show(m.tool_calls) }}" + _END: "string",
    "{% macro show(content) %}{% for part in content %}{% endfor %}{% endmacro %}{{ messages }}": "string",
    "{% set ns = namespace(x=1) %}{% set ns.x = messages %}{% for part in content %}{% endfor %}": "string",
    _FOR + "{% generation %}{{ m.content }}{% endgeneration %}{% continue %}" + _END: "string",
    "{% broken": "string",
}
