"""The hospitals' own models, read from their folders by the harness, which runs on the hospitals' machine."""

import time
from collections.abc import Iterable
from typing import Final

from services.common.errors import Code, FedmeshError
from services.embedded.stack import Stack
from services.hospital_node.store.personal import PERSONAL_FOLDER, load_personal
from services.secure_sum.roster import MemberKeys

# They are made within moments of the job's end; a busy machine may need longer.
_PATIENCE_S: Final = 120.0
_LOOK_S: Final = 0.2


def personal_models(stack: Stack, hospital_ids: Iterable[str], job_id: str, version: int) -> list[bytes]:
    """Every hospital's own model of a finished job; waits until the hospitals have made them.

    Raises: FedmeshError(SERVICE_UNAVAILABLE) naming a hospital that did not.
    """
    deadline = time.monotonic() + _PATIENCE_S
    models = []
    for name in hospital_ids:
        folder, keys = stack.hospital_data(name) / PERSONAL_FOLDER, MemberKeys.load(stack.member_keys(name))
        while (model := load_personal(folder, keys, job_id, version)) is None:
            if time.monotonic() > deadline:
                raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"{name} has made no personal model: see its log")
            time.sleep(_LOOK_S)
        models.append(model)
    return models
