"""The cyclic garbage collector, tuned for processes that live long and allocate much for every call."""

import gc
from typing import Final

# Containers made and not freed before the youngest generation is looked through; the interpreter's own is 700, which a
# few calls in flight reach. Reference counts free nearly everything here; the collector is for the cycles left.
_YOUNGEST: Final = 10_000


def settle_collector() -> None:
    """Call when what lives as long as the process is made: modules, classes, settings.

    The collector leaves it alone from then on. Walking all of it again and again was a fifth of a busy coordinator's
    time. Calling it once more, after further imports, is fine.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST, 10, 10)
