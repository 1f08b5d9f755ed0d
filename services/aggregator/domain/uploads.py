"""What an upload announces, and what it must say to be received at all."""

from dataclasses import dataclass

from services.aggregator.domain.sums import AttemptId, Form, Sum
from services.common.errors import Code, FedmeshError
from services.secure_sum.opening import check_upload
from services.secure_sum.statements import Signed, SigningKeys, Upload


@dataclass(frozen=True)
class UploadHeader:
    """What a hospital announces; see `fedmesh.aggregator.v1.UploadHeader`. upload: its signed `upload` statement."""

    request_id: str
    attempt: AttemptId
    form: Form
    size_bytes: int
    sha256: str
    upload: Signed


def check_header(held: Sum, hospital_id: str, header: UploadHeader) -> Upload:
    """The statement of an upload that fits the sum, was signed by its sender, and says what the header says.

    Raises: FedmeshError(CIPHERTEXT_INVALID) for a foreign form or size; (STATEMENT_INVALID) for everything else.
    """
    form, layout = held.opened.form, held.layout
    if header.form != form:
        raise FedmeshError(
            Code.CIPHERTEXT_INVALID,
            f"this sum takes {form.parameter_set} with {form.lanes} lane(s) and {form.vector_length} values, not "
            f"{header.form.parameter_set[:64]} with {header.form.lanes} and {header.form.vector_length}",
        )
    if header.size_bytes != layout.upload_bytes:
        raise FedmeshError(
            Code.CIPHERTEXT_INVALID, f"an upload of this sum has {layout.upload_bytes} bytes, not {header.size_bytes}"
        )
    signers, group = SigningKeys(held.opened.signers), held.opened.group
    upload = check_upload(header.upload, signers, held.attempt.ref, held.opened.adverts_sha256, group)
    if upload.hospital_id != hospital_id:
        raise FedmeshError(Code.STATEMENT_INVALID, "the upload's statement is another hospital's")
    if Form(upload.parameter_set, upload.lanes, upload.vector_length) != form:
        raise FedmeshError(Code.STATEMENT_INVALID, "the upload's statement has another form than the sum")
    if upload.ciphertext_sha256 != header.sha256 or len(upload.segments) != layout.segments:
        raise FedmeshError(Code.STATEMENT_INVALID, "the upload's statement is for another ciphertext")
    return upload
