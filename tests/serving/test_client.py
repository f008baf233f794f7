"""A client notices a server that would ignore the steering of its requests."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from steering_vectors.serving import check


@contextmanager
def server(status: int, body: str) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}", asked
        finally:
            served.shutdown()
            thread.join()


def test_the_vectors_of_a_server_are_returned() -> None:
    found = {"vectors": {"joy": {"layers": [1], "hash": "ab"}}, "capacity": 64, "loading": False, "layers": [1]}
    with server(200, json.dumps(found)) as (url, asked):
        assert check(url) == check(f"{url}/v1/", api_key="secret") == found
    assert asked == ["/v1/steering None", "/v1/steering Bearer secret"]


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, "", "/v1/steering answers 404 Not Found: this server steers nothing, and ignores steering in requests"),
        (401, "", "/v1/steering answers 401 Unauthorized: pass the server's api_key"),
        (200, "hello", "answers something else than a list of steering vectors: this server steers nothing"),
        (200, "[1]", "answers something else than a list of steering vectors"),
    ],
)
def test_a_server_that_does_not_steer_is_told(status: int, body: str, reason: str) -> None:
    with server(status, body) as (url, _), pytest.raises(RuntimeError) as caught:
        check(url)
    assert reason in str(caught.value)


def test_a_port_that_does_not_speak_http_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as served:
        address = f"http://127.0.0.1:{served.getsockname()[1]}"
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(check, address)
            found, _ = served.accept()
            with found:
                found.recv(1000)
                found.sendall(b"SSH-2.0\r\n\r\n")
            with pytest.raises(ConnectionError, match=f"there is no server at {address}: SSH-2.0"):
                asked.result()


def test_no_server_and_no_address_are_told() -> None:
    with server(200, "") as (url, _):
        pass
    with pytest.raises(ConnectionError, match="there is no server at http://127.0.0.1"):
        check(url, timeout=2)
    with pytest.raises(ValueError, match="base_url must begin with http:// or https://, got 'localhost:8000'"):
        check("localhost:8000")
