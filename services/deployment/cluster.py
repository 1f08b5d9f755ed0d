"""The Secrets of a namespace through the Kubernetes API, with the account of this pod; no more of the API than that."""

import base64
import http.client
import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from services.common.errors import Code, FedmeshError

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S: Final = 15.0
_CONFLICT: Final = 409
_NOT_FOUND: Final = 404


class Cluster:
    """An API server at (host, port). token: file with the bearer token. authority: PEM file of the server's CA."""

    def __init__(self, address: tuple[str, int], token: Path, authority: Path) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when the files cannot be read."""
        self._address = address
        try:
            self._token = token.read_text(encoding="ascii").strip()
            self._context = ssl.create_default_context(cafile=str(authority))
        except OSError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"no usable account of a pod: {error}; run this in a pod with automountServiceAccountToken: true",
            ) from error

    @classmethod
    def of_this_pod(cls) -> Self:
        """The cluster that this pod runs in. Raises: FedmeshError(CONFIG_INVALID) outside of a cluster."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise FedmeshError(Code.CONFIG_INVALID, "this command runs in a pod on Kubernetes: there is none here")
        return cls((host, int(port)), _ACCOUNT / "token", _ACCOUNT / "ca.crt")

    def secret(self, namespace: str, name: str) -> dict[str, bytes] | None:
        """The content of a Secret; None when there is none. Raises: as `create_secret`."""
        status, answer = self._ask("GET", f"/api/v1/namespaces/{namespace}/secrets/{name}")
        if status == _NOT_FOUND:
            return None
        _require_done(status, answer, f"read Secret {name}")
        return {key: base64.b64decode(value) for key, value in (answer.get("data") or {}).items()}

    def create_secret(
        self, namespace: str, name: str, kind: str, labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> bool:
        """Make a Secret; False when there is one already, which stays as it is.

        Raises: FedmeshError(SERVICE_UNAVAILABLE) when the API server is away; (PERMISSION_DENIED) when it refuses.
        """
        body = _secret(name, kind, labels, content)
        status, answer = self._ask("POST", f"/api/v1/namespaces/{namespace}/secrets", body)
        if status == _CONFLICT:
            return False
        _require_done(status, answer, f"create Secret {name}")
        return True

    def replace_secret(
        self, namespace: str, name: str, kind: str, labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> None:
        """Replace the content of a Secret. Raises: as `create_secret`."""
        body = _secret(name, kind, labels, content)
        status, answer = self._ask("PUT", f"/api/v1/namespaces/{namespace}/secrets/{name}", body)
        _require_done(status, answer, f"replace Secret {name}")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        host, port = self._address
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=self._context)
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE, f"the Kubernetes API at {host}:{port} does not answer: {error}"
            ) from error
        finally:
            connection.close()


def _secret(name: str, kind: str, labels: Mapping[str, str], content: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": kind,
        "metadata": {"name": name, "labels": dict(labels)},
        "data": {key: base64.b64encode(value).decode("ascii") for key, value in content.items()},
    }


def _require_done(status: int, answer: Mapping[str, Any], what: str) -> None:
    if status in (200, 201):
        return
    code = Code.PERMISSION_DENIED if status in (401, 403) else Code.SERVICE_UNAVAILABLE
    raise FedmeshError(code, f"cannot {what}: {status} {answer.get('message', '')}")
