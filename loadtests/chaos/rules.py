"""What may be wrong with the network between two parts, as data that travels to the proxy's process."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One disturbance of all connections from `sources` to `target`.

    sources: pids of the client's processes; empty means everybody. target: the name of a proxied part; "" means all.
    delay_s: each way, so a round trip takes twice as long. stall_share: part of the segments that come `stall_s` late,
    and hold up what is behind them, as a lost one does until it is sent again. cut: nothing passes, in silence, and
    what is sent meanwhile arrives when it ends, as by TCP's repetitions.
    """

    target: str = ""
    sources: tuple[int, ...] = ()
    delay_s: float = 0.0
    stall_share: float = 0.0
    stall_s: float = 0.0
    cut: bool = False

    def wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def parse(raw: dict[str, Any]) -> "Rule":
        """Raises: TypeError for keys that no rule has."""
        return Rule(**{**raw, "sources": tuple(raw.get("sources", ()))})

    def applies(self, target: str, pid: int | None) -> bool:
        return self.target in ("", target) and (not self.sources or pid in self.sources)


@dataclass(frozen=True)
class Line:
    """The sum of the rules for one connection."""

    delay_s: float = 0.0
    stall_share: float = 0.0
    stall_s: float = 0.0
    cut: bool = False


def line(rules: list[Rule], target: str, pid: int | None) -> Line:
    """What a connection of process `pid` to `target` is like. pid: None when nobody knows."""
    found = [rule for rule in rules if rule.applies(target, pid)]
    return Line(
        delay_s=sum(rule.delay_s for rule in found),
        stall_share=max((rule.stall_share for rule in found), default=0.0),
        stall_s=max((rule.stall_s for rule in found), default=0.0),
        cut=any(rule.cut for rule in found),
    )
