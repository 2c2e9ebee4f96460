"""A program with a durable session, to be killed: submits calls that leave notes, and prints what they came to.

    durable_program.py JOURNAL ADDRESS|local DIRECTORY COUNT SECONDS [recover]

The secret is in the environment. The last line of its output is "all COUNT", once every answer is right.
"""

from __future__ import annotations

import sys
import time

from distexec import ClusterExecutor
from tests.system import deeds


def work(directory: str, number: int, seconds: float) -> int:
    """Leave a note, take that long, and return the square."""
    deeds.note(directory, number)
    time.sleep(seconds)
    return number * number


def main() -> None:
    """Run the calls, or recover them."""
    journal, address, directory, count, seconds = sys.argv[1:6]
    if sys.argv[6:] == ["recover"]:
        with ClusterExecutor.recover(journal) as calls:
            answers = {future.task_id: future.result() for future in calls}
            assert sorted(answers.values()) == [number * number for number in range(len(calls))], "wrong answers"
            print(f"recovered {len(calls)}", flush=True)
        return
    with ClusterExecutor(2 if address == "local" else None, nodes=[address], durable=journal) as executor:
        print("begin", flush=True)
        futures = [executor.submit(work, directory, number, float(seconds)) for number in range(int(count))]
        print("submitted", flush=True)
        for number, future in enumerate(futures):
            assert future.result() == number * number, f"wrong answer to {number}"
        print(f"all {len(futures)}", flush=True)


if __name__ == "__main__":
    main()
