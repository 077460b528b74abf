"""Run dpgen in a process that kills or stops itself at a given place.

    python tests/helpers/dying_rank.py SIGKILL dpgen.engine.starting.loading:ModelLoader._load:before run C.yaml ...

The place is a function or method, and whether the signal comes before or after its first call.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from dpgen.cli import main


def strike_at(place: str, number: signal.Signals) -> None:
    """Let the function that `place` names send the signal to this process."""
    module_name, path, moment = place.split(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def striking(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        if moment == "before":
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if moment == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, striking)


if __name__ == "__main__":
    strike_at(sys.argv[2], signal.Signals[sys.argv[1]])
    sys.exit(main(sys.argv[3:]))
