"""Files of steering vectors: what was saved is loaded bit for bit, and anything else is refused in words."""

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    from_index,
    pca_aggregator,
    train_steering_vector,
)
from tests import tiny

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def same_bits(some: Tensor, other: Tensor) -> bool:
    view = BITS[some.element_size()]
    return some.dtype == other.dtype and some.shape == other.shape and torch.equal(some.view(view), other.view(view))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "joy.safetensors"
    SteeringVector({3: torch.randn(8), 5: torch.randn(8)}, metadata={"method": "by hand"}).save(path)
    return path


def with_header(change: Any, file: Path) -> bytes:
    """The file's bytes with another header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    written = json.dumps(header if changed is None else changed).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


class TestRoundTrip:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        layers=st.sets(st.integers(-40, 200), min_size=1, max_size=6),
        width=st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
        two_axes=st.booleans(),
        layer_type=st.sampled_from(["decoder_block", "self_attn", "mlp"]),
        metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=30), max_size=4),
        seed=st.integers(0, 10**6),
    )
    def test_is_bit_for_bit(
        self,
        tmp_path: Path,
        layers: Any,
        width: Any,
        dtype: Any,
        two_axes: Any,
        layer_type: Any,
        metadata: Any,
        seed: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, width) if two_axes else (width,)
        directions = {layer: torch.randn(shape, generator=generator).to(dtype) for layer in layers}
        directions[min(layers)].reshape(-1)[0] = -0.0
        vector = SteeringVector(directions, layer_type, metadata=metadata)
        path = tmp_path / "vector.safetensors"
        vector.save(path)
        loaded = SteeringVector.load(str(path))
        assert loaded == vector
        assert loaded.layers == list(loaded.layer_activations) == sorted(layers)
        assert all(same_bits(loaded.layer_activations[layer], directions[layer]) for layer in layers)
        own = {"format", "format_version", "layer_type", "layer_convention", "hidden_size", "norms"}
        assert {name: text for name, text in loaded.metadata.items() if name not in own} == {
            name: text for name, text in metadata.items() if name not in own
        }

    def test_of_gradients_views_and_shared_memory(self, tmp_path: Path) -> None:
        rows = torch.randn(4, 8)
        learned = torch.randn(8, requires_grad=True)
        vector = SteeringVector({0: rows[1], 1: rows[1], 2: rows.T[:4, 0].repeat(2)[::1], 3: learned})
        vector.save(tmp_path / "v")
        loaded = SteeringVector.load(tmp_path / "v")
        assert loaded == vector
        assert not loaded.layer_activations[3].requires_grad

    def test_the_file_is_one_that_others_read(self, file: Path) -> None:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            assert sorted(opened.keys()) == ["decoder_block.3", "decoder_block.5"]
            assert opened.get_tensor("decoder_block.3").shape == (8,)
        assert metadata["format"] == "steering-vectors"
        assert metadata["format_version"] == "1"
        assert metadata["layer_convention"].startswith("the output of the layer, numbered from 0")
        assert metadata["hidden_size"] == "8"
        assert json.loads(metadata["norms"]).keys() == {"3", "5"}
        assert metadata["method"] == "by hand"

    def test_a_loaded_vector_steers_bit_for_bit_in_a_fresh_process(self, tmp_path: Path) -> None:
        model = tiny.build("llama")
        vector = train_steering_vector(model, tiny.tokenizer(), [("I love it", "I hate it"), ("yes", "no")])
        vector.save(tmp_path / "v.safetensors")
        ids = torch.tensor([[5, 6, 7, 8]])
        with vector.apply(model, multiplier=2), torch.no_grad():
            expected = model(ids).logits
        program = (
            "import sys, torch; from tests import tiny; from steering_vectors import SteeringVector\n"
            "torch.set_num_threads(1); model = tiny.build('llama')\n"
            "with SteeringVector.load(sys.argv[1]).apply(model, multiplier=2), torch.no_grad():\n"
            "    torch.save(model(torch.tensor([[5, 6, 7, 8]])).logits, sys.argv[2])"
        )
        run_python(program, str(tmp_path / "v.safetensors"), str(tmp_path / "logits.pt"))
        assert same_bits(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def run_python(
    program: str, *arguments: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        check=check,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


class TestWriting:
    def test_a_crash_leaves_the_old_file(self, file: Path) -> None:
        before = file.read_bytes()
        for place in ("fsync", "replace"):
            program = (
                f"import os, sys, torch; from steering_vectors import SteeringVector\n"
                f"os.{place} = lambda *_: os._exit(7)\n"
                f"SteeringVector({{3: torch.zeros(8)}}).save(sys.argv[1])"
            )
            assert run_python(program, str(file), check=False).returncode == 7
            assert file.read_bytes() == before

    @pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
    def test_an_error_leaves_the_old_file_and_no_other(
        self, file: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = file.read_bytes()

        def fail(_descriptor: int) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            SteeringVector({3: torch.zeros(8)}).save(file)
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == [file.name]

    def test_readers_see_the_old_file_or_the_new_one(self, file: Path) -> None:
        vectors = [SteeringVector({3: torch.full((5000,), float(n))}) for n in range(2)]
        vectors[0].save(file)
        seen, done = set(), threading.Event()

        def read() -> None:
            while not done.is_set():
                numbers = SteeringVector.load(file).layer_activations[3]
                seen.add(tuple(numbers.unique().tolist()))

        thread = threading.Thread(target=read)
        thread.start()
        for n in range(40):
            vectors[n % 2].save(file)
        done.set()
        thread.join()
        assert seen <= {(0.0,), (1.0,)}

    def test_a_link_stays_one_and_the_mode_is_the_usual(self, file: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(file)
        SteeringVector({1: [1.0]}).save(link)
        assert link.is_symlink()
        assert SteeringVector.load(file).layers == [1]
        usual = tmp_path / "usual"
        usual.touch()
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)

    def test_where_it_can_not_be_written(self, tmp_path: Path) -> None:
        vector = SteeringVector({1: [1.0]})
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere: create it"):
            vector.save(tmp_path / "nowhere" / "v")
        with pytest.raises(
            IsADirectoryError, match=r"is a folder: give the name of a file in it, or use save_pretrained"
        ):
            vector.save(tmp_path)
        assert os.listdir(tmp_path) == []

    def test_what_is_wrong_with_the_vector_shows_before_anything_is_written(self, tmp_path: Path) -> None:
        vector = SteeringVector({1: [1.0]})
        vector.layer_activations[1] = torch.tensor([float("nan")])
        with pytest.raises(ValueError, match="the direction of layer 1 has NaN"):
            vector.save(tmp_path / "v")
        with pytest.raises(ValueError, match="this steering vector has no directions"):
            SteeringVector({}).save(tmp_path / "v")
        vector = SteeringVector({1: [1.0]})
        vector.layer_type = "heart"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="unknown layer type 'heart'"):
            vector.save(tmp_path / "v")
        assert os.listdir(tmp_path) == []


def refused(content: bytes, tmp_path: Path) -> str:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        SteeringVector.load(path)
    return str(caught.value).replace(str(path), "FILE")


class TestReading:
    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no file"):
            SteeringVector.load(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="is a folder"):
            SteeringVector.load(tmp_path)

    @pytest.mark.parametrize("protocol", range(2, 6))
    def test_a_pickle(self, tmp_path: Path, protocol: int) -> None:
        content = pickle.dumps(SteeringVector({1: torch.ones(2)}), protocol)
        message = refused(content, tmp_path)
        assert message.startswith("FILE is a Python pickle, not a safetensors file. Loading a pickle may run code")
        assert "interop.from_tensors" in message

    def test_what_torch_saved(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"v": torch.ones(2)}, buffer)
        assert refused(buffer.getvalue(), tmp_path).startswith("FILE is a pickle of torch.save, not a safetensors file")

    def test_a_pickle_runs_nothing(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(tmp_path / "was run"),))

        for content in (pickle.dumps(Evil()), pickle.dumps(Evil(), 0)):
            refused(content, tmp_path)
        assert not (tmp_path / "was run").exists()

    def test_other_formats(self, tmp_path: Path) -> None:
        array = io.BytesIO()
        np.save(array, np.ones(3))
        assert refused(array.getvalue(), tmp_path) == "FILE is a numpy array, not a safetensors file"
        assert refused(b"GGUF" + bytes(40), tmp_path) == "FILE is a GGUF file, not a safetensors file"

    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
    def test_a_file_that_is_cut_off(self, file: Path, tmp_path: Path, size: int) -> None:
        assert "is not a complete safetensors file" in refused(file.read_bytes()[:size], tmp_path)
        assert "is not a complete safetensors file" in refused(file.read_bytes()[:-1], tmp_path)
        assert "is not a complete safetensors file" in refused(file.read_bytes() + b"x", tmp_path)

    def test_a_file_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "large"
        with open(path, "wb") as file:
            file.truncate(2**31)  # takes no room
        with pytest.raises(ValueError, match="has 2147483648 bytes; a steering vector has at most 1073741824"):
            SteeringVector.load(path)

    def test_another_safetensors_file(self, tmp_path: Path) -> None:
        message = refused(safetensors.torch.save({"weight": torch.ones(2)}), tmp_path)
        assert message.startswith("FILE: this safetensors file is not a steering vector: its metadata have format=None")

    def test_a_newer_format(self, file: Path, tmp_path: Path) -> None:
        content = with_header(lambda h: h["__metadata__"].update(format_version="2"), file)
        message = (
            "FILE: its format version is 2, but this library reads versions up to 1: "
            "pip install --upgrade steering-vectors"
        )
        assert refused(content, tmp_path) == message

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": "one"}, "its format_version is 'one', expected a whole number"),
            ({"format_version": "9" * 5000}, "but this library reads versions up to 1"),
            ({"layer_type": "heart"}, "unknown layer type 'heart'"),
            ({"layer_type": "mlp"}, "its tensor 'decoder_block.3' doesn't belong to the layer type 'mlp'"),
            ({"hidden_size": "9"}, "its directions have width 8, but its metadata have hidden_size='9'"),
        ],
        ids=str,
    )
    def test_metadata_that_do_not_fit(self, file: Path, tmp_path: Path, changes: Any, message: str) -> None:
        assert message in refused(with_header(lambda h: h["__metadata__"].update(changes), file), tmp_path)

    @pytest.mark.parametrize(
        "name", ["decoder_block", "decoder_block.x", "decoder_block.03", "a.b.3", "decoder_block.1e3"]
    )
    def test_names_that_are_no_layers(self, file: Path, tmp_path: Path, name: str) -> None:
        content = with_header(lambda h: h.update({name: h.pop("decoder_block.3")}), file)
        assert f"its tensor {name!r} doesn't belong to the layer type" in refused(content, tmp_path)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"decoder_block.1": torch.ones(2, 3)}, "must have the shape (hidden,)"),
            ({"decoder_block.1": torch.ones(2), "decoder_block.2": torch.ones(3)}, "must have the same width"),
            ({"decoder_block.1": torch.tensor([1.0, float("inf")])}, "has NaN or infinite numbers"),
            ({"decoder_block.1": torch.ones(2, dtype=torch.int32)}, "must hold real numbers"),
            ({"decoder_block.1": torch.ones(0)}, "must have the shape (hidden,)"),
            ({}, "the file has no directions"),
        ],
        ids=str,
    )
    def test_directions_that_can_not_be(self, tmp_path: Path, tensors: Any, message: str) -> None:
        metadata = {
            "format": "steering-vectors",
            "format_version": "1",
            "layer_type": "decoder_block",
            "hidden_size": "2",
        }
        assert message in refused(safetensors.torch.save(tensors, metadata), tmp_path)


GOOD = safetensors.torch.save(
    {"decoder_block.3": torch.arange(8.0), "decoder_block.5": torch.arange(8.0)},
    {"format": "steering-vectors", "format_version": "1", "layer_type": "decoder_block", "hidden_size": "8", "x": "y"},
)
LENGTH = int.from_bytes(GOOD[:8], "little")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def hostile_headers() -> st.SearchStrategy[bytes]:
    """A good header with something in it replaced by any JSON."""
    header = json.loads(GOOD[8 : 8 + LENGTH])
    entry = header["decoder_block.3"]
    places: list[Any] = [
        *(lambda h, v, k=k: h.__setitem__(k, v) for k in header),
        *(lambda h, v, k=k: h["decoder_block.3"].__setitem__(k, v) for k in entry),
        *(lambda h, v, k=k: h["__metadata__"].__setitem__(k, v) for k in header["__metadata__"]),
        lambda h, v: h.__setitem__(str(v), h.pop("decoder_block.3")),
    ]
    sizes = st.lists(st.integers(-1, 2**64), max_size=5)
    values = JSON | sizes | st.sampled_from(["F64", "BF16", "I8", "F8_E4M3", "C64", "decoder_block.3", "9" * 400])

    def build(place: Any, value: Any, length_off: int) -> bytes:
        changed = json.loads(json.dumps(header))
        place(changed, value)
        written = json.dumps(changed).encode()
        return struct.pack("<Q", max(0, len(written) + length_off)) + written + GOOD[8 + LENGTH :]

    return st.builds(build, st.sampled_from(places), values, st.sampled_from([0, 0, 0, 0, 1, -1, 2**40, 2**62]))


flipped = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8).map(
    lambda changes: bytes(dict(changes).get(n, byte) for n, byte in enumerate(GOOD))
)
cut = st.tuples(st.integers(0, len(GOOD)), st.integers(0, len(GOOD))).map(lambda ends: GOOD[min(ends) : max(ends)])
deep = st.integers(1, 20000).map(lambda n: struct.pack("<Q", 2 * n + 6) + b'{"a":' + b"[" * n + b"]" * n + b"}")
anything = st.binary(max_size=300)
FOLDER = tempfile.TemporaryDirectory()
TRIES = int(os.environ.get("FUZZ_TRIES", "800"))


class TestFuzz:
    """A hostile file gives a vector or a clear ValueError: no crash, no hang, no more memory than some times the file."""

    @settings(max_examples=TRIES, deadline=20_000, suppress_health_check=list(HealthCheck))
    @given(flipped | cut | hostile_headers() | deep | anything)
    def test_any_file_is_a_vector_or_an_error_in_words(self, content: bytes) -> None:
        path = Path(FOLDER.name) / f"{os.getpid()}.safetensors"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            vector = SteeringVector.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 2000
            event("an error in words")
        else:
            event("a vector")
            assert all(bool(direction.isfinite().all()) for direction in vector.layer_activations.values())
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < 200_000 + 40 * len(content)


class TestMetadataOfTraining:
    def test_says_how_to_make_the_vector_again(self, tmp_path: Path) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer(chat_template=tiny.CHATML)
        pairs = [("I love it", "I hate it"), ("yes", "no"), ("good", "bad")]
        vector = train_steering_vector(model, tokenizer, pairs, layers=[0, 2], tokens=from_index(1))
        expected = {
            "model_type": "llama",
            "layers_of_model": "3",
            "dtype": "float32",
            "attention_implementation": "sdpa",
            "method": "mean_aggregator()",
            "read": "tokens=from_index(1)",
            "samples": "3",
        }
        assert {name: vector.metadata[name] for name in expected} == expected
        assert len(vector.metadata["samples_hash"]) == len(vector.metadata["chat_template_hash"]) == 64
        assert f"torch {torch.__version__.partition('+')[0]}" in vector.metadata["versions"]  # +cu124 is not of PyPI's
        vector.save(tmp_path / "v")
        assert {**vector.metadata, **SteeringVector.load(tmp_path / "v").metadata}.items() >= vector.metadata.items()

    def test_other_samples_and_methods_are_told_apart(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        one, same, other, pca = (
            train_steering_vector(model, tokenizer, pairs, layers=1, **kwargs).metadata
            for pairs, kwargs in (
                ([("a", "b"), ("c", "d")], {}),
                (iter([("a", "b"), ("c", "d")]), {"batch_size": 2}),
                ([("a", "b"), ("c", "e")], {}),
                ([("a", "b"), ("c", "d")], {"aggregator": pca_aggregator(), "read_token_index": -1}),
            )
        )
        assert one == same
        assert one["samples_hash"] == pca["samples_hash"] != other["samples_hash"]
        assert (pca["method"], pca["read"]) == ("pca_aggregator()", "read_token_index=-1")

    def test_of_callables_is_the_same_in_each_process(self) -> None:
        model = tiny.shared("llama")
        vector = train_steering_vector(
            model, tiny.tokenizer(), [("a", "b")], aggregator=lambda p, n: p[0], read_token_index=lambda _text: 0
        )
        assert " at 0x" not in vector.metadata["method"] + vector.metadata["read"]


class TestAnotherModel:
    def vector(self, architecture: str, **overrides: Any) -> SteeringVector:
        model = tiny.build(architecture, **overrides)
        return train_steering_vector(model, tiny.tokenizer(), [("a", "b")], layers=1)

    @pytest.mark.parametrize("way", ["apply", "patch"])
    def test_of_another_type_or_depth_is_a_warning_and_one_alone(self, way: str) -> None:
        model = tiny.shared("llama")
        for made_for, told in (
            ({"architecture": "qwen2"}, "model_type 'qwen2', here 'llama'"),
            ({"architecture": "llama", "num_hidden_layers": 2}, "layers_of_model '2', here '3'"),
        ):
            vector = 0.1 * self.vector(**made_for)  # type: ignore[arg-type]
            with pytest.warns(UserWarning, match=f"the vector was made for another model: {told}") as caught:
                context: Any = getattr(vector, way)(model)
            with context:  # enters without another
                pass
            assert len(caught) == 1
            assert caught[0].filename == __file__

    def test_names_and_paths_are_never_compared(self) -> None:
        vector = self.vector("llama")
        named = SteeringVector(
            vector.layer_activations,
            metadata={**vector.metadata, "base_model": "/some/path", "base_model_revision": "1"},
        )
        with named.apply(tiny.shared("llama")):
            pass

    def test_a_vector_of_the_text_model_fits_the_model_around_it(self) -> None:
        vector = self.vector("llama")
        with vector.apply(tiny.shared("llama").base_model):
            pass


class TestMetadata:
    def test_is_read_only_and_of_strings(self) -> None:
        vector = SteeringVector({1: [1.0]}, metadata={"method": "by hand"})
        with pytest.raises(TypeError):
            vector.metadata["method"] = "other"  # type: ignore[index]
        assert repr(vector.metadata) == "{'method': 'by hand'}"
        assert hash(vector.metadata) == hash(SteeringVector({}, metadata=vector.metadata).metadata)
        for wrong in ({"n": 3}, {3: "n"}):
            with pytest.raises(TypeError, match="metadata must map strings to strings, got "):
                SteeringVector({1: [1.0]}, metadata=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="metadata must be a mapping of strings, got str"):
            SteeringVector({1: [1.0]}, metadata="by hand")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="positional"):
            SteeringVector({1: [1.0]}, "mlp", {})  # type: ignore[misc]

    def test_is_ignored_by_equality_and_kept_by_parts_and_copies(self) -> None:
        import copy

        vector = SteeringVector({1: [1.0], 2: [2.0]}, metadata={"method": "by hand"})
        assert vector == SteeringVector({1: [1.0], 2: [2.0]})
        for made in (vector[1], vector.to(torch.float64), copy.deepcopy(vector), pickle.loads(pickle.dumps(vector))):
            assert made.metadata == {"method": "by hand"}


class TestMoreOfFiles:
    def test_one_vector_gives_one_file_byte_for_byte(self, tmp_path: Path) -> None:
        vector = SteeringVector({1: torch.ones(3), 2: torch.ones(3)}, metadata={f"name {n}": "ä" * n for n in range(9)})
        contents = set()
        for n in range(6):
            vector.save(tmp_path / str(n))
            contents.add((tmp_path / str(n)).read_bytes())
        assert len(contents) == 1
        assert (int.from_bytes(contents.pop()[:8], "little")) % 8 == 0

    def test_the_mode_of_a_file_that_is_there_stays(self, file: Path) -> None:
        file.chmod(0o600)
        SteeringVector({3: torch.zeros(8)}).save(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_what_is_no_file_is_not_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="exists and is not a regular file"):
            SteeringVector({3: [1.0]}).save(tmp_path / "pipe")
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    @pytest.mark.parametrize("layer", [10**12, -(10**9)])
    def test_what_could_not_be_loaded_is_not_saved(self, tmp_path: Path, layer: int) -> None:
        with pytest.raises(ValueError, match="doesn't belong to the layer type"):
            SteeringVector({layer: [1.0]}).save(tmp_path / "v")
        assert os.listdir(tmp_path) == []

    def test_too_many_tensors(self, tmp_path: Path) -> None:
        content = safetensors.torch.save({f"decoder_block.{n}": torch.ones(1) for n in range(10_001)})
        assert "has more than 10000 tensors; a steering vector has one for each layer" in refused(content, tmp_path)

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    def test_eight_bits(self, tmp_path: Path, dtype: str) -> None:
        metadata = {
            "format": "steering-vectors",
            "format_version": "1",
            "layer_type": "decoder_block",
            "hidden_size": "2",
        }
        narrow = torch.ones(2).to(getattr(torch, dtype))
        content = safetensors.torch.save({"decoder_block.1": narrow}, metadata)
        assert f"must hold real numbers of 16, 32 or 64 bits, got torch.{dtype}" in refused(content, tmp_path)
        with pytest.raises(TypeError, match="must hold real numbers of 16, 32 or 64 bits"):
            SteeringVector({1: narrow})

    def test_a_cut_file_whose_length_looks_like_a_pickle_is_told_as_cut(self, tmp_path: Path) -> None:
        content = struct.pack("<Q", 0x280) + b'{"a": 1'
        assert "is not a complete safetensors file" in refused(content, tmp_path)

    @pytest.mark.parametrize("name", ["format", "layer_type", "hidden_size", "format_version"])
    def test_errors_are_short_whatever_the_file_says(self, file: Path, tmp_path: Path, name: str) -> None:
        content = with_header(lambda h: h["__metadata__"].update({name: "\x1b[31m" + "x" * 10**5}), file)
        message = refused(content, tmp_path)
        assert len(message) < 400
        assert "\x1b" not in message

    @pytest.mark.parametrize("version", ["0", "١", "0" * 20 + "2", "1.0", "", "-1"])
    def test_versions_that_are_none(self, file: Path, tmp_path: Path, version: str) -> None:
        content = with_header(lambda h: h["__metadata__"].update(format_version=version), file)
        assert "expected a whole number of at least 1" in refused(content, tmp_path)


class TestMetadataOfResults:
    def test_what_a_file_told_of_its_directions_does_not_go_to_others(self, file: Path, tmp_path: Path) -> None:
        loaded = SteeringVector.load(file)
        for made in (2 * loaded, loaded.normalized(), loaded[3], loaded.to(torch.float64), loaded + loaded):
            assert "norms" not in made.metadata
            assert made.metadata["method"] == "by hand"
            made.save(tmp_path / "again")
            again = SteeringVector.load(tmp_path / "again")
            assert json.loads(again.metadata["norms"]) == pytest.approx({str(n): v for n, v in made.norms().items()})

    def test_a_derivation_stays_short(self) -> None:
        vector = SteeringVector({1: [1.0]})
        for _ in range(40):
            vector = vector + vector
        assert len(vector.metadata["derivation"]) < 2000

    def test_hashes_are_those_of_the_ids_whatever_the_window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hashlib import sha256

        model, pairs = tiny.shared("llama"), [([5, 6], [7]), ([8], [9, 10]), ([11], [12])]
        expected = sha256(b"[5, 6][7][8][9, 10][11][12]").hexdigest()
        for window in (4096, 2):
            monkeypatch.setitem(train_steering_vector.__globals__, "WINDOW", window)
            vector = train_steering_vector(model, tiny.tokenizer(), pairs)
            assert vector.metadata["samples_hash"] == expected
        own = [SteeringVectorTrainingSample([5, 6], [7], 0), *pairs[1:]]
        other = train_steering_vector(model, tiny.tokenizer(), own).metadata
        assert other["samples_hash"] == expected
        assert other["read_hash"] != vector.metadata["read_hash"]

    def test_what_else_the_directions_depend_on_is_told(self) -> None:
        model, pairs = tiny.shared("llama"), [("a", "b")]
        config: Any = {"decoder_block": "model.layers.{num}.mlp"}
        made = train_steering_vector(model, tiny.tokenizer(), pairs, layer_config=config)
        assert json.loads(made.metadata["layer_config"]) == config
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model):
            metadata = train_steering_vector(model, tiny.tokenizer(), pairs).metadata
        assert metadata["steered_by"].startswith("SteeringPatchHandle(layers=[0], multiplier=1.0")
        assert "steered_by" not in train_steering_vector(model, tiny.tokenizer(), pairs).metadata

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("org/model", "org/model"),
            ("gpt2", "gpt2"),
            ("/home/me/model", "model"),
            ("./me/model/", "model"),
            ("C:\\Users\\me\\model", "model"),
            ("a/b/c", "c"),
        ],
    )
    def test_paths_are_not_told(self, name: str, told: str) -> None:
        model = tiny.build("llama")
        model.config._name_or_path = name
        assert train_steering_vector(model, tiny.tokenizer(), [("a", "b")]).metadata["base_model"] == told
