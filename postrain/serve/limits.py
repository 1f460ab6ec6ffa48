"""What a server takes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused."""

    slots: int = 16  # answers computed at a time
    waiting: int = 256  # answers that wait for a slot beyond these; more get 429
    steps: int = 4  # tokens of an answer between two looks at the queue
    warm_length: int = 0  # all that contexts of this many tokens need is compiled before the first request; 0: some
    max_length: int = 0  # tokens of prompt and answer; 0: the model's positions
    max_bytes: int = 4 << 20  # of a request's body
    seconds: float = 600.0  # of a request
    api_key: str = ""  # "": none is asked for
