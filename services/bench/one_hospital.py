"""`python -m services.bench.one_hospital`: from a Parquet file to a hospital's first contribution, phase by phase.

A process of its own, so that its memory is that of a hospital. Everything is the node's own code: DuckDB reads, the
plan's compiled graph trains and clips, the node's noise is added, and `MaskedSums` encrypts and masks under a roster,
an epoch key and shares as in a real round, with files in a folder as the node keeps them. The fourteen other hospitals
are members with keys of their own, whose steps are not timed; no service takes part.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from services.common.errors import FedmeshError
from services.common.ids import new_id
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.domain.sums import SumTerms
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.noise import ShareOfNoise
from services.hospital_node.secret_sum import MaskedSums
from services.hospital_node.sources.cohort import open_cohort
from services.hospital_node.sources.files import FileSource
from services.hospital_node.sources.reader import dataset_of
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.training.trainer import Trainer
from services.plans.manifest import PlanManifest, parse_manifest
from services.secure_sum import roster as rosters
from services.secure_sum.epoch import make_epoch, open_epoch
from services.secure_sum.member import Member
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import Signed
from services.secure_sum.wire import layout_of

HOSPITALS: Final = 15


class Phases:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's duration to the phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class Attempt:
    """One hospital's part in the first attempt of a job among fifteen."""

    def __init__(self, folder: Path, manifest: PlanManifest) -> None:
        """folder: an empty one, for what the node keeps of the attempt."""
        keys = [MemberKeys.generate(f"hospital-{number:02d}") for number in range(1, HOSPITALS + 1)]
        statement = rosters.found("bench", [key.public() for key in keys])
        self._roster = rosters.verify_founding(
            statement, {key.hospital_id: rosters.sign_roster(statement, key) for key in keys}
        )
        self._others = [Member(key, self._roster) for key in keys[1:]]
        # Another hospital makes the epoch's keys; this one opens them.
        _, epoch = make_epoch(keys[1], self._roster, 1)
        layout = layout_of(manifest.encoding.parameter_set, manifest.vector_length, manifest.encoding.lanes)
        self._terms = SumTerms(
            attempt=AttemptId(new_id(), 1, 1),
            roster=self._roster,
            keys=open_epoch(epoch, keys[0], self._roster),
            cohort=tuple(self._roster.ids),
            layout=layout,
        )
        self._sums = MaskedSums(keys[0], SqliteNodeState(folder).attempts)

    def contribute(self, values: Int64Vector, phases: Phases) -> int:
        """Encrypt, share, mask and keep, timed as `encrypt`; bytes of the upload.

        Raises: FedmeshError(PLAN_INVALID) when a value does not fit its lane.
        """
        terms = self._terms
        with phases.timed("encrypt"):
            own = self._sums.begin(terms, values, age=0)
        begun = [member.begin(terms.attempt.ref, terms.keys.epoch, terms.cohort) for member in self._others]
        adverts = [own, *(state.advert for state in begun)]
        shared = [member.share(state, adverts) for member, state in zip(self._others, begun, strict=True)]
        # A member deals in the order of the others' names, and this hospital's is the first of all.
        dealt: list[Signed] = [state.shares_out[0] for state in shared]
        with phases.timed("encrypt"):
            self._sums.share(terms, adverts)
            upload = self._sums.mask(terms, list(terms.cohort), dealt)
            self._sums.keep(upload)
        return sum(map(len, upload.segments()))

    @property
    def roster(self) -> Roster:
        return self._roster


def contribute(data: Path, manifest: PlanManifest, cache: Path, folder: Path) -> Mapping[str, object]:
    """Everything up to the masked upload on the disk; what was measured.

    Raises: FedmeshError: as the node's own steps.
    """
    phases, attempt = Phases(), Attempt(folder, manifest)
    with ExitStack() as stack:
        with phases.timed("read"):
            cohort = stack.enter_context(open_cohort(FileSource((data,)), manifest))
        with phases.timed("features"):
            dataset = dataset_of(cohort)
    # Where the node compiles and loads TensorFlow's library: with the data in memory.
    with phases.timed("start"):
        Trainer(manifest, None, cache)
    with phases.timed("features"):
        trainer = Trainer(manifest, dataset, cache)
    encounters, features = dataset.rows_read, len(dataset.feature_names)
    del dataset
    with phases.timed("train_clip_sum"):
        values = trainer.contribution(trainer.initial_state(), 1)
    with phases.timed("noise"):
        noised = ShareOfNoise().add(values, NoiseRequest(manifest, 1, attempt.roster.size))
    upload_bytes = attempt.contribute(noised, phases)
    return {
        "encounters": encounters,
        "features": features,
        "upload_bytes": upload_bytes,
        "start_s": phases.seconds.pop("start"),
        "phase_s": phases.seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="One hospital's first contribution, measured.")
    for name in ("plan", "data", "cache", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    try:
        found = contribute(given.data, parse_manifest(given.plan.read_bytes()), given.cache, given.folder)
    except FedmeshError as error:
        print(json.dumps({"error": error.message, "code": error.code.value}))
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
