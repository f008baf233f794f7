"""What importing the library adds to importing torch and transformers, each in fresh processes.

python benchmarks/import_time.py [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import time

CORE = "import torch, transformers, tqdm.auto"


def seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    core, ours = [], []
    for _ in range(rounds):  # interleaved, since machines are noisy
        core.append(seconds(CORE))
        ours.append(seconds(f"{CORE}; import steering_vectors"))
    added = [mine / alone - 1 for mine, alone in zip(ours, core, strict=True)]
    print(f"torch and transformers alone: {statistics.median(core):.2f} s")
    print(f"with steering_vectors:        {statistics.median(ours):.2f} s ({statistics.median(added):+.1%}, median)")


if __name__ == "__main__":
    main()
