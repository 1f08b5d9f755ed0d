"""Asks an issuer over HTTPS: no redirects, bounded answers, an authority of one's own if need be."""

import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError

from services.common.errors import Code, FedmeshError

_TIMEOUT_S: Final = 3.0
_MOST_BYTES: Final = 1 << 20


class Web:
    """Reads JSON. ca: PEM file with the only authorities that are trusted; the system's by default."""

    def __init__(self, ca: Path | None) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when the CA file cannot be read."""
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot read the issuer's CA {ca}: {error}") from error
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirect())

    def read(self, url: str, body: bytes | None = None) -> Any:
        """What a URL answers to a GET, or to a POST of a form.

        Raises: OSError (HTTPError for a status that is not 2xx), ValueError when it is no JSON or too large.
        """
        with self._opener.open(url, body, timeout=_TIMEOUT_S) as answer:
            content = answer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"{url} is larger than {_MOST_BYTES} bytes")
        return json.loads(content)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead from HTTPS to anywhere."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        raise HTTPError(req.full_url, code, "the issuer redirects, which is not followed", headers, fp)
