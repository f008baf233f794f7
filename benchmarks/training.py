"""Time and memory of training, against a plain loop, the public library 0.12.2, and the bare decoder.

    python benchmarks/training.py [--model FOLDER] [--device cuda] [--caa FILE] [--public DIR] [--only NAME …]

``--model`` is a folder with a causal language model and its tokenizer. Without it, a random Llama takes its place, of a
billion weights in bfloat16 on a GPU and tiny on a CPU, whose tokens are bytes; it needs the folder of the project on
PYTHONPATH, and runs no ``memory``. ``--caa`` is a file of contrastive activation
addition's data (question, answer_matching_behavior, answer_not_matching_behavior); without it, questions of the same
shape are made up. ``--public`` is where ``pip install --no-deps --target DIR steering-vectors==0.12.2`` put it.

Each ratio is the median over rounds in which both sides ran one after the other, in changing order.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering_vectors import SteeringVector, pca_aggregator, train_steering_vector

if "--serve" not in sys.argv:  # in the other process it is the public package that bears the name
    from steering_vectors._extraction import extractor
    from steering_vectors._extraction.packs import PACK_SIZE, cheapest_packs
    from steering_vectors._extraction.read_model import ReadModel
    from steering_vectors._extraction.verification import Verification
    from steering_vectors._extraction.ways import Packed

Pairs = list[tuple[str, str]]
Layers = Sequence[int] | None
BATCH_SIZES = (1, 4, 16)
KINDS = ["choices", "personas", "unrelated", "pca", "limit", "verification", "memory"]


def choices(file: Path | None, tokenizer: Any, count: int) -> Pairs:
    """Pairs that differ in their last token, the answer's letter."""
    if file is not None:
        items = json.loads(file.read_text())[:count]
        asked = [(i["question"], i["answer_matching_behavior"], i["answer_not_matching_behavior"]) for i in items]
    else:
        draw = random.Random(0)
        words = ["people", "who", "read", "old", "books", "about", "ships", "often", "say", "so", "in", "the", "town"]
        asked = []
        for number in range(count):
            claim = " ".join(draw.choices(words, k=60))
            question = f"Person {number}: {claim}. Do you agree?\n\nChoices:\n (A) I agree\n (B) I do not"
            asked.append((question, *draw.sample([" (A)", " (B)"], 2)))

    def rendered(question: str, answer: str) -> str:
        message = [{"role": "user", "content": question}]
        asked = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        return asked + answer.strip()[:2]

    return [(rendered(question, match), rendered(question, other)) for question, match, other in asked]


def personas(_tokenizer: Any, count: int) -> Pairs:
    """A persona in the request × the beginnings of sentences, word by word."""
    draw = random.Random(1)
    starts = ["I went to", "Last year the", "My friends say", "When it rains", "Nobody told me", "The house was"]
    rest = ["a", "long", "way", "over", "hills", "until", "we", "found", "what", "was", "lost", "for", "many", "years"]
    pairs: Pairs = []
    while len(pairs) < count:
        sentence = [*draw.choice(starts).split(), *draw.choices(rest, k=draw.randint(4, 12))]
        for end in range(1, len(sentence)):
            said = " ".join(sentence[:end])
            happy, sad = (f"[INST] Act as if you're extremely {mood}. [/INST] {said}" for mood in ("happy", "sad"))
            pairs.append((happy, sad))
    return pairs[:count]


def unrelated(_tokenizer: Any, count: int) -> Pairs:
    """Prompts that share nothing, of about one length."""
    draw = random.Random(2)
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(20)) for _ in range(2 * count)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def ours(model: Any, tokenizer: Any, pairs: Pairs, layers: Layers, batch_size: int) -> SteeringVector:
    return train_steering_vector(model, tokenizer, pairs, layers=layers, batch_size=batch_size)


