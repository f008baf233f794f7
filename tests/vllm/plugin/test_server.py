"""One server over HTTP: requests of all kinds at once, errors, and vectors that come and go."""

import asyncio
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from steering_vectors import SteeringVector
from steering_vectors.serving import check, request
from tests import tiny
from tests.vllm.plugin.comparison import SIZES, Request, Served, compared, ids, prepared
from tests.vllm.plugin.conftest import ShowCase
from tests.vllm.plugin.over_http import Server, answer_of, asked, body, server
from tests.vllm.plugin.test_exact import EXACT, SEVEN

pytest.importorskip("vllm")
aiohttp = pytest.importorskip("aiohttp")
pytestmark = pytest.mark.xdist_group("server")  # one process starts one server for all


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    made = prepared(folder, tiny.build("llama", **SIZES))
    tiny.tokenizer(chat_template=tiny.CHATML).save_pretrained(made.path)
    return made


@pytest.fixture(scope="module")
def running(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    allowed = {"STEERING_VECTORS_LOADING": "1", "STEERING_VECTORS_CAPACITY": "5"}
    # vLLM's kernels for CPUs keep up to 1,024 products of matrices, one for each number of tokens in a step: with so many
    # the memory grows for hours, steered or not.
    allowed |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
    # So few blocks that the soak uses all of them, since memory is counted once it is used.
    limits = ("--max-num-seqs", "16", "--num-gpu-blocks-override", "256")
    with server(served, tmp_path_factory.mktemp("log") / "log", *limits, **allowed) as made:
        yield made


def completed(running: Server, one: Request) -> tuple[int, Any, str | None]:
    return asked(f"{running.url}/v1/completions", body(one))


def test_a_client_sees_the_vectors(running: Server) -> None:
    found = check(running.url)
    assert {name: vector["layers"] for name, vector in found["vectors"].items()} == {
        "both": [1, 2],
        "first": [0],
        "middle": [1],
    }
    assert (found["capacity"], found["loaded"], found["loading"], found["layers"]) == (5, 3, True, [0, 1, 2])


def test_requests_of_all_kinds_at_once(running: Server, served: Served, show: ShowCase) -> None:
    with ThreadPoolExecutor(14) as pool:
        found = list(pool.map(lambda one: completed(running, one), SEVEN * 2))
    assert [status for status, _, _ in found] == [200] * 14
    assert [header for _, _, header in found] == [steering for _, steering, _ in SEVEN] * 2
    off, effect = compared(served, SEVEN * 2, [answer_of(answer) for _, answer, _ in found])
    show("over HTTP, fourteen requests at once", off, effect)
    assert off < EXACT
    assert effect > 100 * EXACT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("steering", "reason"),
    [
        ("sad:1", "there is no steering vector 'sad'"),
        ("both:much", "the multiplier of 'both' must be a finite number"),
        ("both:nan", "the multiplier of 'both' must be a finite number"),
        (1.5, "steering must be a string, got float"),
        ("both:1@last", "steering selects 'last'"),
        ("both:1," * 1000, "at most 4096 are allowed"),
        ("both:1e38,middle:3e38", "the model's dtype ends at"),
    ],
)
def test_a_bad_request_is_answered_by_400_and_the_reason(
    running: Server, route: str, steering: Any, reason: str, stream: bool
) -> None:
    content = {"prompt": [9, 10]} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    sent = {"model": "base", "max_tokens": 2, "stream": stream, "vllm_xargs": {"steering": steering}, **content}
    status, answer, header = asked(f"{running.url}/v1/{route}", sent)
    assert (status, header) == (400, None)
    assert reason in answer["error"]["message"]


def test_other_bad_requests_are_answered_by_400_too(running: Server, served: Served) -> None:
    url, one = f"{running.url}/v1/completions", SEVEN[1]
    status, answer, _ = asked(url, body(one, use_beam_search=True, n=2, logprobs=None))
    assert (status, "beam search can't be steered" in answer["error"]["message"]) == (400, True)
    forged = {"steering": "both:1", "steering_bound": "forged"}
    status, answer, _ = asked(url, {**body(one), "vllm_xargs": forged})
    assert (status, "steering_bound can't be set by a request" in answer["error"]["message"]) == (400, True)
    _, answer, _ = completed(running, one)
    assert compared(served, [one], [answer_of(answer)])[0] < EXACT


