"""Time of a decoding step and of a prefill, steered at all layers, against unsteered, and the public library's hook.

    python benchmarks/steering.py [--model FOLDER] [--device cuda] [--rounds 30] [--compiled]

A tiny random Llama always, the model in ``--model``, and on a GPU a random Llama of a billion weights in bfloat16. Each
round runs every variant, in changing order; the ratios are medians over the rounds. ``--compiled`` times models that
torch.compile made, with steerings of all tokens. First it times entering and leaving ``apply`` at all layers, also
inside another vector's block. On a GPU the profiler counts what a decoding step copies between host and device, and
where it waits.
"""

import argparse
import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from steering_vectors import SteeringVector, generated

PROMPT, STEPS = 64, 8


def tiny() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()


def smollm2_sized() -> Any:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=3, **sizes)).eval()


def billion() -> Any:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=4, **sizes)).bfloat16().eval()


@contextmanager
def public_hook(model: Any, vector: SteeringVector) -> Iterator[None]:
    """As 0.12.2 steers all tokens: a mask made anew in each layer of each pass, and the output changed in place."""

    def hook_for(direction: Tensor) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            activation = output if isinstance(output, Tensor) else output[0]
            own = direction.to(activation.device)
            mask = torch.zeros(activation.shape[1])
            mask[slice(0, None)] = 1
            mask = mask.reshape(1, -1, 1).to(activation.device)
            activation[None] = activation + (mask * own)
            return output

        return hook

    blocks = model.model.layers
    handles = [blocks[n].register_forward_hook(hook_for(d)) for n, d in vector.layer_activations.items()]
    yield
    for handle in handles:
        handle.remove()


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments of a pass with a cache, by the name that this transformers has for it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {"use_cache": True, name: cache}


def wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def time_prefill(model: Any, run: Any, inputs: dict[str, Tensor]) -> float:
    wait(model)
    begin = time.perf_counter()
    with torch.no_grad():
        run(**inputs, **cached(model, DynamicCache(config=model.config)))
    wait(model)
    return time.perf_counter() - begin


def time_steps(model: Any, run: Any, inputs: dict[str, Tensor], steps: int) -> float:
    """Of one decoding step after the prompt."""
    options, mask = cached(model, DynamicCache(config=model.config)), inputs["attention_mask"]
    token = inputs["input_ids"][:, :1]
    with torch.no_grad():
        run(**inputs, **options)
        wait(model)
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            longer = torch.nn.functional.pad(mask, (0, step), value=1)
            run(input_ids=token, attention_mask=longer, **options)
        wait(model)
    return (time.perf_counter() - begin) / steps


def measure(name: str, model: Any, rounds: int, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    vector = SteeringVector({n: 0.01 * torch.randn(width, generator=generator) for n in range(layers)})
    ids = torch.randint(5, 500, (1, PROMPT), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run = torch.compile(model, dynamic=True) if compiled else model
    variants: dict[str, Callable[[], Any]] = {
        "unsteered": nullcontext,
        "all tokens": lambda: vector.apply(model),
        "generated(inputs)": lambda: vector.apply(model, tokens=generated(inputs)),
        "0.12.2's hook": lambda: public_hook(model, vector.to(model.dtype)),
    }
    if compiled:
        variants = {key: variants[key] for key in ("unsteered", "all tokens")}
    for what, timed in (
        ("step", lambda: time_steps(model, run, inputs, STEPS)),
        ("prefill", lambda: time_prefill(model, run, inputs)),
    ):
        times: dict[str, list[float]] = {key: [] for key in variants}
        for number in range(-2, rounds):  # the first two only warm up
            for key in random.sample(sorted(variants), len(variants)):
                with variants[key]():
                    taken = timed()
                if number >= 0:
                    times[key].append(taken)
        report(f"{name}, {what}{', compiled' if compiled else ''}", times)
    if model.device.type == "cuda" and not compiled:
        count_transfers(model, vector, inputs)


def measure_entering(name: str, model: Any, rounds: int) -> None:
    """Print the milliseconds that applying a vector at all layers takes, entered and left, with no pass between."""
    generator = torch.Generator().manual_seed(0)
    blocks, hidden = model.config.num_hidden_layers, model.config.hidden_size
    vectors = [SteeringVector({n: torch.randn(hidden, generator=generator) for n in range(blocks)}) for _ in range(2)]

    def milliseconds(vector: SteeringVector, tokens: Any) -> float:
        begin = time.perf_counter()
        with vector.apply(model, tokens=tokens):
            pass
        return 1000 * (time.perf_counter() - begin)

    print(f"{name}, entering and leaving apply at {blocks} layers of {len(list(model.modules()))} modules")
    for what, tokens in (("all tokens", None), ("generated()", generated())):
        first = [milliseconds(vectors[0], tokens) for _ in range(rounds)]
        with vectors[1].apply(model, tokens=tokens):
            second = [milliseconds(vectors[0], tokens) for _ in range(rounds)]
        medians = f"{statistics.median(first):.2f} ms, as a second vector {statistics.median(second):.2f} ms"
        print(f"    {what:18} {medians}", flush=True)


def report(title: str, times: dict[str, list[float]]) -> None:
    plain = times["unsteered"]
    print(f"{title}: unsteered {1000 * statistics.median(plain):.3f} ms", flush=True)
    for key, own in times.items():
        if key != "unsteered":
            ratios = [mine / other for mine, other in zip(own, plain, strict=True)]
            print(f"    {key:18} {statistics.median(ratios):6.3f} of unsteered", flush=True)
    if "0.12.2's hook" in times:
        public = times["0.12.2's hook"]
        ratio = statistics.median(own / hook for own, hook in zip(times["all tokens"], public, strict=True))
        rounds = zip(times["generated(inputs)"], public, plain, strict=True)
        extra = statistics.median((own - bare) / (hook - bare) for own, hook, bare in rounds if hook > bare)
        print(
            f"    all tokens take {ratio:.3f} of its time, generated(inputs) {extra:.2f} of its extra time", flush=True
        )


def count_transfers(model: Any, vector: SteeringVector, inputs: dict[str, Tensor]) -> None:
    """Copies between host and device, and waits, of a prefill and of decoding steps."""
    variants = {"unsteered": nullcontext(), "all tokens": vector.apply(model)}
    for key, context in {**variants, "generated(inputs)": vector.apply(model, tokens=generated(inputs))}.items():
        with context:
            time_steps(model, model, inputs, STEPS)
            prefill = transfers(lambda: time_prefill(model, model, inputs))
            steps = transfers(lambda: time_steps(model, model, inputs, STEPS)) - prefill
        print(
            f"    {key:18} transfers and waits: {prefill} in a prefill, {steps} in {STEPS} steps after it", flush=True
        )


def transfers(work: Callable[[], object]) -> int:
    with torch.profiler.profile() as profile:
        work()
    wanted = ("Memcpy HtoD", "Memcpy DtoH", "cudaStreamSynchronize")
    return sum(event.count for event in profile.key_averages() if any(name in event.key for name in wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    random.seed(0)
    measure_entering("a random SmolLM2-135M", smollm2_sized(), options.rounds)
    measure("tiny", tiny(), 5 * options.rounds, options.compiled)
    if options.model:
        measure(
            "the model", AutoModelForCausalLM.from_pretrained(options.model).eval(), options.rounds, options.compiled
        )
    if options.device == "cuda":
        measure("a billion", billion(), options.rounds, options.compiled)


if __name__ == "__main__":
    main()
