"""The hospital's end of the secure sum under its group key."""

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.domain.tasks import AttemptId
from services.plans.manifest import PlanManifest
from services.secure_sum import public, secret, wire
from services.secure_sum.parameters import parameter_set


class GroupKeySum:
    """See `domain.ports.SecretSum` for the contract. Holds the group key; N = 4096, one 60-bit prime, t = 2^48."""

    def __init__(self, group_key: bytes) -> None:
        self._key = group_key

    def encrypt(self, values: Int64Vector, manifest: PlanManifest) -> bytes:
        self._require_parameters(manifest)
        try:
            return secret.encrypt(values, self._key, manifest.encoding.lanes)
        except FedmeshError as error:
            raise FedmeshError(Code.PLAN_INVALID, error.message) from error

    def size(self, manifest: PlanManifest) -> int:
        encoding = manifest.encoding
        return wire.sum_size(parameter_set(encoding.parameter_set), manifest.vector_length, encoding.lanes)

    def decrypt(self, encrypted_sum: bytes, manifest: PlanManifest, contributions: int) -> Int64Vector:
        encoding = manifest.encoding
        params = parameter_set(encoding.parameter_set)
        counted = public.validate_sum(encrypted_sum, params, manifest.vector_length, encoding.lanes)
        if counted != contributions:
            raise FedmeshError(
                Code.CIPHERTEXT_INVALID, f"the sum holds {counted} contributions, {contributions} were announced"
            )
        return secret.decrypt(encrypted_sum, self._key, manifest.vector_length, encoding.lanes)

    def digest(self, attempt: AttemptId, sum_sha256: str, total: Int64Vector) -> bytes:
        context = secret.round_context(attempt.job_id, attempt.round, attempt.attempt)
        return secret.keyed_digest(self._key, context, bytes.fromhex(sum_sha256), total)

    def _require_parameters(self, manifest: PlanManifest) -> None:
        name = secret.group_key_parameters(self._key).name
        if name != manifest.encoding.parameter_set:
            raise FedmeshError(
                Code.PLAN_INVALID,
                f"the plan's parameter set is {manifest.encoding.parameter_set}, the group key's is {name}",
            )
