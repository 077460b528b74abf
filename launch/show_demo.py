"""Show the demo's result: a few answers, how many are right, and the paths of the files.

Run it as: python launch/show_demo.py [RUN_DIR]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset

NUM_SHOWN = 5
DEMO_RUN = Path(__file__).resolve().parents[1] / "runs" / "demo"


def last_integer(text: object) -> int | None:
    """Return the last integer in a text, since a model that writes out its reasoning ends with the answer."""
    # A minus is a sign unless a digit precedes it: "12-5" ends in 5.
    integers = re.findall(r"(?<!\d)-?\d+", str(text).replace(",", ""))
    return int(integers[-1]) if integers else None


def is_right(row: dict[str, Any]) -> bool:
    """Return True if a row's text ends in the number that its answer column holds."""
    expected = last_integer(row["answer"])
    return expected is not None and last_integer(row["generated_text"] or "") == expected


def show(rows: Dataset) -> None:
    """Print the first rows, and the fraction of right answers over all rows."""
    for row in rows.select(range(min(NUM_SHOWN, len(rows)))):
        text = row["generated_text"] if row["error"] is None else f"[{row['error']['type']}]"
        verdict = "right" if is_right(row) else f"wrong, it is {row['answer']}"
        print(f"  {' '.join(row['question'].split())}")
        print(f"    {' '.join((text or '').split())}   ({verdict})")
    num_right = sum(map(is_right, rows))
    percent = 100 * num_right / max(len(rows), 1)
    print(f"\n{num_right} of {len(rows)} answers are right ({percent:.1f} %)")


def main() -> int:
    """Print the result, and return the exit status: 1 if there is none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", nargs="?", type=Path, default=DEMO_RUN)
    run_dir: Path = parser.parse_args().run_dir.expanduser().resolve()
    dataset_dir = run_dir / "dataset"
    if not dataset_dir.is_dir():
        print(f"{dataset_dir} does not exist: the run is not complete. Run launch/demo.sh", file=sys.stderr)
        return 1
    disable_progress_bars()
    show(load_dataset(str(dataset_dir), split="train"))

    print("\nThe results:")
    print(f'  {dataset_dir}   all rows, in input order: datasets.load_dataset("{dataset_dir}")')
    report = run_dir / "report.html"
    if report.is_file():
        print(f"  {report}   the report of the run; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
