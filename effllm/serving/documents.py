"""What a browser gets: the page to try the models, the documentation, and the OpenAPI document."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import re
from typing import Any

import orjson

from effllm.serving.exchange import Call, Reply, Shared

HTML = b"text/html; charset=utf-8"
BLOCKS = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def policy(page: str) -> bytes:
    """Return the Content-Security-Policy that lets a page run its own inline script and style, and nothing else."""
    own: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in BLOCKS.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        own[kind].append(f"'sha256-{digest}'")
    parts = [
        "default-src 'none'",
        f"script-src {' '.join(own['script'])}" if own["script"] else "script-src 'none'",
        f"style-src {' '.join(own['style'])}" if own["style"] else "style-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(parts).encode()


def _html_reply(page: str) -> Reply:
    headers = [
        (b"content-security-policy", policy(page)),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
    return Reply(page.encode(), media_type=HTML, headers=headers)


@functools.cache
def _page() -> str:
    """Return the page with its style and script put in."""
    folder = importlib.resources.files("effllm.serving").joinpath("page")
    page, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    return page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)


async def page(shared: Shared, call: Call, body: None) -> Reply:
    """Return the page to try the models."""
    return _html_reply(_page())


async def openapi(shared: Shared, call: Call, body: None) -> Reply:
    """Return the OpenAPI document."""
    return Reply(orjson.dumps(document()))


async def docs(shared: Shared, call: Call, body: None) -> Reply:
    """Return the documentation as a page without scripts, made from the OpenAPI document."""
    return _html_reply(_docs())


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document of all operations."""
    from effllm.serving.openapi import describe  # noqa: PLC0415 - the table names this module's functions
    from effllm.serving.operations import operations  # noqa: PLC0415

    return describe(operations())


DOCS_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{overflow:auto;padding:.6rem;border:1px solid #8886;border-radius:6px}
summary{cursor:pointer;padding:.35rem 0}summary code{font-weight:600}details{border-bottom:1px solid #8884}
h2{margin-top:2rem}table{border-collapse:collapse}td{padding:.15rem .8rem .15rem 0;vertical-align:top}
a:focus-visible,summary:focus-visible{outline:3px solid #4a90d9}
"""


@functools.cache
def _docs() -> str:
    found = document()
    by_tag: dict[str, list[str]] = {}
    for path, methods in found["paths"].items():
        for method, one in methods.items():
            by_tag.setdefault(one["tags"][0], []).append(_operation(method, path, one))
    sections = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(items)}" for tag, items in by_tag.items())
    schemas = "".join(
        f'<details id="{html.escape(name)}"><summary><code>{html.escape(name)}</code></summary>'
        f"<p>{html.escape(schema.get('description', ''))}</p>{_fields(schema)}</details>"
        for name, schema in found["components"]["schemas"].items()
    )
    text = "".join(f"<p>{html.escape(part)}</p>" for part in found["info"]["description"].split("\n\n"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>effllm serve: API</title><style>{DOCS_STYLE}</style><h1>effllm serve</h1>{text}"
        '<p><a href="/">Try the models</a> · <a href="/openapi.json">openapi.json</a></p>'
        f"{sections}<h2>Schemas</h2>{schemas}</html>"
    )


def _operation(method: str, path: str, one: dict[str, Any]) -> str:
    parts = [f"<p>{html.escape(one.get('description', ''))}</p>"]
    content = one.get("requestBody", {}).get("content", {})
    for media in content.values():
        parts.append(f"<p>Body: {_type(media['schema'])}</p>")
    rows = []
    for status, response in one["responses"].items():
        types = " ".join(_type(media.get("schema", {})) for media in response.get("content", {}).values())
        rows.append(f"<tr><td>{status}</td><td>{html.escape(response['description'])}</td><td>{types}</td></tr>")
    parts.append(f"<table>{''.join(rows)}</table>")
    title = f"<code>{method.upper()} {html.escape(path)}</code> {html.escape(one['summary'])}"
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>"


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    needed = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        default = f" = {html.escape(str(field['default']))}" if name not in needed and "default" in field else ""
        note = html.escape(field.get("description", ""))
        rows.append(
            f"<tr><td><code>{html.escape(name)}{default}</code></td><td>{_type(field)}</td><td>{note}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#{name}"><code>{name}</code></a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of ({_type(schema.get('items', {}))})"
    if "enum" in schema:
        return " or ".join(f"<code>{html.escape(repr(value))}</code>" for value in schema["enum"])
    return html.escape(str(schema.get("const", schema.get("type", "any"))))
