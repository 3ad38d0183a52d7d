"""The page to chat with: one file, read when the server starts, which may run and load nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PATH = "/"
FILE = Path(__file__).with_name("page.html")


def page_route() -> Route:
    """The page's route. It needs no key: whatever the page shows it asks for, with the key that the user gives it."""
    body = FILE.read_bytes()
    headers = {
        "content-security-policy": _policy(body.decode()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page(request: Request) -> Response:
        return Response(body, headers=headers, media_type="text/html")

    return Route(PATH, page)


def _policy(page: str) -> str:
    """The Content-Security-Policy. Hashes, and not 'unsafe-inline': an answer that became HTML by a fault of the page would run nothing."""
    hashes = {
        name: " ".join(_hash(text) for text in re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)) for name in ("script", "style")
    }
    rules = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text becomes HTML
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