def plain_loop(model: Any, tokenizer: Any, pairs: Pairs, layers: Layers, batch_size: int) -> SteeringVector:
    """As 0.12.2 does it: each side apart, padded, all layers and the logits, every layer's whole activation cloned."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    numbers = range(len(blocks)) if layers is None else layers
    rows: dict[int, tuple[list[Any], list[Any]]] = {layer: ([], []) for layer in numbers}
    for start in range(0, len(pairs), batch_size):
        for side in (0, 1):
            texts = [pair[side] for pair in pairs[start : start + batch_size]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
            kept: dict[int, torch.Tensor] = {}

            def keep(_m: Any, _a: Any, output: Any, layer: int = 0, kept: dict[int, torch.Tensor] = kept) -> None:
                kept[layer] = (output if isinstance(output, torch.Tensor) else output[0]).clone().detach()

            handles = [blocks[layer].register_forward_hook(partial(keep, layer=layer)) for layer in numbers]
            with torch.no_grad():
                model(**inputs)
            for handle in handles:
                handle.remove()
            last = inputs["attention_mask"].sum(dim=1) - 1
            for layer, activation in kept.items():
                rows[layer][side].append(activation[torch.arange(len(texts)), last])
    return SteeringVector({n: (torch.cat(p) - torch.cat(q)).mean(dim=0) for n, (p, q) in rows.items()})


def bare_decoder(model: Any, tokenizer: Any, pairs: Pairs, layers: Layers, batch_size: int) -> None:
    """The decoder over the packs that ours runs, as deep, under a plain causal mask and without hooks."""
    ids = [tokenizer(text)["input_ids"] for pair in pairs for text in pair]
    tokens = 2 * batch_size * max(map(len, ids))
    packs = cheapest_packs(
        ids, [[len(row) - 1] for row in ids], range(len(ids)), most=min(tokens, 4 * max(map(len, ids)))
    )
    packs.sort(key=len, reverse=True)
    most = max(1, tokens // max(PACK_SIZE, len(packs[0])))
    decoder, blocks = model.model, model.model.layers
    if layers is not None:
        decoder.layers = blocks[: max(layers) + 1]
    try:
        for start in range(0, len(packs), most):
            group = packs[start : start + most]
            width = max(map(len, group))
            rows = [pack.input_ids + [0] * (width - len(pack)) for pack in group]
            with torch.no_grad():
                decoder(torch.tensor(rows, device=model.device), use_cache=False)
    finally:
        decoder.layers = blocks


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """The median of slow's time over fast's, and both medians in seconds."""
    fast()
    times = []
    for number in range(rounds):
        order = (slow, fast) if number % 2 else (fast, slow)
        measured = {function: timed(function) for function in order}
        times.append((measured[slow], measured[fast]))
    return (
        statistics.median(s / f for s, f in times),
        statistics.median(s for s, _ in times),
        statistics.median(f for _, f in times),
    )


def best_batch_size(function: Callable[..., Any], *args: Any) -> int:
    """The one with which ``function`` is fastest on a few pairs."""
    model, tokenizer, pairs, layers = args
    return min(BATCH_SIZES, key=lambda size: timed(lambda: function(model, tokenizer, pairs[:16], layers, size)))


def agreement(some: SteeringVector, other: SteeringVector) -> float:
    """The lowest cosine between two vectors' directions."""
    pairs = [(some.layer_activations[n], other.layer_activations[n]) for n in some.layers]
    return min(float(torch.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0)) for a, b in pairs)


class Public:
    """The public package, in a process of its own that loads the same model; it answers with its time."""

    def __init__(self, folder: str, model: str) -> None:
        command = [sys.executable, __file__, "--serve", "--model", model]
        environment = {**os.environ, "PYTHONPATH": folder}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, _m: Any, _t: Any, pairs: Pairs, layers: Layers, batch_size: int) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([pairs, layers, batch_size]), file=self._process.stdin, flush=True)
        while not self._process.stdout.readline().startswith("done"):
            pass


def serve(folder: str) -> None:
    import steering_vectors as public

    model, tokenizer = load(folder)
    for line in sys.stdin:
        pairs, layers, batch_size = json.loads(line)
        samples = [tuple(pair) for pair in pairs]
        public.train_steering_vector(model, tokenizer, samples, layers=layers, batch_size=batch_size)
        print("done", flush=True)


def load(folder: str) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def random_model(device: str) -> tuple[Any, Any]:
    import steering

    from tests import tiny

    return steering.billion() if device == "cuda" else steering.tiny(), tiny.tokenizer(chat_template=tiny.CHATML)


def peak_memory(folder: str, name: str, pairs: Pairs, batch_size: int) -> float:
    """The most memory above that of the loaded model, in MB, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (folder, name, pairs, batch_size))


def _peak(folder: str, name: str, pairs: Pairs, batch_size: int) -> float:
    model, tokenizer = load(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    globals()[name](model, tokenizer, pairs, None, batch_size)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - before) / 1e6


def share_of_verification(model: Any, tokenizer: Any, pairs: Pairs, rounds: int) -> tuple[float, float, float]:
    """Return the share of a training that takes to compare tokens with their prompts alone, and its time: medians.

    The second number is the least that can be had: the share of a plain pass of the same prompts through the decoder.
    """
    spent = [0.0]
    prompts: list[Sequence[int]] = []

    def counting(owner: Any, name: str) -> Callable[..., Any]:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "alone":
                prompts.append(args[1])
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return counted

    parts = [(ReadModel, "alone"), (Verification, "due"), (Verification, "note"), (extractor, "conditions_of")]
    before = [getattr(owner, name) for owner, name in parts]
    shares, times, least = [], [], []
    for owner, name in parts:
        setattr(owner, name, counting(owner, name))
    try:
        for _ in range(rounds):
            spent[0] = 0
            prompts.clear()
            times.append(timed(lambda: ours(model, tokenizer, pairs, None, 1)))
            shares.append(spent[0] / times[-1])
            least.append(timed(lambda: plain_passes(model, prompts)) / times[-1])
    finally:
        for (owner, name), function in zip(parts, before, strict=True):
            setattr(owner, name, function)
    return statistics.median(shares), statistics.median(least), statistics.median(times)


@torch.no_grad()
def plain_passes(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Run each prompt alone through the model's decoder, without hooks."""
    for prompt in prompts:
        model.model(torch.tensor([prompt], device=model.device), use_cache=False)


