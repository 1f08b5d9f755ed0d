import numpy as np

from services.secure_sum import opening
from tests.support.secure_sum import Consortium, names


def test_fifteen_members_two_leave_after_sharing_and_two_after_uploading() -> None:
    consortium = Consortium.of(15)
    group = names(15)
    consortium.begin(group)
    consortium.share()
    consortium.receive(group)
    uploaders = [name for name in group if name not in ("hospital-03", "hospital-15")]
    consortium.upload(uploaders)
    confirmations = consortium.confirm()
    reveals = consortium.reveal(uploaders[2:], confirmations)
    opened = opening.open_masks(consortium.roster, consortium.survivors, consortium.adverts, reveals)

    assert set(opened.mask_seeds) == {"hospital-03", "hospital-15"}
    np.testing.assert_array_equal(consortium.unmask(opened), consortium.expected())
