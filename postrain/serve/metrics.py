"""Counters of the server in Prometheus' text form."""

import collections
import threading

_HELP = {
    "postrain_requests_total": ("counter", "Responses by status."),
    "postrain_prompt_tokens_total": ("counter", "Tokens of prompts."),
    "postrain_cached_tokens_total": ("counter", "Tokens of prompts that were not computed anew."),
    "postrain_generated_tokens_total": ("counter", "Tokens generated."),
    "postrain_answers_total": ("counter", "Answers by what ended them."),
    "postrain_time_to_first_token_seconds": ("summary", "From the request to its first token."),
    "postrain_request_seconds": ("summary", "From the request to its end."),
    "postrain_open_answers": ("gauge", "Answers under way or waiting."),
    "postrain_running_answers": ("gauge", "Answers that have a slot."),
    "postrain_weights_version": ("gauge", "Number of the weights in use."),
}


class Metrics:
    def __init__(self):
        self._values: collections.Counter = collections.Counter()
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        with self._lock:
            self._values[name, tuple(labels.items())] += value

    def observe(self, name: str, value: float | None) -> None:
        """One more value of a summary."""
        if value is not None:
            self.add(f"{name}_sum", value)
            self.add(f"{name}_count")

    def format(self, gauges: dict[str, float]) -> str:
        lines = []
        with self._lock:
            values = dict(self._values)
        for name, (kind, text) in _HELP.items():
            if kind == "gauge" and name not in gauges:
                continue
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            if kind == "gauge":
                lines.append(f"{name} {gauges[name]:g}")
            for part in (f"{name}_sum", f"{name}_count") if kind == "summary" else (name,):
                found = {labels: value for (key, labels), value in values.items() if key == part}
                for labels, value in (found or ({} if kind == "gauge" else {(): 0})).items():
                    written = ",".join(f'{key}="{one}"' for key, one in labels)
                    lines.append(f"{part}{{{written}}} {value!r}" if written else f"{part} {value!r}")
        return "\n".join(lines) + "\n"
