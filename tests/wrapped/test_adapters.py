"""Adapters of PEFT, loaded in a fresh process without this library, against the steered model."""

import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    ablation_operator,
    addition_operator,
    clamp_operator,
)
from steering_vectors.merging import Adapter, check_base, merge, merge_ablation, to_adapter
from tests import tiny
from tests.merging.cases import DIRECTION, MULTIPLIER, SEVERAL, VECTOR
from tests.merging.fresh import IDS, lively, logits, logits_in_a_fresh_process

peft = pytest.importorskip("peft", minversion="0.21")

pytestmark = [
    pytest.mark.xdist_group("adapters"),
    pytest.mark.filterwarnings(
        "ignore:.*script_method.*:DeprecationWarning", "ignore::FutureWarning:transformers", "ignore::UserWarning:peft"
    ),
]

_SCRIPT = """
import sys
sys.modules["steering_vectors"] = None  # an import of it fails
import torch, transformers, peft
ids, items = torch.load(sys.argv[1])
made = {}
for item in items:
    base, adapter = item.split("|")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        made[item] = model(ids, use_cache=False).logits
        with model.disable_adapter():
            assert torch.equal(model(ids, use_cache=False).logits, plain)
torch.save(made, sys.argv[2])
"""

# A case's name → the architecture, what its config says besides, and True if biases are random.
ABLATED: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{
        name: (name, {}, True)
        for name in (
            *("cohere", "falcon", "gemma", "granite", "llama", "mistral", "mixtral", "nemotron", "phi3", "qwen2"),
            *("qwen2_moe", "qwen3", "qwen3_moe", "stablelm"),
        )
    },
    **{name: (name, {}, False) for name in ("gpt2", "gpt_neox", "phi")},
    "llama, tied": ("llama", {"tie_word_embeddings": True}, True),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, True),
}
ADDED = [
    *("cohere", "falcon", "gemma", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mamba", "mistral", "opt", "phi"),
    *("nemotron", "phi3", "qwen2", "qwen3", "stablelm"),
]
CASES = [
    *(("ablated", name) for name in ABLATED),
    *(("ablated by 0.7", name) for name in ("llama", "mixtral")),
    *(("without three", name) for name in ("llama", "qwen2", "qwen3_moe")),
    *(("added", name) for name in ADDED),
]


def made_for(kind: str, name: str) -> Any:
    if kind == "added":
        return lively(name)
    architecture, settings, biases = ABLATED[name]
    return lively(architecture, **settings) if biases else tiny.build(architecture, **settings)


def steered(kind: str, model: Any) -> Tensor:
    contexts: dict[str, Callable[[], Any]] = {
        "ablated": lambda: ablate_everywhere(model, DIRECTION),
        "ablated by 0.7": lambda: ablate_everywhere(model, DIRECTION, strength=0.7),
        "without three": lambda: ablate_everywhere(model, SEVERAL),
        "added": lambda: VECTOR.apply(model, multiplier=MULTIPLIER),
    }
    with contexts[kind]():
        return logits(model)


def written(kind: str, model: Any, folder: Path) -> Adapter:
    if kind == "added":
        return to_adapter(VECTOR, model, folder, multiplier=MULTIPLIER)
    direction, strength = (SEVERAL if "three" in kind else DIRECTION), (0.7 if "0.7" in kind else 1.0)
    return to_adapter(direction, model, folder, operator=ablation_operator(), multiplier=strength)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tensor]:
    """By case, the logits that PEFT computes in a fresh process."""
    folder, items = tmp_path_factory.mktemp("adapters"), {}
    for number, (kind, name) in enumerate(CASES):
        model, base = made_for(kind, name), folder / f"base{number}"
        model.save_pretrained(base)
        written(kind, model, folder / f"adapter{number}")
        items[kind, name] = f"{base}|{folder / f'adapter{number}'}"
    found = logits_in_a_fresh_process(items.values(), folder, script=_SCRIPT)
    return {case: found[item] for case, item in items.items()}


