"""Errors of the HTTP interface, as problem documents (RFC 9457)."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that gets no result. `detail` is one line: the rule, what was received, the fix; `facts` go beside it."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **facts: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.facts = status, detail, headers, facts

    def response(self) -> Response:
        """The document, with its status."""
        document = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail, **self.facts}
        return Response(json.dumps(document), self.status, self.headers, MEDIA_TYPE)
