"""What a client is told when a request cannot be answered: a status, and an object in OpenAI's form."""

import json

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """``status`` is HTTP's; ``param``: the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code

    def to_dict(self) -> dict:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_dict()).encode()


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be taken as it is."""
    return ApiError(400, f"{param}: {message}", param, code)
