"""What must hold in every schedule, watched from outside on what hospitals really send."""

from collections import Counter
from collections.abc import Mapping

from services.secure_sum import statements
from services.secure_sum.roster import Roster
from services.secure_sum.statements import AttemptRef, Reveal, Survivors
from tests.simulation.arithmetic import Arithmetic, Integers, add
from tests.simulation.centre import Closed
from tests.simulation.messages import Answer, Step


class Violation(AssertionError):
    """The protocol broke a promise."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Violation(promise)


class Oracle:
    """Knows every input and sees every answer that leaves a hospital."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.rosters: dict[int, Roster] = {}
        """By round."""
        self._arithmetic = arithmetic
        self._inputs: dict[tuple[AttemptRef, str], Integers] = {}
        self._said: dict[tuple[AttemptRef, str, Step], Answer] = {}
        self._kinds: dict[tuple[AttemptRef, str, str], str] = {}
        self._revealers: dict[AttemptRef, set[str]] = {}

    def took_part(self, attempt: AttemptRef, hospital: str, values: Integers) -> None:
        """A hospital made its input durable; it never has another one for the attempt."""
        known = self._inputs.setdefault((attempt, hospital), values)
        require(known == values, f"{hospital} has one input in {attempt}")

    def sent(self, answer: Answer) -> None:
        """An answer left a hospital."""
        key = (answer.attempt, answer.hospital_id, answer.step)
        first = self._said.setdefault(key, answer)
        require(first == answer, f"{answer.hospital_id} answers {answer.step.name} of one attempt with the same bytes")
        if answer.step is Step.UNMASK and first is answer:
            self._revealed(answer)

    def _revealed(self, answer: Answer) -> None:
        reveal = statements.parse(Reveal, answer.signed[0].statement)
        for share in reveal.shares:
            key = (answer.attempt, answer.hospital_id, share.of)
            kind = self._kinds.setdefault(key, share.kind)
            require(kind == share.kind, f"{answer.hospital_id} reveals one secret of {share.of}")
        self._revealers.setdefault(answer.attempt, set()).add(answer.hospital_id)
        opened = Counter(
            (attempt.job_id, attempt.round)
            for attempt, hospitals in self._revealers.items()
            if len(hospitals) >= self.rosters[attempt.round].threshold
        )
        require(not opened or max(opened.values()) == 1, "one sum is unmasked for one round")

    def aborted(self, attempt: AttemptRef) -> None:
        """The centre gave an attempt up before any list was stored."""
        require(not self._revealers.get(attempt), f"nothing is revealed in {attempt}, which aborted")

    def closed(self, closed: Closed, results: Mapping[str, Integers]) -> Integers | None:
        """A round ended: the sum, compared with the survivors' integers; None when it was burnt."""
        if closed.total is None:
            return None
        attempt = closed.stored.attempt
        survivors = [s.hospital_id for s in statements.parse(Survivors, closed.stored.survivors).survivors]
        require(len(survivors) == len(set(survivors)), "every contribution is counted once")
        require(len(survivors) >= self.rosters[attempt.round].threshold, "at least t hospitals are in a sum")
        expected = add([self._inputs[attempt, h] for h in survivors])
        require(self._arithmetic.open(closed.total) == expected, "the accepted sum is the survivors' sum")
        for hospital, result in results.items():
            require(result == expected, f"{hospital} accepted the survivors' sum")
        require(len(results) >= self.rosters[attempt.round].threshold, "t hospitals accepted the sum")
        return expected
