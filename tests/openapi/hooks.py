"""What the document can't say of this program, for schemathesis."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    """JSON Schema takes 5.0 for an integer; the program, which never rounds, does not."""
    if not isinstance(body, dict):
        return body
    whole = lambda value: isinstance(value, float) and value.is_integer()
    return {key: int(value) if whole(value) else value for key, value in body.items()}
