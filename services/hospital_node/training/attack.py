"""tensorflow_privacy's attacks on membership, in a process of their own (`attack_process`).

It imports pandas, scikit-learn and statsmodels, some 130 MiB and a second of CPU: a node that makes no check never
pays that. Members are the training rows, the others the validation rows.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.attacks import Attacked
from services.hospital_node.training.cache import locked

_TIMEOUT_S: Final = 300.0
LENGTH: Final = struct.Struct(">Q")
"""Before the request on the process's standard input: its length in bytes."""


@dataclass(frozen=True)
class Scored:
    """Rows as a model sees them: log-odds, finite, float64 [n], and outcomes, 0 or 1, int64 [n]."""

    scores: NDArray[np.float64]
    outcomes: NDArray[np.int64]


class Attacks:
    """Runs attacks. `lock`: a file, with which the hospitals of one machine take turns, for the sake of its memory."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock

    def run(self, attacks: Sequence[str], members: Scored, others: Scored, least: int = 1) -> tuple[Attacked, ...]:
        """Each attack on all rows, and on those of each outcome, where members and others have at least `least` > 0.

        Raises: FedmeshError(INTERNAL) when the process fails or takes more than five minutes.
        """
        if min(len(members.scores), len(others.scores)) < least:
            return ()
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._lock):
            found = _in_a_process(packed(attacks, members, others, least))
        return tuple(Attacked(**one) for one in found)


def _in_a_process(request: bytes) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "services.hospital_node.training.attack_process"]
    # Several hospitals may share few cores, and the arrays are small.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=errors
        )
        assert process.stdin is not None, "it was asked for"
        try:
            # It stays open until the answer is here: its end tells the process that nobody waits any more.
            with process.stdin:
                process.stdin.write(LENGTH.pack(len(request)) + request)
                process.stdin.flush()
                code = process.wait(_TIMEOUT_S)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            code = None
        finally:
            process.kill()
            process.wait()
        if code != 0:
            raise FedmeshError(Code.INTERNAL, f"the attack on membership failed: {_tail(errors)}")
        output.seek(0)
        found: list[dict[str, Any]] = json.loads(output.read().splitlines()[-1])
    return found


def _tail(errors: Any) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def packed(attacks: Sequence[str], members: Scored, others: Scored, least: int) -> bytes:
    """The request that the process reads, without its length."""
    target = io.BytesIO()
    np.savez(
        target,
        attacks=np.array(attacks),
        least=np.array(least),
        scores_train=members.scores,
        scores_test=others.scores,
        outcomes_train=members.outcomes,
        outcomes_test=others.outcomes,
    )
    return target.getvalue()