class TestEachCase:
    @pytest.mark.parametrize(("kind", "name"), CASES)
    def test_computes_what_the_steered_model_does_in_a_fresh_process(self, fresh: Any, kind: str, name: str) -> None:
        model = made_for(kind, name)
        expected = steered(kind, model)
        torch.testing.assert_close(fresh[kind, name], expected, atol=2e-5, rtol=1e-5)
        assert (expected - logits(model)).abs().max() > 0.05

    def test_without_the_embedding_misses_nearly_the_whole_effect(self, tmp_path: Path) -> None:
        """As such adapters are often made."""
        model = lively("llama")
        written("ablated", model, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "lame")
        tensors = load_file(tmp_path / "lame" / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if "embedding" in name:
                tensor.zero_()
        save_file(tensors, tmp_path / "lame" / "adapter_model.safetensors", {"format": "pt"})
        expected, plain = steered("ablated", model), logits(model)
        lame = logits(peft.PeftModel.from_pretrained(model, tmp_path / "lame").eval())
        assert (lame - expected).abs().max() > 0.3 * (plain - expected).abs().max()


NORM, BIAS, EXPERTS = "a norm, or something else", "is a bias with a part along", "a mixture of experts comes after"
# What the page says of a family's ablation and addition: nothing if they are exact, else the reason for the refusal.
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("cohere", "falcon", "gemma", "granite", "llama", "mistral", "nemotron", "phi3"), ("", "")),
    **dict.fromkeys(("qwen2", "qwen3", "stablelm"), ("", "")),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), ("", EXPERTS)),
    **dict.fromkeys(("gpt_neox", "gpt_neo", "gptj", "opt", "phi"), (BIAS, "")),
    "gpt2": (BIAS, "of a kind to which PEFT can't add a bias"),
    "mamba": ("PEFT has no such adapters for MambaForCausalLM", ""),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), (NORM, "is added to the stream as it is: a norm")),
}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The lines of a table, printed once all families have run."""
    lines = [f"{'':<12}{'ablation':<68}addition"]
    yield lines
    print("\n\n" + "\n".join(lines))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_exact_or_refused_as_the_page_says(rows: list[str], tmp_path: Path, name: str) -> None:
    cells = []
    for kind, reason in zip(("ablated", "added"), FAMILIES[name], strict=True):
        model = lively(name)
        expected = steered(kind, model)
        try:
            adapter = written(kind, model, tmp_path / kind)
        except ValueError as error:
            assert reason
            assert re.search(reason, str(error))
            cells.append(f"refused: … {reason} …")
            continue
        assert not reason
        off = float((logits(peft.PeftModel.from_pretrained(model, adapter.folder).eval()) - expected).abs().max())
        cells.append(f"{off:.0e} of {float((expected - logits(lively(name))).abs().max()):.1f}")
        assert off < 2e-5
    rows.append(f"{name:<12}{cells[0]:<68}{cells[1]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_additions_to_experts_are_refused_also_where_rounding_is_as_large(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Experts with small weights change little of what attention adds before them."""
    model = tiny.build(name)
    for path, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in path:
            torch.nn.init.normal_(weight, std=0.05)
    with pytest.raises(ValueError, match="or a mixture of experts comes after the last one"):
        to_adapter(VECTOR, model.to(dtype), tmp_path / "x")
    assert not (tmp_path / "x").exists()


