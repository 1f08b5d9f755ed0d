"""The numbers that follow from the size of a cohort; one definition for the whole mesh.

With n active hospitals, the threshold t is the least number of hospitals that must agree (on a group, on a digest, on
unmasking), f is the number of colluding hospitals that the privacy guarantee tolerates, and t - f is the number of
noise shares that a curious coalition can never know: any t hospitals contain at least t - f honest ones.
"""

from typing import Final

from services.common.errors import Code, FedmeshError

MIN_PRIVATE_HOSPITALS: Final = 4
"""Below this no honest majority survives one colluder, so a guarantee would be empty."""

MAX_COLLUDERS: Final = 4


def threshold(n: int) -> int:
    """Return t = floor(2n/3) + 1, the quorum of a cohort of `n` active hospitals.

    Two sets of t hospitals share more than n/3 members (Byzantine quorum intersection).

    Raises:
        FedmeshError: INVALID_ARGUMENT if `n` < 1.
    """
    if n < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a cohort needs at least one hospital, got {n}", hospitals=n)
    return 2 * n // 3 + 1


def colluders(n: int) -> int:
    """Return f = min(4, 2t - n - 1), the colluding hospitals that a guarantee for `n` hospitals tolerates.

    Raises:
        FedmeshError: INVALID_ARGUMENT if `n` < 1.
    """
    return min(MAX_COLLUDERS, 2 * threshold(n) - n - 1)


def tolerated(n: int, asked: int | None) -> int:
    """Return the f of a guarantee for `n` hospitals: what a plan asks for, or all that the cohort can give (None).

    Raises:
        FedmeshError: PRIVACY_REFUSED if more is asked than `colluders(n)`; INVALID_ARGUMENT if `n` < 1 or `asked` < 0.
    """
    most = colluders(n)
    if asked is None:
        return most
    if asked < 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the number of colluders must not be negative, got {asked}")
    if asked > most:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"a guarantee against {asked} colluding hospitals needs a larger roster: with {n} hospitals it is against "
            f"{most} at most",
            asked=asked,
            most=most,
        )
    return asked


def noise_share_divisor(n: int, f: int) -> int:
    """Return t - f, the number of honest noise shares that every permitted sum contains when `f` hospitals collude.

    Each hospital adds noise of variance sigma^2 / (t - f), so that what the colluders cannot subtract has at least
    variance sigma^2.

    Raises:
        FedmeshError: PRIVACY_REFUSED if `n` < 4.
    """
    require_private(n)
    return threshold(n) - f


def require_private(n: int) -> None:
    """Refuse a cohort too small for any guarantee.

    Raises:
        FedmeshError: PRIVACY_REFUSED if `n` < 4.
    """
    if n < MIN_PRIVATE_HOSPITALS:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"privacy needs at least {MIN_PRIVATE_HOSPITALS} active hospitals, this cohort has {n}: "
            "enrol more hospitals, or run the plan on public data without privacy",
            hospitals=n,
            minimum=MIN_PRIVATE_HOSPITALS,
        )