def test_the_client_of_openai_streams_a_steered_answer(running: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{running.url}/v1", api_key="none")
    texts = []
    for multiplier in (0.0, 3.0):
        asks = {
            "model": "base",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
            "temperature": 0,
            "extra_body": {"vllm_xargs": request({"both": multiplier}, tokens="generated")},
        }
        whole = client.chat.completions.create(**asks).choices[0].message.content
        stream = client.chat.completions.with_raw_response.create(**asks, stream=True)
        assert stream.headers["x-steering"] == f"both:{multiplier}@generated"
        parts = [part.choices[0].delta.content or "" for part in stream.parse() if part.choices]
        assert "".join(parts) == whole
        texts.append(whole)
    assert texts[0] != texts[1]


def test_vectors_come_and_go(running: Server, served: Served, show: ShowCase) -> None:
    load, url = f"{running.url}/v1/steering/load", f"{running.url}/v1/steering"
    directions = SteeringVector.load(served.vectors / "both.safetensors").layer_activations
    SteeringVector({1: -directions[1]}).save(served.vectors / "late.safetensors")
    (served.vectors / "broken.safetensors").write_bytes(b"")
    one: Request = (ids(5, 12), "late:2,both:1@generated", 6)
    assert completed(running, one)[0] == 400
    assert asked(load, {"name": "late"})[0] == 200
    answers = [answer_of(completed(running, one)[1])]
    # The same name with other contents: nothing of the first may be left in a cache.
    changed: Request = (one[0], "late:2,both:1", 6)
    answers.append(answer_of(completed(running, changed)[1]))
    off, effect = compared(served, [one, changed], answers)
    SteeringVector({0: directions[1], 2: directions[2]}).save(served.vectors / "late.safetensors")
    assert asked(load, {"name": "late"})[0] == 200
    again = [answer_of(completed(running, each)[1]) for each in (one, changed)]
    more, effect_again = compared(served, [one, changed], again)
    show("loaded while it serves, and loaded anew", max(off, more), min(effect, effect_again))
    assert max(off, more) < EXACT
    assert min(effect, effect_again) > 100 * EXACT

    for name, factor in (("fifth", 5.0), ("sixth", 6.0)):
        SteeringVector({1: factor * directions[1]}).save(served.vectors / f"{name}.safetensors")
    assert asked(load, {"name": "fifth"})[0] == 200
    status, answer, _ = asked(load, {"name": "sixth"})
    assert status == 409
    assert "the table of directions is full: it holds 5 vectors" in answer["error"]["message"]
    assert asked(load, {"name": "nothing"})[0] == 404
    for bad in ({"name": "broken"}, {"name": "../late"}, {"name": 1}, ["late"]):
        assert asked(load, bad)[0] == 400
    assert asked(f"{url}/nothing", method="DELETE")[0] == 404
    assert asked(f"{url}/late", method="DELETE")[:2] == (200, {"name": "late", "in_use": False})
    assert completed(running, one)[0] == 400
    assert asked(load, {"name": "sixth"})[0] == 200
    for name in ("fifth", "sixth"):
        assert asked(f"{url}/{name}", method="DELETE")[0] == 200
    assert check(running.url)["loaded"] == 3


def test_no_request_is_cut_off_when_its_vector_is_unloaded(running: Server, served: Served, show: ShowCase) -> None:
    directions = SteeringVector.load(served.vectors / "both.safetensors").layer_activations
    SteeringVector({2: directions[2]}).save(served.vectors / "brief.safetensors")
    assert asked(f"{running.url}/v1/steering/load", {"name": "brief"})[0] == 200
    requests: list[Request] = [(ids(n, 10), "brief:1.5@generated", 110) for n in range(16)]
    unloaded, answers = asyncio.run(unloaded_midway(running, requests))
    assert unloaded == {"name": "brief", "in_use": True}
    off, effect = compared(served, requests, answers)
    show("unloaded while sixteen requests use it", off, effect)
    assert off < EXACT
    assert completed(running, requests[0])[0] == 400


async def unloaded_midway(running: Server, requests: list[Request]) -> tuple[Any, list[Any]]:
    """The answer to unloading a vector once each of the requests has its first token, and their whole answers."""
    async with aiohttp.ClientSession() as session:
        sent = [session.post(f"{running.url}/v1/completions", json=body(one, stream=True)) for one in requests]
        streams = await asyncio.gather(*sent)
        begun = [await stream.content.readline() for stream in streams]
        async with session.delete(f"{running.url}/v1/steering/brief") as answer:
            unloaded = await answer.json()
        answers = []
        for first, stream in zip(begun, streams, strict=True):
            lines = [first, *(await stream.read()).splitlines()]
            parts = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            whole = [answer_of(part) for part in parts]
            steps = {name: [value for part in whole for value in part[name]] for name in ("tokens", "steps")}
            answers.append(steps)
    return unloaded, answers


def test_five_hundred_requests_at_once(running: Server, served: Served, show: ShowCase) -> None:
    """Each answer is that of its single run, while a tenth are cancelled midway and a tenth are bad."""
    steerings = [None, "first:1", "middle:-1@generated", "both:1,first:0.5", "both:2@generated", "middle:0.25"]
    kinds: list[Request] = [(ids(n, 6 + n), steering, 24) for n in range(6) for steering in steerings]
    alone = [answer_of(completed(running, one)[1]) for one in kinds]
    off, effect = compared(served, kinds, alone)
    assert off < EXACT
    chance = random.Random(0)
    memory = []
    for _ in range(3):
        plan = [
            (chance.randrange(len(kinds)), chance.choices(["whole", "cut", "bad"], [8, 1, 1])[0]) for _ in range(500)
        ]
        found = asyncio.run(all_at_once(running, kinds, plan))
        memory.append(running.memory())
        for (kind, fate), answer in zip(plan, found, strict=True):
            if fate == "bad":
                assert answer == 400
            elif fate == "whole":
                assert answer["tokens"] == alone[kind]["tokens"]
                pairs = zip(answer["steps"], alone[kind]["steps"], strict=True)
                off = max(off, *(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()))
    show(f"500 at once, three times; {memory[1]:.0f}, then {memory[2]:.0f} MB", off, effect)
    assert off < EXACT
    assert memory[2] < memory[1] + 25


def test_two_engines_behind_two_servers(tmp_path: Path, show: ShowCase) -> None:
    served = prepared(tmp_path, tiny.build("llama", **SIZES))
    tiny.tokenizer(chat_template=tiny.CHATML).save_pretrained(served.path)
    options = ("--data-parallel-size", "2", "--api-server-count", "2")
    with server(served, tmp_path / "log", *options) as running:
        with ThreadPoolExecutor(14) as pool:
            found = list(pool.map(lambda one: completed(running, one), SEVEN * 4))
        assert [header for _, _, header in found] == [steering for _, steering, _ in SEVEN] * 4
        off, effect = compared(served, SEVEN * 4, [answer_of(answer) for _, answer, _ in found])
    show("data parallel 2, two server processes", off, effect)
    assert off < EXACT
    assert effect > 100 * EXACT


async def all_at_once(running: Server, kinds: list[Request], plan: list[tuple[int, str]]) -> list[Any]:
    async def one(session: Any, kind: int, fate: str) -> Any:
        ids, steering, length = kinds[kind]
        sent = body((ids, "sad:1" if fate == "bad" else steering, length), stream=fate == "cut")
        async with session.post(f"{running.url}/v1/completions", json=sent) as answer:
            if fate == "cut":
                await answer.content.readline()
                return None
            return answer.status if fate == "bad" else answer_of(json.loads(await answer.read()))

    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=600)}
    async with aiohttp.ClientSession(**limits) as session:
        return await asyncio.gather(*(one(session, kind, fate) for kind, fate in plan))
