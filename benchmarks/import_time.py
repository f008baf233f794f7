"""Time the import of the library, alone and with all its names beside torch and transformers, in fresh processes.

Also the command line's first ``--help``, from the start of Python to its end.

python benchmarks/import_time.py [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import time

CORE = "import torch, transformers, tqdm.auto"
HELP = "from steering_vectors.cli import main; main(['--help'])"


def seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    core, ours, python, lazy, helped = [], [], [], [], []
    for _ in range(rounds):  # interleaved, since machines are noisy
        core.append(seconds(CORE))
        ours.append(seconds(f"{CORE}; from steering_vectors import *"))
        python.append(seconds("pass"))
        lazy.append(seconds("import steering_vectors"))
        helped.append(seconds(HELP))
    alone = statistics.median(mine - empty for mine, empty in zip(lazy, python, strict=True))
    print(f"import steering_vectors:      {1000 * alone:.0f} ms more than an empty program (median)")
    added = [mine / alone - 1 for mine, alone in zip(ours, core, strict=True)]
    print(f"steering-vectors --help:      {1000 * statistics.median(helped):.0f} ms (median)")
    print(f"torch and transformers alone: {statistics.median(core):.2f} s")
    print(f"with all names of this one:   {statistics.median(ours):.2f} s ({statistics.median(added):+.1%}, median)")


if __name__ == "__main__":
    main()
