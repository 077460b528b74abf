"""Measure rows' programs: their rate beside that of plain rows, and the memory of many at once on the fake engine.

    python benchmarks/programs.py                         # both, on the fake engine
    python benchmarks/programs.py --rounds 0              # the memory alone
    python benchmarks/programs.py --model DIR --seqs 256  # the rates, on real vLLM

- Rate: each row makes three calls of equal length; the plain run has three times the rows, one call each. Both generate
  the same number of tokens after prompts of about the same length. The fake engine's steps take 20 ms.
- Memory: all rows run at once, each with a call in the engine. The peak is that of the largest process of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


async def three_calls(row: dict[str, Any], llm: Any) -> dict[str, Any]:
    """Make three calls, each of which follows from the last one."""
    text = ""
    for _ in range(3):
        text = (await llm.complete(f"{row['prompt']} {text[:8]}")).text
    return {"text": text}


def run(folder: Path, name: str, num_rows: int, chars: int, *arguments: str) -> tuple[float, int]:
    """Run a job; return its generated tokens a second, and the peak of its largest process in bytes."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{row} ".ljust(chars, "x")}) + "\n" for row in range(num_rows)))
    command = [sys.executable, "-m", "dpgen", "run", f"run.dir={folder / name}", f"data.path={data}"]
    command += ["run.report=false", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'benchmarks'}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = re.search(r"\(([\d,]+) tokens/s\)", output)
    if process.returncode or found is None:
        raise RuntimeError(output[-3000:])
    return float(found[1].replace(",", "")), usage.ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000, help="programs at once")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs to compare the rates of")
    parser.add_argument("--seqs", type=int, default=64, help="sequences at once, of the rates")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of each call")
    parser.add_argument("--waves", type=int, default=10, help="rows, in multiples of --seqs")
    parser.add_argument("--model", help="a model's folder, for real vLLM")
    options = parser.parse_args()
    program = ["program.function=programs:three_calls", f"sampling.max_tokens={options.tokens}"]
    fake = ["run.engine=fake", "model=none", "engine.max_model_len=16384", "engine.step_s=0.02"]
    engine = [*fake, f"engine.max_num_seqs={options.seqs}"]
    if options.model:
        engine = [f"model={options.model}", "engine.max_model_len=2048", f"engine.max_num_seqs={options.seqs}"]
        engine += ["sampling.ignore_eos=true", "engine.load_format=dummy", "run.log_level=error"]
    with tempfile.TemporaryDirectory(prefix="dpgen-programs-") as name:
        folder = Path(name)
        for number in range(options.rounds):
            num_rows = options.waves * options.seqs
            plain = ["data.prompt_column=prompt", f"sampling.max_tokens={options.tokens}", *engine]
            plain_rate, _ = run(folder, f"plain-{number}", 3 * num_rows, 39, *plain)
            rate, _ = run(folder, f"program-{number}", num_rows, 30, *program, *engine)
            facts = {
                "plain_tokens_per_s": plain_rate,
                "program_tokens_per_s": rate,
                "ratio": round(rate / plain_rate, 3),
            }
            print(json.dumps(facts), flush=True)
        if options.model:
            return 0
        many = [*fake, f"engine.max_num_seqs={options.rows}", f"program.max_running={options.rows}"]
        rate, num_bytes = run(folder, "many", options.rows, 2_000, *program, *many)
        print(json.dumps({"programs": options.rows, "peak_mib": num_bytes >> 20, "tokens_per_s": rate}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