@contextmanager
def rows_only() -> Iterator[None]:
    """Ours as on a model that takes no packs."""
    find = extractor.find_ways
    extractor.find_ways = lambda *args, **kwargs: [w for w in find(*args, **kwargs) if not isinstance(w, Packed)]
    try:
        yield
    finally:
        extractor.find_ways = find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--caa", type=Path)
    parser.add_argument("--public")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--personas", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=KINDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    model, tokenizer = load(options.model) if options.model else random_model(options.device)
    model.to(options.device)
    middle = [len(model.model.layers) // 2]
    asked = choices(options.caa, tokenizer, options.pairs)
    if "choices" in options.only:
        faster("choices", options, model, tokenizer, asked, None)
        faster("choices", options, model, tokenizer, asked, middle)
    if "personas" in options.only:
        faster("personas", options, model, tokenizer, personas(tokenizer, options.personas), None)
    if "unrelated" in options.only:
        faster("unrelated", options, model, tokenizer, unrelated(tokenizer, 16), None)
        with rows_only():
            faster("without packs", options, model, tokenizer, asked[:24], None)
    if "pca" in options.only:
        differences = torch.randn(1000, 2048, generator=torch.Generator().manual_seed(0)) + 0.1
        args = (differences, torch.zeros_like(differences))
        doubled = torch.cat([differences, -differences])
        times, slow, fast = ratio(lambda: torch.svd(doubled), partial(pca_aggregator(), *args), 5)
        print(f"pca_aggregator, 1,000 pairs x 2,048: {times:.1f} x faster than torch.svd of the doubled data", end=" ")
        print(f"({slow:.3f} s, ours {fast:.3f} s)")
    if "limit" in options.only:
        for layers in (None, middle):
            args = (model, tokenizer, asked, layers, 4)
            times, slow, fast = ratio(partial(ours, *args), partial(bare_decoder, *args), options.rounds)
            print(f"ours over the bare decoder, layers {layers or 'all'}: {times:.2f} ({slow:.2f} s, {fast:.2f} s)")
    if "verification" in options.only:
        pairs = personas(tokenizer, 192)
        share, least, seconds = share_of_verification(model, tokenizer, pairs, 2 * options.rounds + 1)
        print(f"verification, {len(pairs)} persona pairs: {100 * share:.1f} % of a training of {seconds:.2f} s", end="")
        print(f"; plain passes of the same prompts alone, without hooks: {100 * least:.1f} %")
    if "memory" in options.only and options.model:
        size = best_batch_size(plain_loop, model, tokenizer, asked, None)
        theirs, mine = (peak_memory(options.model, name, asked, size) for name in ("plain_loop", "ours"))
        print(
            f"peak memory over the weights, batch size {size}: {theirs:.0f} MB, ours {mine:.0f} MB: {mine / theirs:.2f}"
        )


def faster(name: str, options: argparse.Namespace, model: Any, tokenizer: Any, pairs: Pairs, layers: Layers) -> None:
    """Print how many times faster ours is than each of the others, at the other's best batch size."""
    others: dict[str, Callable[..., Any]] = {"plain loop": plain_loop}
    if options.public:
        others["steering-vectors 0.12.2"] = Public(options.public, options.model)
    for against, function in others.items():
        size = best_batch_size(function, model, tokenizer, pairs, layers)
        theirs, mine = (partial(f, model, tokenizer, pairs, layers, size) for f in (function, ours))
        times, slow, fast = ratio(theirs, mine, 1 if name == "personas" else options.rounds)
        text = f"{name}, {len(pairs)} pairs, layers {layers or 'all'}: {times:.2f} x faster than {against} "
        text += f"({slow:.2f} s, ours {fast:.2f} s, batch size {size})"
        if against == "plain loop" and (len(pairs) <= options.pairs or not options.model):
            text += f", cosine {agreement(mine(), theirs()):.6f}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
