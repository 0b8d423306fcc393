"""What the document can't say of this program, for schemathesis."""

import json

import schemathesis


@schemathesis.hook
def map_body(context, body):
    """JSON Schema takes 5.0 for an integer; the program, which never rounds, does not."""
    if isinstance(body, list):
        return [map_body(context, line) for line in body]
    if not isinstance(body, dict):
        return body
    whole = lambda value: isinstance(value, float) and value.is_integer()
    return {key: int(value) if whole(value) else value for key, value in body.items()}


@schemathesis.serializer("application/x-ndjson")
def lines(context, body):
    """An array goes as its items, a line each; what is none, as one line."""
    body = body if isinstance(body, list) else [body]
    return "".join(json.dumps(line) + "\n" for line in body).encode()


@schemathesis.hook
def filter_case(context, case):
    """A form says an empty list, and anything else that has no value, by leaving the parameter out."""
    query = case.query or {}
    return "user_ids" not in query or bool(query["user_ids"])


@schemathesis.hook
def map_case(context, case):
    """`GET /get` wants one of two parameters; OpenAPI can only call each of them required or not."""
    if case.operation.path == "/get" and case.meta.generation.mode.is_positive:
        query = dict(case.query or {})
        if "user_ids" in query:
            query.pop("user_id", None)
        query = query or {"user_id": "alice"}
        case.query = query
    return case
