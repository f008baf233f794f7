"""The start of an engine fails in words where steering could not be exact, and where the folder is no good."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors import SteeringVector
from tests import tiny
from tests.vllm.plugin.comparison import SIZES, Served, prepared

vllm = pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return prepared(tmp_path_factory.mktemp("served"), tiny.build("llama", **SIZES))


@pytest.fixture(scope="module", autouse=True)
def plugin(served: Served) -> Iterator[None]:
    """The plugin, loaded in this process as vLLM does it."""
    from vllm.plugins import load_general_plugins

    os.environ["STEERING_VECTORS_DIR"] = str(served.vectors)
    load_general_plugins()
    yield
    del os.environ["STEERING_VECTORS_DIR"]


@pytest.fixture(autouse=True)
def folder(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the vectors, for a test to spoil."""
    made = shutil.copytree(served.vectors, tmp_path / "vectors")
    monkeypatch.setenv("STEERING_VECTORS_DIR", str(made))
    return made


def configured(served: Served, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 96, "enforce_eager": True, "skip_tokenizer_init": True}
    return EngineArgs(str(served.path), **{**settings, **options}).create_engine_config()


def test_what_can_be_steered_is_configured(served: Served) -> None:
    config = configured(served, additional_config={"mine": 1})
    assert config.additional_config == {"mine": 1, "steering_vectors": {"layers": [0, 1, 2], "capacity": 64}}
    assert config.compute_hash() != configured(served).compute_hash()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill shows layers other tokens"),
        ({"worker_extension_cls": "builtins.object"}, "the worker extension 'builtins.object' takes the place"),
        ({"kv_offloading_size": 1.0}, "a connector of KV caches may hand steered tokens to other requests"),
        ({"runner": "pooling"}, "the model does not generate text"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(served: Served, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"steering vectors can't be served: {reason}"):
        configured(served, **options)


# Not reachable by the options of a CPU.
@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("parallel_config.enable_dbo", True, "micro-batches show a layer only a part of a step's tokens"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallel shows a layer only a part"),
        ("model_config.enable_sleep_mode", True, "sleep mode discards the tables of directions"),
    ],
)
def test_settings_of_other_devices_are_refused(served: Served, path: str, value: Any, reason: str) -> None:
    from steering_vectors.serving.admitting import _prepare
    from steering_vectors.serving.settings import Settings

    config = configured(served)
    owner, name = path.split(".")
    setattr(getattr(config, owner), name, value)
    with pytest.raises(ValueError, match=f"steering vectors can't be served: {reason}"):
        _prepare(config, Settings.of_environment())


def test_the_second_model_runner_is_refused_with_the_way_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from steering_vectors.serving.admitting import _prepare
    from steering_vectors.serving.settings import Settings

    config = configured(served)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="Model Runner V2 is not supported yet: set VLLM_USE_V2_MODEL_RUNNER=0"):
        _prepare(config, Settings.of_environment())


def test_beams_are_refused_where_they_would_run_unsteered(served: Served) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    configured(served)
    asked = {"use_beam_search": True, "vllm_xargs": {"steering": "both:1"}}
    for request in (
        CompletionRequest(prompt="a", **asked),
        ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **asked),
    ):
        with pytest.raises(ValueError, match="beam search can't be steered: leave out use_beam_search"):
            request.to_beam_search_params(8, {})
        request.vllm_xargs = None
        assert request.to_beam_search_params(8, {})


def test_an_architecture_that_was_not_tried_needs_the_operators_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = prepared(tmp_path, tiny.build("gptj", n_embd=64, n_head=2, rotary_dim=4))
    monkeypatch.setenv("STEERING_VECTORS_DIR", str(other.vectors))
    with pytest.raises(ValueError, match=r"GPTJForCausalLM was not tried; .* Set STEERING_VECTORS_UNTRIED_MODELS=1"):
        configured(other)
    monkeypatch.setenv("STEERING_VECTORS_UNTRIED_MODELS", "1")
    assert configured(other)


