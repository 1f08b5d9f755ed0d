"""`python -m loadtests.load.serve`: a stack for Locust's own command. Prints its socket; ends with standard input."""

import argparse
import asyncio
import sys
from pathlib import Path

from loadtests.load.run import driving, running_stack
from services.common.errors import FedmeshError
from services.embedded.stack import Stack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.load.serve", description=__doc__)
    parser.add_argument("--params", type=int, default=100_000, help="integers in an upload (%(default)s)")
    parser.add_argument("--dir", type=Path, required=True, help="emptied first; the stack's folder")
    given = parser.parse_args()
    try:
        with running_stack(given.dir, _tell) as stack:
            asyncio.run(_serve(stack, given.params))
    except FedmeshError as error:
        print(f"loadtests.load.serve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(stack: Stack, params: int) -> None:
    async with driving(stack, params, _tell) as (_, path):
        print(path, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