class TestTheFolder:
    def test_has_the_adapter_alone_and_no_base_weights(self, tmp_path: Path) -> None:
        model = lively("llama")
        adapter = written("ablated", model, tmp_path / "ablated")
        assert adapter.folder == tmp_path / "ablated"
        names = load_file(tmp_path / "ablated" / "adapter_model.safetensors")
        assert all("lora" in name for name in names)
        assert len(names) == 2 * (2 * tiny.LAYERS + 1)
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors", "steering_adapter.json"}
        config = json.loads((tmp_path / "ablated" / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == ["down_proj", "embed_tokens", "o_proj"]

    def test_names_the_operation_and_the_weights_of_the_base(self, tmp_path: Path) -> None:
        hashes = []
        for model in (lively("llama"), lively("llama"), lively("llama").bfloat16()):
            to_adapter(VECTOR, model, tmp_path / "added", multiplier=0.2)
            facts = json.loads((tmp_path / "added" / "steering_adapter.json").read_text())
            assert (facts["operation"], facts["layers"], facts["multiplier"]) == ("add", [0, 2], 0.2)
            hashes.append(facts["base_sha256"])
        assert hashes[0] == hashes[1] != hashes[2]

    def test_is_checked_against_the_weights_of_a_base(self, tmp_path: Path) -> None:
        model = lively("llama")
        adapter = written("ablated", model, tmp_path / "x")
        model.save_pretrained(tmp_path / "base")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        check_base(adapter.folder, loaded)
        with pytest.raises(ValueError, match="was made for other weights than those of this LlamaForCausalLM: .*dtype"):
            check_base(str(adapter.folder), loaded.bfloat16())
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        with pytest.raises(ValueError, match="x was made for other weights"):
            check_base(adapter.folder, model)

    def test_is_no_adapter_of_ours_if_it_names_no_base(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="has no steering_adapter.json: it is not a folder of to_adapter"):
            check_base(tmp_path, tiny.shared("llama"))
        for content in ("{", "[1]", "{}", '{"base_sha256": 3}', "[" * 100_000, "\udc80"):
            (tmp_path / "steering_adapter.json").write_bytes(content.encode("utf-8", "surrogatepass"))
            with pytest.raises(ValueError, match="steering_adapter.json names no base"):
                check_base(tmp_path, tiny.shared("llama"))
        with pytest.raises(TypeError, match="model must be a Hugging Face model .*, got str"):
            check_base(tmp_path, "gpt2")  # type: ignore[arg-type]

    def test_s_name_changes_with_the_contents(self, tmp_path: Path) -> None:
        model = lively("llama")
        names = [written(kind, model, tmp_path / "x").name for kind in ("ablated", "ablated", "ablated by 0.7")]
        assert names[0] == names[1] != names[2]
        assert all(name.startswith("x-") and len(name) == 10 for name in names)

    def test_of_an_older_adapter_is_replaced_whole(self, tmp_path: Path) -> None:
        model = lively("llama")
        written("added", model, tmp_path / "x")
        before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
        written("ablated", model, tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        after = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
        assert all(after[name] != before[name] for name in ("adapter_model.safetensors", "steering_adapter.json"))

    def test_with_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.png").touch()
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="photos has other files than an adapter's"):
            written("added", lively("llama"), tmp_path / "photos")
        written("added", lively("llama"), tmp_path / "mine")
        (tmp_path / "mine" / "notes.txt").touch()
        with pytest.raises(FileExistsError, match="other files than an adapter's, such as notes.txt"):
            written("ablated", lively("llama"), tmp_path / "mine")
        assert (tmp_path / "mine" / "notes.txt").exists()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "pipe")
        for name in ("file", "link", "pipe"):
            with pytest.raises(FileExistsError, match=f"{name} is a file: an adapter is a folder"):
                written("added", lively("llama"), tmp_path / name)
        with pytest.raises(NotADirectoryError, match="file is a file, so no folder can be made in it"):
            written("added", lively("llama"), tmp_path / "file" / "x" / "y")
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"photos", "mine", "file", "link", "pipe"}

    @pytest.mark.parametrize("folder", ["", ".", "..", "/", "x/.."])
    def test_without_a_name_is_refused(self, folder: str) -> None:
        with pytest.raises(ValueError, match="folder must end in a name, such as 'my-adapter', got"):
            to_adapter(VECTOR, lively("llama"), folder)

    def test_in_a_read_only_folder_is_refused_before_any_work(self, read_only: Path) -> None:
        with pytest.raises(PermissionError, match=f"no folder can be made in {read_only}: its permissions don't allow"):
            written("added", tiny.shared("llama"), read_only / "x" / "y")
        assert os.listdir(read_only) == []

    def test_behind_a_link_to_an_adapter_is_replaced(self, tmp_path: Path) -> None:
        written("added", lively("llama"), tmp_path / "x")
        (tmp_path / "link").symlink_to(tmp_path / "x")
        written("ablated", lively("llama"), tmp_path / "link")
        facts = json.loads((tmp_path / "link" / "steering_adapter.json").read_text())
        assert facts["operation"] == "ablate everywhere"

    def test_stays_as_it_was_if_writing_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = lively("llama")
        written("added", model, tmp_path / "x")
        before = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()

        def fail(self: Any, path: str, **kwargs: Any) -> None:
            Path(path).mkdir()
            (Path(path) / "adapter_config.json").touch()
            raise OSError("no space left on device")

        monkeypatch.setattr(peft.PeftModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            written("ablated", model, tmp_path / "x")
        with pytest.raises(OSError, match="no space left"):
            written("ablated", model, tmp_path / "y")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == before


class TestForVLLM:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("llama", "--enable-lora --max-lora-rank 1 --max-loras 2 --lora-modules"),
            ("qwen2", "--enable-lora --max-lora-rank 1 --max-loras 2 --model-impl transformers --lora-modules"),
        ],
    )
    def test_an_ablation_names_the_options_of_the_server(self, tmp_path: Path, name: str, options: str) -> None:
        adapter = written("ablated", made_for("ablated", name), tmp_path / "x")
        assert adapter.vllm_options == f"{options} {adapter.name}={tmp_path / 'x'}"
        assert (adapter.why_not_vllm, adapter.rank) == ("", 1)

    def test_several_directions_need_a_rank_that_vllm_has(self, tmp_path: Path) -> None:
        adapter = written("without three", lively("llama"), tmp_path / "x")
        assert (adapter.rank, adapter.vllm["max_lora_rank"]) == (3, 8)

    @pytest.mark.parametrize(
        ("kind", "name", "reason"),
        [
            ("added", "llama", "no adapters that add a constant"),
            ("ablated", "gpt2", "named embed_tokens alone, and not on wpe, wte"),
            ("ablated", "mixtral", "adapters on experts were not tried"),
            (
                "ablated",
                "gemma",
                "not known to serve ablations of a model of type 'gemma' exactly, but of arcee, cohere,",
            ),
        ],
    )
    def test_what_it_can_t_serve_has_a_reason(self, tmp_path: Path, kind: str, name: str, reason: str) -> None:
        adapter = written(kind, made_for(kind, name), tmp_path / "x")
        assert reason in adapter.why_not_vllm
        assert adapter.vllm_options == ""

    @pytest.mark.parametrize("folder", ["a b", "it's", "a,b", "a=b", 'a"b'])
    def test_the_options_of_the_server_survive_a_shell(self, tmp_path: Path, folder: str) -> None:
        adapter = Adapter(tmp_path / folder, f"{folder}-12345678", 1, {"enable_lora": True, "max_loras": 2})
        *options, named = shlex.split(adapter.vllm_options)
        assert options == ["--enable-lora", "--max-loras", "2", "--lora-modules"]
        if "=" in named and "," not in named:  # as vLLM reads it
            assert named.split("=", 1) == [adapter.name, str(adapter.folder)]
        else:
            assert json.loads(named) == {"name": adapter.name, "path": str(adapter.folder)}


