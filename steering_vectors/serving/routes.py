"""Routes of vLLM's server: the list of vectors, loading and unloading, and a header on each steered answer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from steering_vectors.serving.admitting import ADMITTED, catalog
from steering_vectors.serving.settings import Settings
from steering_vectors.serving.spec import check_name
from steering_vectors.serving.store import StoredVector, read_vector

__all__ = ["SteeringRoutes"]

HEADER = b"x-steering"


class SteeringRoutes:
    """The plugin of vLLM's server that adds ``/v1/steering``."""

    name = "steering_vectors"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._one_at_a_time = asyncio.Lock()

    def attach_router(self, app: Any) -> None:
        """Add the routes to a FastAPI app, if this server steers."""
        if not os.environ.get("STEERING_VECTORS_DIR"):
            return
        app.add_route("/v1/steering", self._answering(self._list), methods=["GET"])
        app.add_route("/v1/steering/load", self._answering(self._load), methods=["POST"])
        app.add_route("/v1/steering/{name}", self._answering(self._unload), methods=["DELETE"])
        app.add_middleware(_HeaderOfSteered)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine, by which the workers are reached."""
        self._engine = engine_client
        self._settings = Settings.of_environment()
        model = engine_client.vllm_config.model_config
        self._catalog = catalog(model)
        self._fit = {"depth": model.get_total_num_hidden_layers(), "width": model.get_hidden_size()}

    @staticmethod
    def _answering(handler: Callable[[Any], Awaitable[dict[str, Any]]]) -> Callable[[Any], Awaitable[Any]]:
        from starlette.responses import JSONResponse

        async def answer(request: Any) -> Any:
            try:
                return JSONResponse(await handler(request))
            except _RefusedError as error:
                found = {"message": str(error), "type": "BadRequestError", "param": None, "code": error.status}
                return JSONResponse({"error": found}, error.status)

        return answer

    async def _list(self, _request: Any) -> dict[str, Any]:
        return {**self._catalog.described(), "loading": self._settings.loading}

    async def _load(self, request: Any) -> dict[str, Any]:
        self._check_allowed()
        name = _name_in(await request.body())
        async with self._one_at_a_time:
            vector = await asyncio.to_thread(self._read, name)
            await self._forget_unused()
            served = self._catalog
            if vector.hash not in served.loaded:
                if len(served.loaded) >= served.capacity:
                    raise _RefusedError(
                        409,
                        f"the table of directions is full: it holds {served.capacity} vectors, some perhaps of running "
                        f"requests; unload one first, or start the server with a larger STEERING_VECTORS_CAPACITY",
                    )
                served.loaded.add(vector.hash)  # before the call, so that what a failed one left is forgotten later
                await self._load_in_workers(name, vector.hash)
            served.vectors[name] = vector
        return {"name": name, "layers": sorted(vector.directions), "hash": vector.hash}

    async def _load_in_workers(self, name: str, key: str) -> None:
        answers = await self._engine.collective_rpc("load_steering_vector", args=(name, key))
        if reasons := [reason for reason in answers if reason]:
            raise _RefusedError(409, f"the workers did not load the vector {name!r}: {reasons[0]}")

    async def _unload(self, request: Any) -> dict[str, Any]:
        self._check_allowed()
        name = request.path_params["name"]
        async with self._one_at_a_time:
            vector = self._catalog.vectors.pop(name, None)
            if vector is None:
                raise _RefusedError(404, f"there is no steering vector {name[:40]!r}")
            await self._forget_unused()
        return {"name": name, "in_use": vector.hash in self._catalog.loaded}

    async def _forget_unused(self) -> None:
        for key in self._catalog.unused():
            await self._engine.collective_rpc("unload_steering_vector", args=(key,))
            self._catalog.loaded.discard(key)

    def _check_allowed(self) -> None:
        if not self._settings.loading:
            raise _RefusedError(403, "loading is off: the operator allows it by STEERING_VECTORS_LOADING=1")

    def _read(self, name: str) -> StoredVector:
        try:
            check_name(name)
            return read_vector(self._settings.folder, name, **self._fit)
        except FileNotFoundError as error:
            raise _RefusedError(404, str(error)) from None
        except ValueError as error:
            raise _RefusedError(400, str(error)) from None


class _RefusedError(Exception):
    """A request that is answered by an error status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _name_in(body: bytes) -> str:
    try:
        name = json.loads(body)["name"]
    except (ValueError, TypeError, KeyError, RecursionError):
        name = None
    if not isinstance(name, str):
        raise _RefusedError(400, 'the body must be JSON such as {"name": "formal"}')
    return name


class _HeaderOfSteered:
    """Middleware that writes the steering of an answer into its header ``x-steering``."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the app, and send what it sends."""
        admitted: list[str] = []
        before = ADMITTED.set(admitted)

        async def send_with_header(message: Any) -> None:
            if message["type"] == "http.response.start" and admitted and message["status"] < 400:
                value = "; ".join(dict.fromkeys(admitted)).encode()
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, value)]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_header)
        finally:
            ADMITTED.reset(before)
