"""The plugin's edges without vLLM: idle unless it is asked for, settings, versions and signatures."""

import subprocess
import sys
import types
from importlib.metadata import entry_points
from typing import Any

import pytest

from steering_vectors.serving.patching import check_version, patch
from steering_vectors.serving.settings import Settings


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_the_package_announces_the_plugin_under_one_name(group: str) -> None:
    (found,) = (point for point in entry_points(group=group) if point.value.startswith("steering_vectors."))
    assert found.name == "steering_vectors"
    assert callable(found.load())


def test_the_plugin_imports_nothing_and_does_nothing_unless_it_is_asked_for() -> None:
    code = (
        "import os, sys; os.environ.pop('STEERING_VECTORS_DIR', None)\n"
        "from steering_vectors.serving.plugin import register\n"
        "register()\n"
        "names = ('torch', 'vllm', 'transformers', 'numpy', 'safetensors', 'urllib.request')\n"
        "print(*(name for name in names if name in sys.modules))\n"
        "print(*(name for name in sys.modules if name.startswith('steering_vectors.')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[0] == ""
    light = {"_version", "serving", "serving.client", "serving.plugin", "serving.spec"}
    assert set(shown.splitlines()[1].split()) == {f"steering_vectors.{name}" for name in light}


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_VECTORS_DIR", "vectors")
    assert Settings.of_environment() == Settings("vectors", capacity=64, loading=False, untried_models=False)
    monkeypatch.setenv("STEERING_VECTORS_CAPACITY", "3")
    monkeypatch.setenv("STEERING_VECTORS_LOADING", "1")
    assert Settings.of_environment() == Settings("vectors", capacity=3, loading=True, untried_models=False)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("STEERING_VECTORS_CAPACITY", "0", "must be a whole number of at least 1, got '0'"),
        ("STEERING_VECTORS_CAPACITY", "many", "must be a whole number of at least 1, got 'many'"),
        ("STEERING_VECTORS_LOADING", "yes", "STEERING_VECTORS_LOADING must be 0 or 1, got 'yes'"),
    ],
)
def test_a_setting_without_meaning_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv("STEERING_VECTORS_DIR", "vectors")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        Settings.of_environment()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.5"])
def test_versions_that_were_proven_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "dev", "1.0.32.0"])
def test_other_versions_are_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        check_version(version)
    assert f"served by vLLM 0.32, and this is {version}: install vLLM 0.32, or unset STEERING_VECTORS_DIR" in str(
        caught.value
    )


def of_vllm() -> Any:
    def step(self: Any, tokens: int) -> int:
        return tokens

    return types.SimpleNamespace(__name__="Runner", step=step)


def test_a_function_is_replaced_once() -> None:
    runner = of_vllm()
    for _ in range(3):
        patch(runner, "step", "self tokens", lambda original: lambda self, tokens: original(self, tokens) + 1)
    assert runner.step(None, 1) == 2


@pytest.mark.parametrize(("name", "found"), [("step", "self tokens"), ("walk", "nothing")])
def test_a_function_of_another_signature_is_refused(name: str, found: str) -> None:
    runner = of_vllm()
    with pytest.raises(RuntimeError) as caught:
        patch(runner, name, "self tokens rows", lambda original: original)
    assert f"Runner.{name} of this vLLM takes ({found}), expected (self tokens rows)" in str(caught.value)
