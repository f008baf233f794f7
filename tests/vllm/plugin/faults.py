"""Faults of the plugin, planted on purpose: the comparison must notice them."""

from typing import Any


def plant(fault: str | None) -> None:
    """Plant a fault in this process, before vLLM loads the plugin."""
    if fault is None:
        return
    from steering_vectors.serving import admitting, arming
    from steering_vectors.serving.bank import Bank

    if fault == "no key":
        admitting._keyed = lambda original: original
    elif fault == "salt without the length":
        admitting._keyed = _salted
    elif fault == "not armed":
        arming._arm = lambda *_: None
    elif fault == "multipliers 5 % off":
        fill = Bank._fill
        Bank._fill = lambda self, row, wanted: fill(self, row, tuple((key, 1.05 * m) for key, m in wanted))
    else:
        raise ValueError(fault)


def _salted(original: Any) -> Any:
    """The salt of a request has its vectors, multipliers and selection, and not the token at which steering begins."""

    def generate_keys(request: Any, start: int, end: int, index: int) -> Any:
        keys, index = original(request, start, end, index)
        asked = request.sampling_params.extra_args
        return (*(keys or ()), ("cache_salt", asked["steering"])) if asked and start == 0 else keys, index

    return generate_keys
