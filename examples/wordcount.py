"""Count the identifiers of Python's standard library, on whatever ClusterExecutor finds.

With agents named in $DISTEXEC_NODES (and their secret in $DISTEXEC_SECRET) it runs on those, without them on this
machine's own workers; the code is the same. `make demo` runs it both ways.
"""

import argparse
import json
import keyword
import os
import sysconfig
import time
import tokenize
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

from distexec import ClusterExecutor


def count_identifiers(path):
    """Count the names in one file that are not keywords; a file that is broken on purpose counts as empty."""
    try:
        with tokenize.open(path) as source:
            names = [token.string for token in tokenize.generate_tokens(source.readline) if token.type == tokenize.NAME]
    except (SyntaxError, UnicodeError, tokenize.TokenError):
        return Counter()
    return Counter(name for name in names if not keyword.iskeyword(name))


def draw_progress(done, total, began):
    """Draw a line that grows, over itself."""
    width = 40 * done // total
    print(f"\r  [{'#' * width}{'.' * (40 - width)}] {done}/{total} files, {time.perf_counter() - began:.1f} s ",
          end="" if done < total else "\n", flush=True)


def count_serially(paths, cache):
    """Count in this process alone, or take the answer of an earlier run from `cache`; also say how long it took."""
    if cache and cache.exists():
        answer, seconds = json.loads(cache.read_text())
        return Counter(answer), seconds
    began = time.perf_counter()
    answer = Counter()
    for path in paths:
        answer.update(count_identifiers(path))
    seconds = time.perf_counter() - began
    if cache:
        cache.write_text(json.dumps([answer, seconds]))
    return answer, seconds


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--serial-answer", type=Path, metavar="FILE", help="keep the serial answer here for a next run")
options = parser.parse_args()

library = Path(sysconfig.get_path("stdlib"))
paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
print(f"{len(paths)} files below {library}, on {os.environ.get('DISTEXEC_NODES') or 'this machine'}")

identifiers = Counter()
files, seconds = Counter(), Counter()
with ClusterExecutor() as executor:
    began = time.perf_counter()
    futures = [executor.submit(count_identifiers, path) for path in paths]
    for done, future in enumerate(as_completed(futures), 1):
        identifiers.update(future.result())
        files[future.node] += 1
        seconds[future.node] += future.timing.run_s
        draw_progress(done, len(paths), began)
    took = time.perf_counter() - began
    print(executor.status())

print("\nThe twenty most frequent identifiers:")
for name, count in identifiers.most_common(20):
    print(f"  {count:8,}  {name}")

print("\nWho did it:")
for node in sorted(files):
    print(f"  {node:12} {files[node]:5} files, {seconds[node]:6.1f} s of work")

answer, serial_took = count_serially(paths, options.serial_answer)
print(f"\n{took:.1f} s; serially {serial_took:.1f} s: {serial_took / took:.1f} times as fast on {os.cpu_count()} CPUs")
if identifiers != answer:
    raise SystemExit("The answer DIFFERS from the serial one.")
print("The answer equals the serial one.")
