"""Secrets through the API of Kubernetes: a server with TLS, tokens and the API's answers stands in for a cluster."""

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.deployment.cluster import Cluster
from services.deployment.config import CertificateConfig, PasswordConfig, SecretsConfig
from services.deployment.secrets import make_secrets
from services.embedded.ca import create_ca
from services.transparency.checkpoint import parse_signing_key

NAMESPACE = "mesh"


class ApiServer:
    """The part of the API that creates, reads and replaces Secrets. A Secret's type is immutable, as in Kubernetes."""

    def __init__(self, tls: TlsConfig, token: str) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_arguments: Any) -> None:
                pass

            def answer(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def handle_call(self) -> None:
                if self.headers["Authorization"] != f"Bearer {token}":
                    return self.answer(401, {"message": "Unauthorized"})
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
                prefix = f"/api/v1/namespaces/{NAMESPACE}/secrets"
                if not self.path.startswith(prefix):
                    return self.answer(403, {"message": f"cannot reach {self.path}"})
                return self.answer(*api.call(self.command, self.path.removeprefix(prefix).lstrip("/"), body))

            do_GET = do_POST = do_PUT = handle_call

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def call(self, method: str, name: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if body is not None:
            name = body["metadata"]["name"]
        there = self.secrets.get(name)
        if method == "POST" and there is not None:
            return 409, {"message": f"secrets {name!r} already exists"}
        if method != "POST" and there is None:
            return 404, {"message": f"secrets {name!r} not found"}
        if body is not None:
            if there is not None and there["type"] != body["type"]:
                return 422, {"message": "type: field is immutable"}
            self.secrets[name] = body
        return (201 if method == "POST" else 200), self.secrets[name]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    server = ApiServer(create_ca(tmp_path / "api", "kubernetes").issue_service("apiserver"), "the-token")
    (tmp_path / "token").write_text("the-token\n")
    yield server
    server.stop()


def client(api: ApiServer, tmp_path: Path) -> Cluster:
    return Cluster(("localhost", api.port), tmp_path / "token", tmp_path / "api/ca.pem")


def settings(*, dns: str = "registry.mesh.svc.cluster.local") -> SecretsConfig:
    return SecretsConfig(
        namespace=NAMESPACE,
        consortium="test.local",
        authority="authority",
        certificates=[CertificateConfig(secret="registry-tls", service="registry", dns=[dns])],
        passwords=[PasswordConfig(secret="db", username="registry_service")],
        audit_key="audit-key",
    )


def content(api: ApiServer, name: str, key: str) -> bytes:
    return base64.b64decode(api.secrets[name]["data"][key])


def certificate(api: ApiServer) -> x509.Certificate:
    return x509.load_pem_x509_certificate(content(api, "registry-tls", "tls.crt"))


def test_secrets_are_made_once_and_fit_their_users(api: ApiServer, tmp_path: Path) -> None:
    made = list(make_secrets(client(api, tmp_path), settings()))
    assert made == ["registry-tls: made", "db: made", "audit-key: made"]
    names = certificate(api).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://test.local/service/registry"]
    assert names.get_values_for_type(x509.DNSName) == ["registry.mesh.svc.cluster.local"]
    assert parse_signing_key(content(api, "audit-key", "audit.key").decode().strip()).name == "test.local/audit"
    assert len(content(api, "db", "password")) >= 32
    kinds = {name: item["type"] for name, item in api.secrets.items()}
    assert kinds["registry-tls"] == "kubernetes.io/tls"
    assert kinds["db"] == "kubernetes.io/basic-auth"
    before = json.dumps(api.secrets)
    again = list(make_secrets(client(api, tmp_path), settings()))
    assert again == ["registry-tls: kept", "db: kept", "audit-key: kept"]
    assert json.dumps(api.secrets) == before


def test_a_certificate_is_renewed_when_its_names_change_or_its_end_is_near(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(make_secrets(client(api, tmp_path), settings()))
    first = certificate(api)
    assert "registry-tls: renewed" in list(make_secrets(client(api, tmp_path), settings(dns="other.example")))
    second = certificate(api)
    assert second.serial_number != first.serial_number
    monkeypatch.setattr(
        "services.deployment.secrets._RENEW_BEFORE", second.not_valid_after_utc - first.not_valid_before_utc
    )
    assert "registry-tls: renewed" in list(make_secrets(client(api, tmp_path), settings(dns="other.example")))
    assert certificate(api).issuer == first.issuer


def test_a_certificate_of_another_authority_is_replaced(api: ApiServer, tmp_path: Path) -> None:
    list(make_secrets(client(api, tmp_path), settings()))
    del api.secrets["authority"]
    assert "registry-tls: renewed" in list(make_secrets(client(api, tmp_path), settings()))
    assert content(api, "registry-tls", "ca.crt") == content(api, "authority", "ca.crt")


def test_a_refusal_names_the_secret_and_an_absent_server_its_address(api: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another")
    with pytest.raises(FedmeshError, match="cannot read Secret authority: 401") as refused:
        list(make_secrets(client(api, tmp_path), settings()))
    assert refused.value.code is Code.PERMISSION_DENIED
    away = Cluster(("localhost", 1), tmp_path / "token", tmp_path / "api/ca.pem")
    with pytest.raises(FedmeshError, match="localhost:1 does not answer") as caught:
        away.secret(NAMESPACE, "x")
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_outside_of_a_cluster_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(FedmeshError, match="runs in a pod on Kubernetes"):
        Cluster.of_this_pod()