def test_loading_needs_one_server_that_knows_all_requests(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_VECTORS_LOADING", "1")
    assert configured(served).additional_config["steering_vectors"]["layers"] == [0, 1, 2]
    with pytest.raises(ValueError, match="loading needs one server process and one engine"):
        configured(served, _api_process_count=2)


@pytest.mark.parametrize(
    ("name", "vector", "reason"),
    [
        ("wide", SteeringVector({1: [1.0] * 65}), "wide.safetensors: the direction of layer 1 has 65 numbers"),
        ("deep", SteeringVector({3: [1.0] * 64}), "deep.safetensors has layer 3, and the model has 3 layers"),
        ("mlp", SteeringVector({1: [1.0] * 64}, "mlp"), "mlp.safetensors steers 'mlp'"),
        ("a b", SteeringVector({1: [1.0] * 64}), "'a b' can't be the name of a vector"),
    ],
)
def test_a_bad_vector_stops_the_start(
    served: Served, folder: Path, name: str, vector: SteeringVector, reason: str
) -> None:
    vector.save(folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=reason):
        configured(served)


def test_a_damaged_file_stops_the_start(served: Served, folder: Path) -> None:
    (folder / "both.safetensors").write_bytes((folder / "both.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"both.safetensors is not a complete safetensors file"):
        configured(served)


def test_more_vectors_than_the_table_holds_stop_the_start(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_VECTORS_CAPACITY", "2")
    with pytest.raises(ValueError, match="has 3 vectors, and the table .* holds 2: set STEERING_VECTORS_CAPACITY=3"):
        configured(served)


def test_a_bad_request_is_refused_where_its_parameters_are_made(served: Served) -> None:
    configured(served)
    for text, reason in [("sad:1", "no steering vector 'sad'"), ("both:nan", "finite number"), (3, "must be a string")]:
        with pytest.raises(ValueError, match=reason):
            vllm.SamplingParams(extra_args={"steering": text})
    assert vllm.SamplingParams(extra_args={"other": 1}).extra_args == {"other": 1}


def test_parameters_that_were_made_before_the_engine_are_admitted_with_their_request(served: Served) -> None:
    from steering_vectors.serving.binding import Bound

    config = configured(served)
    parameters = vllm.SamplingParams(extra_args={"steering": "both:1"})
    parameters.extra_args = {"steering": "both:2@generated"}
    parameters.verify(config.model_config, None, None, None)
    found = Bound.of(parameters.extra_args)
    assert found is not None
    assert ([multiplier for _, multiplier in found.multipliers], found.tokens) == ([2.0], "generated")
    parameters.extra_args = {"steering": "sad:2"}
    with pytest.raises(ValueError, match="no steering vector 'sad'"):
        parameters.verify(config.model_config, None, None, None)


def test_steering_that_is_changed_in_place_is_admitted_again(served: Served) -> None:
    from steering_vectors.serving.binding import Bound

    config = configured(served)
    parameters = vllm.SamplingParams(extra_args={"steering": "both:1"})
    parameters.extra_args["steering"] = "both:-2"
    parameters.verify(config.model_config, None, None, None)
    found = Bound.of(parameters.extra_args)
    assert found is not None
    assert [multiplier for _, multiplier in found.multipliers] == [-2.0]
    parameters.extra_args["steering"] = "sad:2"
    with pytest.raises(ValueError, match="no steering vector 'sad'"):
        parameters.verify(config.model_config, None, None, None)


def test_each_of_two_engines_admits_its_requests(served: Served, folder: Path) -> None:
    from steering_vectors.serving.binding import Bound

    first = configured(served)
    SteeringVector({1: [1.0] * 64}).save(folder / "both.safetensors")
    (folder / "middle.safetensors").unlink()
    second = configured(served)
    parameters = vllm.SamplingParams(extra_args={"steering": "both:1"})
    keys = []
    for config in (first, second, first):
        parameters.verify(config.model_config, None, None, None)
        found = Bound.of(parameters.extra_args)
        assert found is not None
        keys.append(found.multipliers)
    assert keys[0] == keys[2] != keys[1]
    parameters = vllm.SamplingParams(extra_args={"steering": "middle:1"})
    parameters.verify(first.model_config, None, None, None)
    with pytest.raises(ValueError, match="no steering vector 'middle'"):
        parameters.verify(second.model_config, None, None, None)


def test_a_file_that_changes_during_the_start_stops_it(served: Served, folder: Path) -> None:
    from steering_vectors.serving.arming import _Steering

    config = configured(served)
    buffer = SimpleNamespace(np=np.zeros(8), gpu=torch.zeros(8), copy_to_gpu=lambda: None)
    runner = SimpleNamespace(vllm_config=config, max_num_reqs=2, max_num_tokens=8, device="cpu")
    runner._make_buffer = lambda *_, **__: buffer
    SteeringVector({1: [1.0] * 64}).save(folder / "new.safetensors")
    assert len(_Steering(runner, {}).bank.loaded) == 3
    SteeringVector({1: [1.0] * 64}).save(folder / "both.safetensors")
    with pytest.raises(ValueError, match="the file of the vector 'both' changed after it was checked"):
        _Steering(runner, {})


def test_a_vector_that_the_workers_did_not_load_is_answered_in_words(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from steering_vectors.serving.arming import SteeringWorker
    from steering_vectors.serving.routes import SteeringRoutes

    called = []

    def spoil(name: str, key: str) -> None:
        raise OSError("the disk is gone")

    whole, spoiled = SteeringWorker(), SteeringWorker()
    for worker, load in ((whole, lambda *_: None), (spoiled, spoil)):
        bank = SimpleNamespace(unload=lambda _: None)
        worker.model_runner = SimpleNamespace(steering=SimpleNamespace(load=load, bank=bank))

    async def call(method: str, args: tuple[str, ...]) -> list[str | None]:
        called.append(method)
        return [getattr(worker, method)(*args) for worker in (whole, spoiled)]

    monkeypatch.setenv("STEERING_VECTORS_LOADING", "1")
    app, routes = FastAPI(), SteeringRoutes()
    routes.attach_router(app)
    engine = SimpleNamespace(vllm_config=configured(served), collective_rpc=call)
    asyncio.run(routes.init_state(engine, None, None))
    SteeringVector({1: [1.0] * 64}).save(folder / "new.safetensors")
    client = TestClient(app)
    answer = client.post("/v1/steering/load", json={"name": "new"})
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "the workers did not load the vector 'new': the disk is gone"
    assert "new" not in client.get("/v1/steering").json()["vectors"]
    # What one of several workers may have loaded is forgotten.
    assert client.delete("/v1/steering/first").status_code == 200
    assert called == ["load_steering_vector", "unload_steering_vector", "unload_steering_vector"]
    assert client.get("/v1/steering").json()["loaded"] == 2


def test_nothing_is_loaded_or_unloaded_unless_the_operator_allows_it(served: Served) -> None:
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from steering_vectors.serving.routes import SteeringRoutes

    engine = SimpleNamespace(vllm_config=configured(served))
    app, routes = FastAPI(), SteeringRoutes()
    routes.attach_router(app)
    asyncio.run(routes.init_state(engine, None, None))
    client = TestClient(app)
    found = client.get("/v1/steering").json()
    assert (sorted(found["vectors"]), found["loading"]) == (["both", "first", "middle"], False)
    for answer in (client.post("/v1/steering/load", json={"name": "both"}), client.delete("/v1/steering/both")):
        assert answer.status_code == 403
        assert "the operator allows it by STEERING_VECTORS_LOADING=1" in answer.json()["error"]["message"]


def test_a_server_that_does_not_steer_has_no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI

    from steering_vectors.serving.plugin import routes

    monkeypatch.delenv("STEERING_VECTORS_DIR")
    app = FastAPI()
    before = list(app.routes)
    routes().attach_router(app)
    assert app.routes == before
