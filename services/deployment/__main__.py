"""`python -m services.deployment COMMAND`."""

import sys

from services.deployment.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
