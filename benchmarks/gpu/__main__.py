"""`python -m benchmarks.gpu`: one sentence and exit code 2 where there is no GPU."""

from __future__ import annotations

import sys

from benchmarks.gpu import environment


def main() -> int:
    """Ask for the kernels in Triton, and then import what runs them."""
    refused = environment.prepare()
    if refused:
        print(refused, file=sys.stderr)
        return 2
    from benchmarks.gpu import command
    from benchmarks.gpu.device import Cuda

    return command.main(sys.argv[1:], Cuda())


if __name__ == "__main__":
    raise SystemExit(main())
