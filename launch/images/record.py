"""Record the pictures of README.md from a real run of the demo: python launch/images/record.py

Each command runs in a terminal of its own, without a GPU. What stands on its screen becomes an SVG file beside this
script, by rich. The demo runs from the start: `runs/demo` is removed first, and again at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

REPO = Path(__file__).resolve().parents[2]
IMAGES = Path(__file__).resolve().parent
RUN_DIR = REPO / "runs" / "demo"
WIDTH = 118
_FONT = re.compile(r"\s*@font-face \{\{.*?\}\}", re.DOTALL)  # rich names fonts of a server; a picture needs no network
# A sequence that moves the cursor or clears something, with its number and letter; colours end in "m".
_CONTROL = re.compile(r"\x1b\[\??([\d;]*)([A-Za-ln-z])|\r|\n")

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dpgen"]


def run_in_terminal(command: list[str]) -> Iterator[str]:
    """Run a command in a terminal of WIDTH columns, and yield the whole output so far after each piece of it."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    bin_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": bin_path, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=writer, stderr=writer, stdin=writer)
    os.close(writer)
    output = b""
    with contextlib.suppress(OSError):  # a terminal raises it once the last process has closed its end
        while piece := os.read(reader, 1 << 16):
            output += piece
            yield output.decode(errors="replace")
    os.close(reader)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}:\n{output.decode(errors='replace')}")


def get_screen(output: str) -> list[str]:
    """Return the lines on a terminal after `output`, with their colours. Whatever rewrites a line clears it first."""
    lines, row, end = [""], 0, 0
    for control in _CONTROL.finditer(output):
        lines[row] += output[end : control.start()]
        end = control.end()
        if control[0] == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control[2] == "A":
            row -= int(control[1] or 1)
        elif control[2] == "K":
            lines[row] = ""
    lines[row] += output[end:]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def save_picture(name: str, command: str, lines: list[str]) -> None:
    """Write a terminal with a command and the lines below it as NAME.svg."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=WIDTH, force_terminal=True, color_system="truecolor")
        for line in [f"\x1b[1m$ {command}\x1b[0m", *lines]:
            console.print(Text.from_ansi(line), soft_wrap=False)
        code_format = _FONT.sub("", CONSOLE_SVG_FORMAT)
        console.save_svg(str(IMAGES / f"{name}.svg"), title="dpgen", unique_id=name, code_format=code_format)


def main() -> None:
    """Record all pictures."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    preview = "dpgen preview conf/demo.yaml --ranks 2"
    *_, output = run_in_terminal([sys.executable, "-m", *preview.split()])
    save_picture("preview", preview, get_screen(output))
    *_, output = run_in_terminal([*TORCHRUN, "run", "conf/demo.yaml"])
    save_picture("run", "torchrun --nproc-per-node 2 -m dpgen run conf/demo.yaml", get_screen(output))
    status = "dpgen status runs/demo"
    *_, output = run_in_terminal([sys.executable, "-m", *status.split()])
    save_picture("status", status, get_screen(output))
    shutil.rmtree(RUN_DIR)


if __name__ == "__main__":
    main()
