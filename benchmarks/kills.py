"""Compression under kill -9: whether what is resumed is, to the byte, what an undisturbed run writes.

`python -m benchmarks.kills PROFILE` plans a budget, compresses it once undisturbed, and then as often as asked from
nothing, killed at a random moment and run again to its end.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--budget", default="3.3bpw")
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        report(arguments, Path(name))


def report(arguments: argparse.Namespace, folder: Path) -> None:
    plan = folder / "plan.json"
    bitrank("plan", arguments.profile, "--budget", arguments.budget, "-o", plan).wait()
    compress = ("compress", plan, "--profile", arguments.profile, "-o")
    started = time.perf_counter()
    bitrank(*compress, folder / "whole").wait()
    seconds, expected = time.perf_counter() - started, digest(folder / "whole")
    moments, same, blocks = random.Random(0), 0, []
    for index in range(arguments.times):
        output = folder / f"killed-{index}"
        process = bitrank(*compress, output)
        time.sleep(moments.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()
        blocks.append(len(list(folder.glob(f"{output.name}.partial/*.safetensors"))))
        bitrank(*compress, output).wait()
        same += digest(output) == expected
    print(
        f"{arguments.profile}: undisturbed {seconds:.1f} s; killed {arguments.times} times, with"
        f" {min(blocks)} to {max(blocks)} shards finished: {same} of {arguments.times} identical to the byte"
    )


def bitrank(*arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "api.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
