"""Print shell completion scripts (`dpgen --print-completion SHELL`).

shtab makes them from the parser. What is added here completes the arguments that are configuration files or key=value:
first the section, then the key, then the values of keys that have a choice, and file names after any other key.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from dpgen.errors import EXIT_OK, EXIT_USAGE
from dpgen.formatting import format_extra

# readline breaks words at "=", so that a word may reach the function in three parts; COMP_LINE has it whole.
_BASH = Template("""

_dpgen_keys=($keys)

_dpgen_values() {  # $$1: a key
  case $$1 in
$cases
  esac
}

_dpgen() {
  local before=$${COMP_LINE:0:COMP_POINT} key
  local word=$${before##*[[:space:]]}
  case $${COMP_WORDS[1]} in
    $commands) ;;
    *) _shtab_dpgen "$$@"; return ;;
  esac
  if [[ $$word == -* || $$COMP_CWORD -lt 2 ]]; then
    _shtab_dpgen "$$@"
  elif [[ $$word == *=* ]]; then
    key=$${word%%=*}
    word=$${word#*=}
    local values=$$(_dpgen_values "$$key")
    if [[ $$values ]]; then
      mapfile -t COMPREPLY < <(compgen -W "$$values" -- "$$word")
    else
      compopt -o filenames 2>/dev/null
      mapfile -t COMPREPLY < <(compgen -f -- "$$word")
    fi
    if [[ $$COMP_WORDBREAKS != *=* ]]; then
      COMPREPLY=("$${COMPREPLY[@]/#/$$key=}")
    fi
  else
    mapfile -t COMPREPLY < <(compgen -f -- "$$word")
    local names=() name
    for name in "$${_dpgen_keys[@]}"; do
      [[ $$word == *.* || $$name != *.* ]] || name=$${name%%.*}.
      names+=("$$name")
    done
    local matches
    mapfile -t matches < <(compgen -W "$${names[*]}" -- "$$word" | sort -u)
    if [[ $${matches-} ]]; then
      compopt -o nospace 2>/dev/null
      COMPREPLY+=("$${matches[@]}")
    else
      compopt -o filenames 2>/dev/null
    fi
  fi
}

complete -o bashdefault -F _dpgen dpgen
""")

_ZSH = Template("""
_dpgen_configuration() {
  if compset -P 1 '*='; then
    case $${IPREFIX%=} in
$cases
      *) _files ;;
    esac
  else
    compadd -S '' -- $keys
    _files
  fi
}
""")

_FISH = Template("""
function _dpgen_configuration
  set -l word (commandline -ct)
  if string match -q '*=*' -- $$word
    set -l key (string split -m 1 = -- $$word)[1]
    switch $$key
$cases
    end
  else
    printf '%s\\n' $keys
    __fish_complete_path $$word
  end
end
""")


def print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the script on stdout and return the exit status: 2 where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        print(f"dpgen: --print-completion needs shtab: {format_extra('completion')}", file=sys.stderr)
        return EXIT_USAGE
    if shell not in shtab.SUPPORTED_SHELLS:
        print(f"dpgen: --print-completion {shell} needs a newer shtab: pip install -U shtab", file=sys.stderr)
        return EXIT_USAGE
    from dpgen.config.json_schema import list_value_choices

    choices = list_value_choices()
    preamble: Any = {"zsh": _fill_zsh(choices), "fish": _fill_fish(choices)}  # shtab's annotation lacks dicts
    script = shtab.complete(parser, shell=shell, preamble=preamble)
    if shell == "bash":
        script += _fill_bash(choices, _list_commands(parser))
    elif shell == "zsh":  # shtab 1.13 lets zsh complete only the first of any number of arguments
        script = re.sub(r'"\(\*\)::(.*:_dpgen_configuration")', r'"*:\1', script)
    print(script)
    return EXIT_OK


def _list_commands(parser: argparse.ArgumentParser) -> list[str]:
    """Return the commands that take a configuration."""
    [commands] = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return [
        name
        for name, command in commands.items()
        if any(getattr(action, "complete", {}).get("zsh") == "_dpgen_configuration" for action in command._actions)
    ]


def _fill_bash(choices: Mapping[str, Sequence[str]], commands: Sequence[str]) -> str:
    cases = "\n".join(f"    {key}) echo '{' '.join(values)}' ;;" for key, values in choices.items() if values)
    return _BASH.substitute(keys=_join_keys(choices), cases=cases, commands=" | ".join(commands))


def _fill_zsh(choices: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(f"      {key}) compadd -- {' '.join(values)} ;;" for key, values in choices.items() if values)
    return _ZSH.substitute(keys=_join_keys(choices), cases=cases)


def _fill_fish(choices: Mapping[str, Sequence[str]]) -> str:
    cases = [
        f"      case {key}\n        printf '%s\\n' {' '.join(f'{key}={value}' for value in values)}"
        for key, values in choices.items()
        if values
    ]
    return _FISH.substitute(keys=_join_keys(choices), cases="\n".join(cases))


def _join_keys(choices: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{key}=" for key in choices)
