"""The playground's options are checked before anything is loaded."""

import errno
import socket
from typing import Any

import pytest

from steering_vectors.cli import main
from steering_vectors.cli.playground import serving
from steering_vectors.cli.playground.addresses import check_address, in_brackets, is_loopback
from steering_vectors.cli.usage import BadParameter


@pytest.fixture(autouse=True)
def _gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that gradio is installed: nothing here goes so far as to import it, or to load a model."""

    def load(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(serving, "load_model", load)
    monkeypatch.setattr(serving, "load_vector", load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "256.1.1.1"], "'256.1.1.1' is no address of this machine"),
        (["--host", "1.2.3"], "'1.2.3' is no address of this machine"),
        (["--host", "no such name"], "'no such name' is no address of this machine"),
        (["--host", ""], "'' is no address of this machine"),
        (["--host", "192.0.2.1"], "'192.0.2.1' is no address of this machine"),  # kept for documents: nobody has it
        (["--port", "70000"], "--port"),
        (["--port", "0"], "--port"),
        (["--max-new-tokens", "1"], "--max-new-tokens"),
        (["--max-new-tokens", "-5"], "--max-new-tokens"),
        (["--range", "-2"], "--range: the range of strengths must be more than 0"),
        (["--range", "nan"], "--range: the range of strengths must be more than 0"),
    ],
)
def test_what_cannot_be_served_is_wrong_usage(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["playground", "model", "joy.safetensors", *options])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_port_that_is_taken_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["playground", "model", "joy.safetensors", "--port", str(port)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err.count("\n")) == (1, 1)
    assert f"port {port} is taken: name another" in captured.err


def test_a_port_of_administrators_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_args: Any) -> None:
        raise OSError(errno.EACCES, "permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(PermissionError, match="port 80 is only for administrators"):
        check_address("127.0.0.1", 80)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_addresses_of_this_machine_pass(host: str) -> None:
    check_address(host, None)
    assert is_loopback(host) == (host != "0.0.0.0")


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6_is_in_brackets_where_it_is_part_of_a_page_address() -> None:
    assert is_loopback("::1")
    assert is_loopback("[::1]")
    assert not is_loopback("::")
    assert [in_brackets(host) for host in ("::1", "[::1]", "127.0.0.1")] == ["[::1]", "[::1]", "127.0.0.1"]


def test_a_name_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(BadParameter, match="is no address of this machine"):
        check_address("a" * 300, None)
