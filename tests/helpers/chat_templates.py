"""Chat templates, and the kind of content that vLLM takes each for."""

from __future__ import annotations

_EACH, _END = "{% for m in messages %}", "{% endfor %}"
_MACRO = "{% macro show(x) %}{% for part in x %}{{ part }}{% endfor %}{% endmacro %}"
# Chat templates, and the format of contents that vLLM reads from their syntax (test_render_vllm.py asks it).
CONTENT_FORMATS = {
    _EACH + "{{ m.content }}" + _END: "string",
    _EACH + "{% for part in m['content'] %}{{ part.text }}{% endfor %}" + _END: "openai",
    "{% for m in messages[1:] %}{% for part in m.content | list %}{{ part }}{% endfor %}" + _END: "openai",
    "{% set all = messages %}{% for m in all %}{% for part in m.content %}{% endfor %}" + _END: "openai",
    _EACH + "{% set content = m.content %}{% for part in content %}{% endfor %}" + _END: "openai",
    _EACH + "{% set body = m.content %}{% for part in body %}{% endfor %}" + _END: "string",
    _EACH + "{% for key, value in m.content %}{% endfor %}" + _END: "string",
    _EACH + "{% for call in m.tool_calls %}{{ call }}{% endfor %}" + _END: "string",
    _MACRO + _EACH + "{{ show(m.content) }}" + _END: "openai",
    _MACRO + _EACH + "{{ show(x=m['content']) }}" + _END: "openai",
    _MACRO + _EACH + "{{ show(m.tool_calls) }}" + _END: "string",
    "{% macro show(content) %}{% for part in content %}{% endfor %}{% endmacro %}{{ messages }}": "string",
    "{% set ns = namespace(x=1) %}{% set ns.x = messages %}{% for part in content %}{% endfor %}": "string",
    _EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% continue %}" + _END: "string",
    "{% broken": "string",
}