def test_the_given_model_stays_as_it_was(tmp_path: Path) -> None:
    model = lively("llama").train()
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("added", "ablated"):
        written(kind, model, tmp_path / kind)
    assert model.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["added", "ablated"])
def test_half_precision_agrees_to_its_rounding(kind: str, tmp_path: Path) -> None:
    model = tiny.build("llama").bfloat16()
    written(kind, model, tmp_path / kind)
    expected = steered(kind, model)
    adapted = logits(peft.PeftModel.from_pretrained(model, tmp_path / kind).eval())
    torch.testing.assert_close(adapted, expected, atol=0.1, rtol=0.05)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "a norm after an ablated part": (DIRECTION, lambda: lively("gemma2"), {"operator": ablation_operator()}, ValueError,
        "a Gemma2RMSNorm, is not computed by a linear layer alone"),
    "a norm after an added bias": (VECTOR, lambda: lively("gemma2"), {}, ValueError,
        "no linear layer of model.layers.0, a Gemma2DecoderLayer, is added to the stream as it is"),
    "experts": (VECTOR, lambda: lively("mixtral"), {}, ValueError, "a mixture of experts comes after"),
    "Conv1D": (VECTOR, lambda: lively("gpt2"), {}, ValueError, "of a kind to which PEFT can't add a bias"),
    "biases": (DIRECTION, lambda: lively("phi"), {"operator": ablation_operator()}, ValueError,
        "dense.bias is a bias with a part along the direction, .* merge_ablation"),
    "positions": (DIRECTION, lambda: tiny.build("opt"), {"operator": ablation_operator()}, ValueError,
        "PEFT's adapters don't fit OPTForCausalLM"),
    "another operator": (VECTOR, lambda: lively("llama"), {"operator": clamp_operator(1.0)}, ValueError,
        "an adapter can do addition_operator\\(\\) and ablation_operator\\(\\), got clamp_operator"),
    "a lambda": (VECTOR, lambda: lively("llama"), {"operator": lambda h, d: d}, ValueError, "got <function"),
    "a direction to add": (DIRECTION, lambda: lively("llama"), {"operator": addition_operator()}, TypeError,
        "whose directions have layers, got Tensor: for an ablation everywhere, pass operator=ablation_operator"),
    "tokens": (VECTOR, lambda: lively("llama"), {"tokens": [0]}, TypeError, "an adapter acts at every token"),
    "no directions": (SteeringVector({}), lambda: lively("llama"), {}, ValueError, "the vector has no directions"),
    "a layer type": (SteeringVector({0: torch.ones(32)}, "mlp"), lambda: lively("llama"), {}, ValueError,
        "outputs can be written into an adapter, and this one is of mlp"),
    "zeros": (torch.zeros(32), lambda: lively("llama"), {"operator": ablation_operator()}, ValueError, "all zeros"),
    "the whole width": (torch.eye(32), lambda: lively("llama"), {"operator": ablation_operator()}, ValueError,
        "the directions span all 32 dimensions"),
    "layers": (VECTOR, lambda: lively("llama"), {"operator": ablation_operator()}, ValueError, "removes one direction"),
    "a list": ([1.0] * 32, lambda: lively("llama"), {"operator": ablation_operator()}, TypeError, "got list"),
    "meta": (VECTOR, lambda: lively("llama").to("meta"), {}, ValueError, "weights aren't loaded"),
    "a layer": (SteeringVector({3: torch.ones(32)}), lambda: lively("llama"), {}, ValueError, "layer 3 does not exist"),
    "NaN": (VECTOR, lambda: lively("llama"), {"multiplier": float("nan")}, ValueError, "multiplier must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_exact_is_refused_in_words_and_nothing_written(case: str, tmp_path: Path) -> None:
    given, make, arguments, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        to_adapter(given, make(), tmp_path / "x", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["added", "ablated"])
@pytest.mark.parametrize("head", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_language_head(kind: str, head: str, tmp_path: Path) -> None:
    model = getattr(transformers, head)(tiny.build("llama").config).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = written(kind, model, tmp_path / "adapter")
    context = VECTOR.apply(model, multiplier=MULTIPLIER) if kind == "added" else ablate_everywhere(model, DIRECTION)
    with context, torch.no_grad():
        expected = model(IDS)[0]
    fresh = getattr(transformers, head).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = fresh(IDS)[0]
        found = peft.PeftModel.from_pretrained(fresh, adapter.folder).eval()(IDS)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_a_forgotten_weight_would_be_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from steering_vectors.merging import adapters

    monkeypatch.setattr(adapters, "_fill", lambda *args: None)
    for kind in ("added", "ablated"):
        with pytest.raises(ValueError, match="the adapted model would compute something else"):
            written(kind, lively("llama"), tmp_path / "x")


def test_an_adapted_model_is_refused(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(lively("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    calls: list[Callable[[Any], Any]] = [
        lambda model: to_adapter(VECTOR, model, tmp_path / "x"),
        lambda model: merge(VECTOR, model),
        lambda model: merge_ablation(model, DIRECTION),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"merge the adapter first, with model.merge_and_unload\(\)"):
            call(adapted)
        with pytest.raises(ValueError, match=r"has layers of a PEFT adapter: merge them first"):
            call(adapted.base_model.model)
    assert list(tmp_path.iterdir()) == []
    plain = adapted.merge_and_unload()
    for call in calls:
        call(plain)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs peft 0.21 or newer: pip install 'steering-vectors\[adapters\]'"):
        to_adapter(VECTOR, lively("llama"), tmp_path / "x")


def test_smollm2_ablated_by_weights_and_by_an_adapter_computes_the_same(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The weather in Paris is", return_tensors="pt")["input_ids"]
    direction = torch.randn(2, 576, generator=torch.Generator().manual_seed(0))
    with ablate_everywhere(model, direction):
        expected = logits(model, ids)
    assert (expected - logits(model, ids)).abs().max() > 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the embeddings are no longer tied")
        merged = merge_ablation(model, direction)
    torch.testing.assert_close(logits(merged, ids), expected, atol=2e-4, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    del merged
    (fresh,) = logits_in_a_fresh_process([tmp_path / "merged"], tmp_path, ids).values()
    torch.testing.assert_close(fresh, expected, atol=2e-4, rtol=1e-5)
    adapter = to_adapter(direction, model, tmp_path / "adapter", operator=ablation_operator())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2e6
    item = f"{model.name_or_path}|{adapter.folder}"
    (fresh,) = logits_in_a_fresh_process([item], tmp_path, ids, _SCRIPT).values()
    torch.testing.assert_close(fresh, expected, atol=2e-4, rtol=1e-5)
