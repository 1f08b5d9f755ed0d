"""`python -m services.cli.at_hospital`: `fedmesh hospital`, in an image that has a hospital node's packages only."""

import sys

from services.cli.hospital import app
from services.common.errors import FedmeshError

if __name__ == "__main__":
    try:
        app(prog_name="fedmesh hospital")
    except FedmeshError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
