"""Control vectors of llama.cpp: what was written is read back, and anything else is refused in words."""

import os
import shlex
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from steering_vectors import SteeringVector, interop
from steering_vectors.interop import LlamaCppOptions, from_gguf, load_repeng, to_gguf
from tests import tiny
from tests.test_files import TRIES, same_bits

MODEL = {"model_type": "llama", "layers_of_model": "30"}
VECTOR = SteeringVector(
    {10: torch.randn(8, generator=torch.Generator().manual_seed(0)), 16: torch.ones(8)}, metadata=MODEL
)
STRING, UINT32, ARRAY, F32, F16 = 8, 4, 9, 0, 1


def text(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(name: str | bytes, value: Any, kind: int | None = None) -> bytes:
    kind = kind if kind is not None else STRING if isinstance(value, (str, bytes)) else UINT32
    written = text(value) if kind == STRING else value if isinstance(value, bytes) else struct.pack("<I", value)
    return text(name) + struct.pack("<I", kind) + written


def tensor(name: str | bytes, sizes: Any = (8,), kind: int = F32, place: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place)


ARCHITECTURE = entry("general.architecture", "controlvector")


def file_of(
    entries: Any = (ARCHITECTURE,),
    tensors: Any = (tensor("direction.10"),),
    data: bytes = np.arange(8, dtype="<f4").tobytes(),
    version: int = 3,
    counts: Any = None,
) -> bytes:
    """A GGUF file written by hand, byte by byte."""
    counts = (len(tensors), len(entries)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return header + b"\0" * (-len(header) % 32) + data


@pytest.fixture
def written(tmp_path: Path) -> Path:
    to_gguf(VECTOR, tmp_path / "joy.gguf")
    return tmp_path / "joy.gguf"


def refused(content: bytes, folder: Path) -> str:
    (folder / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf") as caught:
        from_gguf(folder / "bad.gguf")
    return str(caught.value)


class TestWriting:
    def test_the_package_of_the_format_reads_what_llama_cpp_wants(self, written: Path) -> None:
        reader = gguf.GGUFReader(written)
        values = {name: field.contents() for name, field in reader.fields.items()}
        assert values["general.architecture"] == "controlvector"
        assert values["controlvector.model_hint"] == "llama"
        assert values["controlvector.layer_count"] == 2
        assert values["steering_vectors.operation"] == "add"
        assert values["steering_vectors.site"] == "residual_stream_post_layer"
        assert values["steering_vectors.layer_convention"] == "direction.N is added to the output of block N, from 0"
        assert [(t.name, t.tensor_type.name, t.data.shape) for t in reader.tensors] == [
            ("direction.10", "F32", (8,)),
            ("direction.16", "F32", (8,)),
        ]
        np.testing.assert_array_equal(reader.tensors[0].data, VECTOR.layer_activations[10].numpy())

    def test_it_comes_back_with_its_metadata(self, written: Path) -> None:
        vector = from_gguf(written)
        assert vector == VECTOR
        assert all(same_bits(vector.layer_activations[n], VECTOR.layer_activations[n]) for n in VECTOR)
        assert vector.metadata == {**MODEL, "model_hint": "llama"}

    def test_the_multiplier_is_in_the_directions(self, tmp_path: Path) -> None:
        options = to_gguf(VECTOR, tmp_path / "v.gguf", multiplier=-2.5)
        assert options.strength == 1.0
        loaded = from_gguf(tmp_path / "v.gguf")
        assert loaded == -2.5 * VECTOR
        assert loaded.metadata["derivation"] == "-2.5 * a vector"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_become_float32(self, tmp_path: Path, dtype: torch.dtype) -> None:
        vector = VECTOR.to(dtype)
        to_gguf(vector, tmp_path / "v.gguf")
        assert from_gguf(tmp_path / "v.gguf") == vector.to(torch.float32)

    def test_rows_gradients_and_negative_layers(self, tmp_path: Path) -> None:
        vector = SteeringVector({-1: torch.ones(1, 4, requires_grad=True)}, metadata=MODEL)
        options = to_gguf(vector, tmp_path / "v.gguf")
        assert (options.first_layer, options.last_layer) == (29, 29)
        assert from_gguf(tmp_path / "v.gguf") == SteeringVector({29: torch.ones(4)})

    @pytest.mark.parametrize(
        ("metadata", "model_hint", "expected"),
        [
            ({}, "qwen2", "qwen2"),
            (MODEL, "qwen2", "qwen2"),
            (MODEL, None, "llama"),
            ({"model_hint": "gptj"}, None, "gptj"),
        ],
    )
    def test_the_model_hint(self, tmp_path: Path, metadata: Any, model_hint: str | None, expected: str) -> None:
        to_gguf(SteeringVector({1: [1.0]}, metadata=metadata), tmp_path / "v.gguf", model_hint=model_hint)
        found = gguf.GGUFReader(tmp_path / "v.gguf").fields["controlvector.model_hint"].contents()
        assert found == expected
        to_gguf(SteeringVector({1: [1.0]}), tmp_path / "v.gguf")
        assert "controlvector.model_hint" not in gguf.GGUFReader(tmp_path / "v.gguf").fields

    @pytest.mark.parametrize(
        ("vector", "keywords", "error", "message"),
        [
            (SteeringVector({0: [1.0]}), {}, ValueError, "can't steer layer 0, and refuses .*: merge the direction into"),
            (SteeringVector({0: [1.0], 1: [1.0]}), {}, ValueError, r"can't steer layer 0.*: write vector\[1:\] without it"),
            (SteeringVector({-30: [1.0]}, metadata=MODEL), {}, ValueError, "can't steer layer 0"),
            (SteeringVector({-1: [1.0]}), {}, ValueError, "layer -1 counts from the model's end, but the metadata don't"),
            (SteeringVector({30: [1.0]}, metadata=MODEL), {}, ValueError, r"has layer 30, but its model has 30 layers \(0"),
            (SteeringVector({29: [1.0], -1: [1.0]}, metadata=MODEL), {}, ValueError, "two of the vector's layers are layer 29"),
            (SteeringVector({}), {}, ValueError, "has no directions: there is nothing to write"),
            (SteeringVector({1: [1.0]}, "mlp"), {}, ValueError, "llama.cpp steers the outputs of decoder blocks, but this vector is of mlp"),
            (
                SteeringVector({1: [1.0]}, metadata={"layer_config": '{"decoder_block": "h.{num}.x"}'}),
                {},
                ValueError,
                "steers the outputs of decoder blocks, but this vector is of {.decoder_block.: .h.{num}.x",
            ),
            (SteeringVector({1: torch.tensor([1e300], dtype=torch.float64)}), {}, ValueError, "layer 1, times 1, has numbers too large for fl"),
            (VECTOR, {"multiplier": 3e38}, ValueError, "times 3e.38, has numbers too large for float32"),
            (VECTOR, {"multiplier": float("nan")}, ValueError, "multiplier must be finite, got nan"),
            (VECTOR, {"multiplier": "2"}, TypeError, "multiplier must be a number, got '2'"),
            (VECTOR, {"model_hint": 3}, TypeError, "model_hint must be a text such as 'llama', got 3"),
            (VECTOR, {"model_hint": "\udc80"}, ValueError, r"'controlvector.model_hint' can't be written .* '.udc80' has characters that are not Unicode"),
            (SteeringVector({1: [1.0]}, metadata={"note": "a\ud800"}), {}, ValueError, r"'steering_vectors.note' can't be written .* 'a.ud800' has"),
            (SteeringVector({2**33: [1.0]}), {}, ValueError, "has layer 8589934592, and llama.cpp reads layers up to 999999999"),
            ({1: [1.0]}, {}, TypeError, "expected a SteeringVector, got dict"),
        ],
    )  # fmt: skip
    def test_what_llama_cpp_can_not_steer_is_refused(
        self, tmp_path: Path, vector: Any, keywords: Any, error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            to_gguf(vector, tmp_path / "v.gguf", **keywords)
        assert os.listdir(tmp_path) == []

    def test_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        vector = SteeringVector({1: torch.ones(2)})
        vector.layer_activations[1][0] = float("nan")
        with pytest.raises(ValueError, match="the direction of layer 1 has NaN or infinite numbers"):
            to_gguf(vector, tmp_path / "v.gguf")
        assert os.listdir(tmp_path) == []

    def test_without_the_package_the_error_names_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r"pip install 'steering-vectors\[gguf\]'"):
            to_gguf(VECTOR, tmp_path / "v.gguf")
        assert from_gguf(written) == VECTOR  # reading does without

    def test_places_that_are_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file in it$"):
            to_gguf(VECTOR, tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no folder .*none: create it before saving"):
            to_gguf(VECTOR, tmp_path / "none" / "v.gguf")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="exists and is not a regular file"):
            to_gguf(VECTOR, tmp_path / "pipe")

    def test_an_old_file_stays_until_the_new_one_is_whole(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
        with pytest.raises(OSError, match="the disk is full"):
            to_gguf(2 * VECTOR, written)
        assert from_gguf(written) == VECTOR
        assert os.listdir(written.parent) == ["joy.gguf"]
        monkeypatch.undo()
        to_gguf(2 * VECTOR, written)
        assert from_gguf(written) == 2 * VECTOR


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: to_gguf(VECTOR, folder / "v"),
        lambda folder: VECTOR.save(folder / "v"),
        lambda folder: interop.to_caa(VECTOR[10], folder / "v"),
        lambda folder: interop.to_persona_vectors(VECTOR, folder / "v"),
        lambda folder: interop.to_refusal_direction(VECTOR[10], folder),
        lambda folder: interop.to_lm_eval(
            SteeringVector({1: torch.ones(tiny.HIDDEN)}), tiny.shared("llama"), folder / "v.pt"
        ),
    ],
)
def test_a_read_only_folder_is_an_error_in_words(read_only: Path, write: Any) -> None:
    with pytest.raises(PermissionError, match=f"no file can be written in {read_only}: its permissions don't allow it"):
        write(read_only)
    assert os.listdir(read_only) == []


class TestOptions:
    def test_are_a_line_for_people_and_a_list_for_programs(self) -> None:
        options = LlamaCppOptions("joy.gguf", 1.0, 10, 16)
        assert str(options) == "--control-vector-scaled joy.gguf:1.0 --control-vector-layer-range 10 16"
        assert options.arguments == str(options).split()

    @pytest.mark.parametrize(
        ("path", "named"),
        [
            ("a b.gguf", ["--control-vector-scaled", "a b.gguf:1.0"]),
            ("a,b.gguf", ["--control-vector-scaled", '"a,b.gguf:1.0"']),
            ("C:\\joy.gguf", ["--control-vector", "C:\\joy.gguf"]),
            ('"a":b.gguf', ["--control-vector", '"""a"":b.gguf"']),
        ],
    )
    def test_quote_names_as_the_shell_and_llama_cpp_read_them(self, path: str, named: list[str]) -> None:
        options = LlamaCppOptions(path, 1.0, 1, 2)
        assert options.arguments[:2] == named
        assert shlex.split(str(options)) == options.arguments

    def test_are_of_the_file(self, tmp_path: Path) -> None:
        assert to_gguf(VECTOR, tmp_path / "v.gguf") == LlamaCppOptions(str(tmp_path / "v.gguf"), 1.0, 10, 16)


class TestReading:
    def test_a_file_written_by_hand(self, tmp_path: Path) -> None:
        (tmp_path / "v.gguf").write_bytes(file_of())
        assert from_gguf(tmp_path / "v.gguf") == SteeringVector({10: torch.arange(8.0)})

    def test_files_of_repeng(self, tmp_path: Path) -> None:
        """Written as its ControlVector.export_gguf does."""
        writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
        writer.add_string("controlvector.model_hint", "mistral")
        writer.add_uint32("controlvector.layer_count", 2)
        for layer in (0, 7):
            writer.add_tensor(f"direction.{layer}", np.full(3, layer + 1, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        vector = load_repeng(tmp_path / "v.gguf")
        assert vector == SteeringVector({0: [1.0, 1.0, 1.0], 7: [8.0, 8.0, 8.0]})
        assert vector.metadata == {"model_type": "mistral"}
        with pytest.raises(
            ValueError, match=r"has direction.0, which llama.cpp refuses: for a file by repeng, use load_re"
        ):
            from_gguf(tmp_path / "v.gguf")

    def test_a_file_numbered_from_1(self, tmp_path: Path) -> None:
        """llama.cpp's cvector-generator writes direction.1 for block 0."""
        tensors = [tensor("direction.1"), tensor("direction.2", place=32)]
        (tmp_path / "v.gguf").write_bytes(file_of(tensors=tensors, data=np.arange(16, dtype="<f4").tobytes()))
        assert from_gguf(tmp_path / "v.gguf", layer_offset=-1) == SteeringVector(
            {0: torch.arange(8.0), 1: torch.arange(8.0, 16.0)}
        )
        with pytest.raises(ValueError, match="with layer_offset=-2, its first layer would be -1"):
            from_gguf(tmp_path / "v.gguf", layer_offset=-2)
        for wrong in (True, 0.5, "1"):
            with pytest.raises(TypeError, match="layer_offset must be a whole number, such as -1, got"):
                from_gguf(tmp_path / "v.gguf", layer_offset=wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("offset", "last"), [(-11, "first layer would be -1"), (2**33, f"last layer would be {2**33 + 10}")]
    )
    def test_offsets_out_of_any_model_are_refused(self, tmp_path: Path, offset: int, last: str) -> None:
        (tmp_path / "v.gguf").write_bytes(file_of())
        with pytest.raises(ValueError, match=f"v.gguf: with layer_offset={offset}, its {last}"):
            from_gguf(tmp_path / "v.gguf", layer_offset=offset)

    def test_the_order_is_that_of_layers(self, tmp_path: Path) -> None:
        tensors = [tensor("direction.10"), tensor("direction.2", place=32)]
        (tmp_path / "v.gguf").write_bytes(file_of(tensors=tensors, data=bytes(64)))
        assert list(from_gguf(tmp_path / "v.gguf").layer_activations) == [2, 10]

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("glp.mode", "project", "its glp.mode is 'project': the directions are not to be added"),
            ("glp.mode", "Add", "its glp.mode is 'Add'"),
            ("glp.mode", 1, "its glp.mode is '1'"),
            ("glp.hook_point", "ffn_out_pre_residual", "its glp.hook_point is 'ffn_out_pre_residual', expected 'residual_"),
            ("steering_vectors.operation", "project", "its steering_vectors.operation is 'project'"),
            ("steering_vectors.site", "mlp", "its steering_vectors.site is 'mlp', expected"),
        ],
    )  # fmt: skip
    def test_directions_that_are_not_to_be_added_are_refused(
        self, tmp_path: Path, name: str, value: Any, message: str
    ) -> None:
        assert message in refused(file_of([ARCHITECTURE, entry(name, value)]), tmp_path)

    def test_files_of_others_that_say_add_are_read(self, tmp_path: Path) -> None:
        said = [entry("glp.mode", "add"), entry("glp.hook_point", "residual_stream_post_layer")]
        (tmp_path / "v.gguf").write_bytes(file_of([ARCHITECTURE, *said]))
        assert from_gguf(tmp_path / "v.gguf").layers == [10]

    def test_a_file_names_no_modules_to_steer(self, tmp_path: Path) -> None:
        entries = [
            ARCHITECTURE,
            entry("steering_vectors.layer_config", '{"decoder_block": "lm_head"}'),
            entry("steering_vectors.norms", "{}"),
            entry("steering_vectors.method", "by hand"),
            entry("steering_vectors.samples", 3),
        ]
        (tmp_path / "v.gguf").write_bytes(file_of(entries))
        assert from_gguf(tmp_path / "v.gguf").metadata == {"method": "by hand"}

    @pytest.mark.parametrize("version", [2, 3])
    def test_all_types_of_metadata_are_passed_over(self, tmp_path: Path, version: int) -> None:
        sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        entries = [entry(f"a{kind}", bytes(size), kind) for kind, size in sizes.items()]
        entries += [
            entry(f"b{kind}", struct.pack("<IQ", kind, 3) + bytes(3 * size), ARRAY) for kind, size in sizes.items()
        ]
        entries.append(entry("c", struct.pack("<IQ", STRING, 2) + text("x") + text("yz"), ARRAY))
        (tmp_path / "v.gguf").write_bytes(file_of([*entries, ARCHITECTURE], version=version))
        assert from_gguf(tmp_path / "v.gguf").layers == [10]

    def test_sizes_of_one_at_the_end_are_no_dimensions(self, tmp_path: Path) -> None:
        (tmp_path / "v.gguf").write_bytes(file_of(tensors=[tensor("direction.10", (8, 1, 1))]))
        assert from_gguf(tmp_path / "v.gguf").hidden_size == 8

    def test_files_that_are_not_there(self, tmp_path: Path) -> None:
        for read in (from_gguf, load_repeng):
            with pytest.raises(FileNotFoundError, match="there is no file .*none"):
                read(tmp_path / "none")
            with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
                read(tmp_path)

    def test_a_file_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("steering_vectors.interop.gguf_file.LARGEST_FILE", 100)
        assert "bytes; a control vector has at most 100" in refused(file_of(), tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not a GGUF file: it begins with b''"),
            (b"PK\x03\x04", "is not a GGUF file: it begins with b'PK"),
            (b"GGUF", "it ends at byte 4, in the middle of an entry"),
            (file_of(version=1), "its version is 1, expected one of (2, 3)"),
            (file_of(version=3 << 24), "its version is 50331648, expected one of (2, 3), in little-endian order"),
            (file_of(counts=(2**40, 1)), "tensors and 1 metadata, at most 10000 are read"),
            (file_of(counts=(1, 2**63)), "metadata, at most 10000 are read"),
            (file_of(counts=(9000, 1)), "can't be read as a GGUF file of a control vector"),
            (file_of([]), "its general.architecture is None, expected 'controlvector'"),
            (file_of([entry("general.architecture", "llama")]), "its general.architecture is 'llama', expected"),
            (file_of([entry("general.architecture", "x" * 999)]), "its general.architecture is 'xxx"),
            (file_of([ARCHITECTURE, ARCHITECTURE]), "it has two entries named 'general.architecture'"),
            (file_of([ARCHITECTURE, entry("x", b"\xff", STRING)]), "is not UTF-8"),
            (file_of([ARCHITECTURE, entry(b"\xff", "x")]), "is not UTF-8"),
            (file_of([ARCHITECTURE, entry("x" * 70_000, "x")]), "one of its names has 70000 bytes, expected at most 65535"),
            (file_of([ARCHITECTURE, entry("x", b"", 13)]), "a value has the unknown type 13"),
            (file_of([entry("x", struct.pack("<IQ", UINT32, 2**62), ARRAY)]), "it ends at byte"),
            (file_of([entry("x", struct.pack("<IQ", STRING, 2**62), ARRAY)]), "it has an array of 4611686018427387904 values"),
            (file_of([entry("x", struct.pack("<IQ", ARRAY, 1), ARRAY)]), "it has an array of 1 values of type 9"),
            (file_of([ARCHITECTURE, entry("general.alignment", 0)]), "its general.alignment is 0, expected a power of two"),
            (file_of([ARCHITECTURE, entry("general.alignment", 48)]), "its general.alignment is 48, expected a power"),
            (file_of([ARCHITECTURE, entry("general.alignment", 2**31)]), "expected a power of two"),
            (file_of([ARCHITECTURE, entry("general.alignment", "32")]), "its general.alignment is '32'"),
            (file_of(tensors=[tensor("direction.1", kind=F16)]), "its tensor 'direction.1' is of type F16, expected F32"),
            (file_of(tensors=[tensor("direction.1", kind=99)]), "is of type 99, expected F32"),
            (file_of(tensors=[tensor("direction.1", (4, 2))]), "has the shape (2, 4), expected (hidden,)"),
            (file_of(tensors=[tensor("direction.1", (1, 8))]), "has the shape (8, 1), expected (hidden,)"),
            (file_of(tensors=[tensor("direction.1", ())]), "has the shape (), expected (hidden,)"),
            (file_of(tensors=[tensor("direction.1", (0,))]), "has the shape (0,), expected (hidden,)"),
            (file_of(tensors=[tensor("direction.1", (8,) * 5)]), "has 5 dimensions"),
            (file_of(tensors=[tensor("direction.1", (2**62,))]), "have more numbers than the 32 bytes after its header"),
            (file_of(tensors=[tensor("direction.1"), tensor("direction.2")]), "have more numbers than the 32 bytes"),
            (file_of(tensors=[tensor("direction.1"), tensor("direction.1")]), "two entries named 'direction.1'"),
            (file_of(tensors=[tensor("direction.1", place=32)]), "'direction.1' lies beyond the file's end"),
            (file_of(tensors=[tensor("direction.1", place=2**63)]), "'direction.1' lies beyond the file's end"),
            (file_of(tensors=[]), "the file has no directions"),
            (file_of(tensors=[tensor("direction.0")]), "it has direction.0, which llama.cpp refuses"),
            (file_of(tensors=[tensor("direction.01")]), "its tensor 'direction.01' has no layer"),
            (file_of(tensors=[tensor("direction.-1")]), "its tensor 'direction.-1' has no layer"),
            (file_of(tensors=[tensor("direction.3.1")]), "its tensor 'direction.3.1' has no layer"),
            (file_of(tensors=[tensor("direction.١")]), "has no layer: expected a name such as 'direction.16'"),
            (file_of(tensors=[tensor("x" * 999)]), "has no layer"),
            (file_of(data=np.full(8, np.nan, dtype="<f4").tobytes()), "layer 10 has NaN or infinite numbers"),
            (
                file_of(tensors=[tensor("direction.1", (4,)), tensor("direction.2", (2,))]),
                "all directions must have the same width, got [2, 4]",
            ),
        ],
        ids=lambda value: value[:60] if isinstance(value, str) else "",
    )  # fmt: skip
    def test_what_is_no_control_vector_is_an_error_in_words(self, tmp_path: Path, content: bytes, message: str) -> None:
        said = refused(content, tmp_path)
        assert message in said
        assert len(said) < 500 + len(str(tmp_path))


GOOD = file_of(
    [ARCHITECTURE, entry("controlvector.model_hint", "llama"), entry("controlvector.layer_count", 2)],
    [tensor("direction.1"), tensor("direction.2", place=32)],
    np.arange(16, dtype="<f4").tobytes(),
)
flipped = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8).map(
    lambda changes: bytes(dict(changes).get(n, byte) for n, byte in enumerate(GOOD))
)
cut = st.tuples(st.integers(0, len(GOOD)), st.integers(0, len(GOOD))).map(
    lambda ends: GOOD[: min(ends)] + GOOD[max(ends) :]
)
numbers = st.sampled_from([0, 1, 2, 8, 2**31, 2**62, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
# A large number over any 8 bytes: counts, lengths, sizes and places.
large = st.tuples(st.integers(4, len(GOOD) - 8), numbers).map(
    lambda change: GOOD[: change[0]] + struct.pack("<Q", change[1]) + GOOD[change[0] + 8 :]
)
built = st.builds(
    lambda names, sizes, kinds, places, version, arrays: file_of(
        [ARCHITECTURE, *(entry(f"x{n}", struct.pack("<IQ", *array), ARRAY) for n, array in enumerate(arrays))],
        [tensor(*parts) for parts in zip(names, sizes, kinds, places)],
        bytes(64),
        version,
    ),
    st.lists(st.sampled_from(["direction.1", "direction.2", "direction.0"]) | st.text(max_size=9), max_size=3),
    st.lists(st.lists(numbers, max_size=5), min_size=3, max_size=3),
    st.lists(st.sampled_from([F32, F32, F32, F16, 30, 2**32 - 1]), min_size=3, max_size=3),
    st.lists(numbers, min_size=3, max_size=3),
    st.sampled_from([3, 3, 3, 2, 1, 2**31]),
    st.lists(st.tuples(st.integers(0, 13), numbers), max_size=2),
)
anything = st.binary(max_size=300) | st.binary(max_size=300).map(lambda end: b"GGUF\3\0\0\0" + end)
FOLDER = tempfile.TemporaryDirectory()


class TestFuzz:
    """A hostile file gives a vector or a clear ValueError: no crash, no hang, no more memory than some times the file."""

    @settings(max_examples=TRIES, deadline=20_000, suppress_health_check=list(HealthCheck))
    @given(flipped | cut | large | built | anything)
    def test_any_file_is_a_vector_or_an_error_in_words(self, content: bytes) -> None:
        path = Path(FOLDER.name) / f"{os.getpid()}.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            vector = load_repeng(path)
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 2000
            event("an error in words")
        else:
            event("a vector")
            assert all(bool(direction.isfinite().all()) for direction in vector.layer_activations.values())
            assert len(vector) > 0
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < 200_000 + 40 * len(content)
