"""The frame of every process: `--config FILE`, `--check-config`, telemetry, exit codes."""

import argparse
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from services.common.config import Section, load_config
from services.common.errors import FedmeshError
from services.common.garbage import settle_collector

ConfigT = TypeVar("ConfigT", bound=Section)

# sysexits.h: EX_CONFIG, so that a supervisor can tell a wrong configuration from a crash.
EXIT_CONFIG = 78


def run_process(
    name: str,
    config_model: type[ConfigT],
    main: Callable[[ConfigT], Coroutine[Any, Any, None]],
    arguments: list[str] | None = None,
    *,
    check: Callable[[ConfigT], None] = lambda _config: None,
) -> int:
    """Parse the command line, load the configuration, and run `main` until it ends.

    check: further checks of the configuration, such as reading the certificates; raises FedmeshError.
    Returns the exit code: 0, 1 for an error while running, 78 for a wrong configuration.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", description=f"Run the {name} of fedmesh.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings")
    parser.add_argument("--check-config", action="store_true", help="check the settings, say OK and exit")
    options = parser.parse_args(arguments)
    try:
        config = load_config(config_model, options.config)
        check(config)
    except FedmeshError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if options.check_config:
        print(f"{name}: {options.config} is OK")
        return 0
    settle_collector()
    try:
        uvloop.run(main(config))
    except FedmeshError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0
