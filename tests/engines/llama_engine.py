"""llama.cpp by its C functions: a model in F32, a control vector's file as its own reader reads it, and logits."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor

_LIBRARY = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
_POINTER = ctypes.c_void_p
# By the function's name, what it returns and takes.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "gguf_init_from_file": (_POINTER, [ctypes.c_char_p, None]),
    "gguf_get_n_tensors": (ctypes.c_int64, [_POINTER]),
    "gguf_get_tensor_name": (ctypes.c_char_p, [_POINTER, ctypes.c_int64]),
    "gguf_get_tensor_type": (ctypes.c_int, [_POINTER, ctypes.c_int64]),
    "ggml_get_tensor": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_n_dims": (ctypes.c_int, [_POINTER]),
    "ggml_nelements": (ctypes.c_int64, [_POINTER]),
    "ggml_get_data_f32": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "gguf_free": (None, [_POINTER]),
    "ggml_free": (None, [_POINTER]),
}


_SILENT = llama_cpp.llama_log_callback(lambda level, message, data: None)


class _Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(_POINTER))]


_FUNCTIONS["gguf_init_from_file"][1][1] = _Parameters
for _name, (_result, _takes) in _FUNCTIONS.items():
    getattr(_LIBRARY, _name).restype = _result
    getattr(_LIBRARY, _name).argtypes = _takes


def directions_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a control vector's file by name, read by ggml, with the checks of llama.cpp's loader."""
    data = _POINTER()
    file = _LIBRARY.gguf_init_from_file(str(path).encode(), _Parameters(False, ctypes.pointer(data)))
    assert file, f"llama.cpp can't read {path}"
    found = {}
    for number in range(_LIBRARY.gguf_get_n_tensors(file)):
        name = _LIBRARY.gguf_get_tensor_name(file, number)
        tensor = _LIBRARY.ggml_get_tensor(data, name)
        assert _LIBRARY.gguf_get_tensor_type(file, number) == 0, "F32"
        assert _LIBRARY.ggml_n_dims(tensor) == 1
        size = _LIBRARY.ggml_nelements(tensor)
        found[name.decode()] = np.ctypeslib.as_array(_LIBRARY.ggml_get_data_f32(tensor), (size,)).copy()
    _LIBRARY.gguf_free(file)
    _LIBRARY.ggml_free(data)
    return found


def write_llama(model: Any, path: Path) -> None:
    """Write a Llama of Hugging Face as a GGUF file in F32, without a tokenizer."""
    config, state = model.config, {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for block in range(config.num_hidden_layers):
        for name, there in parts.items():
            weight = state[f"model.layers.{block}.{name}.weight"]
            if there in heads:  # llama.cpp rotates pairs of neighbours, Hugging Face the two halves of a head
                shape = (heads[there], 2, weight.shape[0] // heads[there] // 2, weight.shape[1])
                weight = np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{block}.{there}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """A model in llama.cpp, on the CPU."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_SILENT, _POINTER())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, "llama.cpp can't read the model"
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 64
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = 0  # F32
        parameters.flash_attn_type = 0  # off
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.blocks = llama_cpp.llama_model_n_layer(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def steer(self, path: Path | None, strength: float = 1.0, first: int = 1, last: int | None = None) -> None:
        """Apply a file as ``--control-vector-scaled PATH:STRENGTH --control-vector-layer-range FIRST LAST`` does."""
        llama_cpp.llama_set_adapter_cvec(self.context, None, 0, self.width, 0, 0)
        if path is None:
            return
        rows = np.zeros((self.blocks - 1, self.width), dtype=np.float32)  # of layer 1 at place 0
        for name, direction in directions_of(path).items():
            rows[int(name.removeprefix("direction.")) - 1] += direction * np.float32(strength)
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        end = self.blocks if last is None else last
        assert llama_cpp.llama_set_adapter_cvec(self.context, data, rows.size, self.width, first, end) == 0

    def adapt(self, path: Path, scale: float = 1.0) -> None:
        """Apply an adapter's file as ``--lora-scaled PATH:SCALE`` does."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, "llama.cpp can't read the adapter"
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(scale)
        assert llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits ``(seq, vocabulary)`` of a prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        assert llama_cpp.llama_decode(self.context, batch) == 0
        shape = (len(ids), self.vocabulary)
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape).copy()
        llama_cpp.llama_batch_free(batch)
        return torch.from_numpy(found)
