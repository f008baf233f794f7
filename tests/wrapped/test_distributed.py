"""DistributedDataParallel, and Hugging Face's tensor parallelism, in processes that talk over gloo."""

import io
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from steering_vectors import (
    SteeringVector,
    geometric_median_aggregator,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    record_activations,
    train_steering_vector,
)
from steering_vectors._extraction import walk
from tests import tiny
from tests.wrapped.promises import (
    INPUTS,
    LAYER,
    SAMPLES,
    SELECTIONS,
    answer,
    answer_by_hand,
    assert_close,
    assert_moved,
    assert_vectors_close,
    check_steered,
    check_trained,
    recorded,
    some_vector,
    steered_by_hand,
    unchanged,
    vector_by_hand,
)

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

GIVEN = {"as the wrapper": lambda ddp: ddp, "as its module": lambda ddp: ddp.module}
# Hidden size, heads and feed-forward width can be cut in three.
IN_THREE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}


class TestDistributedDataParallelInOneProcess:
    @pytest.fixture
    def ddp(self, tmp_path: Path) -> Iterator[Any]:
        join(tmp_path, 0, 1)
        yield DistributedDataParallel(tiny.build("llama")).eval()
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("given", GIVEN)
    def test_training_gives_the_bare_models_vector(self, ddp: Any, given: str) -> None:
        check_trained(GIVEN[given](ddp), tiny.shared("llama"), tiny.blocks(tiny.shared("llama")))

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("entered", GIVEN)
    def test_steering_is_as_by_hand_whichever_is_entered(self, ddp: Any, entered: str, selection: str) -> None:
        check_steered(GIVEN[entered](ddp), ddp, ddp.module, tiny.blocks(ddp.module), selection)

    def test_training_mode_comes_back(self, ddp: Any) -> None:
        ddp.train()
        ddp.module.model.layers[0].eval()
        with unchanged(ddp):
            train_steering_vector(ddp, tiny.tokenizer(), SAMPLES)


def every_rank_trains_the_bare_models_vector(ddp: Any) -> None:
    bare = tiny.shared("llama")
    check_trained(ddp, bare, tiny.blocks(bare))


def every_rank_is_steered_as_by_hand(ddp: Any) -> None:
    for selection in SELECTIONS:
        check_steered(ddp, ddp, ddp.module, tiny.blocks(ddp.module), selection)


def a_rank_is_steered_while_the_other_is_not(ddp: Any) -> None:
    plain = answer_by_hand(ddp)
    with steered_by_hand(tiny.blocks(ddp.module), some_vector(), 0):
        steered = answer_by_hand(ddp)
    with some_vector().apply(ddp, multiplier=torch.distributed.get_rank()):
        assert_close(answer_by_hand(ddp), steered if torch.distributed.get_rank() else plain)


def gradients_under_steering_are_averaged_over_the_ranks(ddp: Any) -> None:
    rank = torch.distributed.get_rank()
    rows = [{name: values[row : row + 1] for name, values in INPUTS.items()} for row in range(2)]
    bare = tiny.build("llama")
    with steered_by_hand(tiny.blocks(bare), some_vector(), 0):
        for row in rows:
            (bare(**row, labels=row["input_ids"]).loss / 2).backward()
    with some_vector().apply(ddp):
        ddp(**rows[rank], labels=rows[rank]["input_ids"]).loss.backward()
    for mine, expected in zip(ddp.module.parameters(), bare.parameters(), strict=True):
        assert_close(mine.grad, expected.grad)


def ranks_train_on_samples_of_their_own(ddp: Any) -> None:
    """One rank runs more passes than the other: none waits for a partner."""
    step(ddp)
    bare, rank = tiny.shared("llama"), torch.distributed.get_rank()
    own = SAMPLES[: 1 + 2 * rank]
    vector = train_steering_vector(ddp, tiny.tokenizer(), own)
    expected = train_steering_vector(bare, tiny.tokenizer(), own)
    assert_vectors_close(vector, expected.layer_activations)


def one_rank_trains_alone(ddp: Any) -> None:
    """After a step the wrapper's next pass sends the buffers of rank 0 to the others, and waits for them."""
    step(ddp)
    bare = tiny.shared("llama")
    if torch.distributed.get_rank() == 0:
        vector = train_steering_vector(ddp, tiny.tokenizer(), SAMPLES)
        assert_vectors_close(vector, vector_by_hand(bare, tiny.blocks(bare)))
    torch.distributed.barrier()


def step(ddp: Any) -> None:
    ddp(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    ddp.zero_grad()


WITH_DATA_PARALLELISM = (
    every_rank_trains_the_bare_models_vector,
    every_rank_is_steered_as_by_hand,
    a_rank_is_steered_while_the_other_is_not,
    gradients_under_steering_are_averaged_over_the_ranks,
    # From here on the ranks are not in step.
    ranks_train_on_samples_of_their_own,
    one_rank_trains_alone,
)


PAIRS: list[Any] = [(f"I love number {n}, it is {'so ' * (n % 3)}good", f"I hate number {n}") for n in range(7)]
SHARED: dict[str, Any] = {"layers": [0, -1], "batch_size": 2}


def together(samples: Any, model: Any = None, **kwargs: Any) -> SteeringVector:
    group = torch.distributed.group.WORLD
    model = tiny.shared("llama") if model is None else model
    return train_steering_vector(model, tiny.tokenizer(), samples, **{**SHARED, "process_group": group, **kwargs})


def processes_together_give_one_processes_vector() -> None:
    for aggregator in (mean_aggregator(), pca_aggregator(), lambda p, n: (p - n).median(dim=0).values):
        alone = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), PAIRS, aggregator=aggregator, **SHARED)
        for samples in (PAIRS, iter(PAIRS)):
            assert_vectors_close(
                together(samples, aggregator=aggregator), alone.layer_activations, atol=1e-6, rtol=1e-5
            )


def sets_are_shared_and_give_one_processes_vector() -> None:
    rank = torch.distributed.get_rank()
    sets = {"positive": [pair[0] for pair in PAIRS], "negative": [pair[1] for pair in PAIRS[:3]]}
    for aggregator in (mean_aggregator(), logistic_aggregator(), geometric_median_aggregator()):
        alone = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), sets, aggregator=aggregator, **SHARED)
        for window in (4096, 2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(walk, "WINDOW", window)
                for given in (sets, {side: iter(texts) for side, texts in sets.items()}):
                    vector = together(given, aggregator=aggregator)
                    assert_vectors_close(vector, alone.layer_activations, atol=1e-4, rtol=1e-3)
                    assert vector.metadata["samples_hash"] == alone.metadata["samples_hash"]
    # The prompts are the same and in the same order, but one of them is on the other side.
    others = [{"positive": ["a"], "negative": ["b", "c"]}, {"positive": ["a", "c"], "negative": ["b"]}]
    with pytest.raises(RuntimeError, match="were given different samples"):
        together(others[rank])
    with pytest.raises(RuntimeError, match="were given different samples or arguments"):
        together([sets, PAIRS][rank])
    with pytest.raises((RuntimeError, ValueError), match="the negative side of training_samples is empty"):
        together({"positive": ["a"], "negative": ["b"] * rank})


def each_process_runs_its_share_of_both_sets() -> None:
    model = tiny.build("llama")
    seen: set[int] = set()
    model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: seen.update(args[0].flatten().tolist()))
    together({"positive": [[10 + n] for n in range(6)], "negative": [[20 + n] for n in range(4)]}, model)
    shares = [{10, 11, 12, 20, 21}, {13, 14, 15, 22, 23}]
    assert seen == shares[torch.distributed.get_rank()]


def fewer_pairs_than_processes_are_no_matter() -> None:
    alone = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), PAIRS[:1], **SHARED)
    assert_vectors_close(together(PAIRS[:1]), alone.layer_activations, atol=1e-6, rtol=1e-5)


def each_process_runs_its_share_alone_and_one_shows_the_bar() -> None:
    bars: list[bool] = []

    def noted(**kwargs: Any) -> Any:
        bars.append(not kwargs["disable"])
        return tqdm(**kwargs, file=io.StringIO())

    tokens = []
    for group in (torch.distributed.group.WORLD, None):
        model = tiny.build("llama")
        seen: set[int] = set()
        model.model.embed_tokens.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.update(args[0].flatten().tolist())
        )
        # The prompts are token ids, of which each pair has its own.
        pairs = [([1, 10 + 2 * n], [1, 11 + 2 * n]) for n in range(7)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "progress_bar", noted)
            together(pairs, model, process_group=group, show_progress=True)
        tokens.append(seen - {1})
    rank = torch.distributed.get_rank()
    assert tokens == [set(range(10, 16)) if rank == 0 else set(range(16, 24)), set(range(10, 24))]
    assert bars == [rank == 0, True]


def other_samples_in_one_process_are_an_error_in_all() -> None:
    rank = torch.distributed.get_rank()
    for window in (4096, 3):  # with the small one, the processes have other numbers of windows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "WINDOW", window)
            for samples in (PAIRS[rank:], PAIRS[: 6 - 3 * rank], [*PAIRS[:-1], ("good", f"bad {rank}")]):
                with pytest.raises(RuntimeError, match="were given different samples"):
                    together(samples)
    with pytest.raises((RuntimeError, ValueError), match="training_samples is empty"):
        together(PAIRS[: 7 * rank])


def a_failure_in_one_process_fails_all_with_its_words() -> None:
    rank = torch.distributed.get_rank()

    def failing(_module: Any, _args: Any) -> None:
        raise ValueError("the model of this process is broken")

    model = tiny.build("llama")
    if rank == 1:
        model.model.layers[1].register_forward_pre_hook(failing)
    kind, words = (ValueError, "is broken") if rank == 1 else (RuntimeError, "another process.*is broken")
    with pytest.raises(kind, match=words):
        together(PAIRS, model)
    with pytest.raises((ValueError, RuntimeError), match="layer 9 does not exist"):
        together(PAIRS, layers=9 if rank == 1 else 0)


def other_arguments_in_one_process_are_an_error_in_all() -> None:
    rank = torch.distributed.get_rank()
    for arguments in (
        {"layers": [rank]},
        {"layer_type": ("mlp", "decoder_block")[rank]},
        {"aggregator": (mean_aggregator(), pca_aggregator())[rank]},
    ):
        with pytest.raises(RuntimeError, match="were given different samples or arguments"):
            together(PAIRS, **arguments)


def an_aggregator_that_fails_in_one_process_fails_all() -> None:
    rank = torch.distributed.get_rank()

    def failing(positive: Tensor, _negative: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("the aggregator of this process is broken")
        return positive[0]

    with pytest.raises((KeyError, RuntimeError), match="of this process is broken"):
        together(PAIRS, aggregator=failing)
    with pytest.raises((TypeError, RuntimeError), match="aggregator must be callable"):
        together(PAIRS, aggregator=3 if rank == 1 else mean_aggregator())


def groups_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="this process is not in process_group"):
        together(
            PAIRS, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER
        )  # what new_group([…]) gives others
    for group in ("WORLD", True, 2):
        with pytest.raises(TypeError, match="process_group must be a group such as torch.distributed.group.WORLD"):
            together(PAIRS, process_group=group)


WITH_A_PROCESS_GROUP = (
    other_arguments_in_one_process_are_an_error_in_all,
    an_aggregator_that_fails_in_one_process_fails_all,
    groups_that_are_none_are_refused,
    processes_together_give_one_processes_vector,
    sets_are_shared_and_give_one_processes_vector,
    each_process_runs_its_share_of_both_sets,
    fewer_pairs_than_processes_are_no_matter,
    each_process_runs_its_share_alone_and_one_shows_the_bar,
    other_samples_in_one_process_are_an_error_in_all,
    a_failure_in_one_process_fails_all_with_its_words,
)


def block_outputs_are_whole_on_each_rank(model: Any, bare: Any) -> None:
    for layer_type in ("decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        found = []
        for each in (model, bare):
            with record_activations(each, layer_type) as records, torch.no_grad():
                each(**INPUTS)
            found.append(records)
        mine, whole = found
        assert sorted(mine) == sorted(whole) == [0, 1, 2]
        for layer, (activation,) in whole.items():
            assert type(mine[layer][0]) is Tensor
            assert_close(mine[layer][0], activation)


def weights_are_sharded(model: Any, bare: Any) -> None:
    """Else the other checks would say nothing."""
    weight = model.model.layers[LAYER].mlp.up_proj.weight
    assert weight.to_local().shape[0] == bare.model.layers[LAYER].mlp.up_proj.weight.shape[0] // 3


def steered_logits_are_those_of_one_process(model: Any, bare: Any) -> None:
    vector = some_vector(IN_THREE["hidden_size"])
    for tokens, first_column in SELECTIONS.values():
        with steered_by_hand(tiny.blocks(bare), vector, first_column):
            expected = answer_by_hand(bare)
        before = recorded(model, model)
        with unchanged(model), vector.apply(model, tokens=tokens):
            after = recorded(model, model)
            assert_close(answer_by_hand(model), expected)
            assert_close(answer(model, use_cache=True), expected)
            assert_close(answer(model, use_cache=False), expected)
        assert_moved(before, after, vector, first_column)


def parts_are_steered_once_and_not_by_each_rank(model: Any, bare: Any) -> None:
    """Parts end in a sum over the ranks: a direction added before it would be added three times."""
    for layer_type in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        vector = SteeringVector(some_vector(IN_THREE["hidden_size"]).layer_activations, layer_type)
        logits = []
        for each in (model, bare):
            with vector.apply(each), torch.no_grad():
                logits.append(each(**INPUTS).logits)
        assert_close(*logits)


def training_gives_one_processes_vector(model: Any, bare: Any) -> None:
    for batch_size in (1, 3):
        with unchanged(model):
            vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=batch_size)
        assert all(type(direction) is Tensor for direction in vector.layer_activations.values())
        assert_vectors_close(vector, vector_by_hand(bare, tiny.blocks(bare)))


def a_sharded_model_is_not_shared_by_a_process_group(model: Any, _bare: Any) -> None:
    with pytest.raises(ValueError, match="is sharded over processes"):
        together(SAMPLES, model)


WITH_TENSOR_PARALLELISM = (
    weights_are_sharded,
    block_outputs_are_whole_on_each_rank,
    steered_logits_are_those_of_one_process,
    parts_are_steered_once_and_not_by_each_rank,
    training_gives_one_processes_vector,
    a_sharded_model_is_not_shared_by_a_process_group,
)


def _wrapped(_folder: Path) -> list[Any]:
    return [DistributedDataParallel(tiny.build("llama")).eval()]


def _nothing(_folder: Path) -> list[Any]:
    """With a DistributedDataParallel in it, PyTorch may wait for itself when the process ends."""
    return []


def _sharded_and_whole(folder: Path) -> list[Any]:
    """The model in ``folder``, shared among the ranks, and the whole of it in each."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    models = []
    for settings in ({"distributed_config": DistributedConfig(tp_plan="auto")}, {}):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", **settings)
        model.generation_config.eos_token_id = None
        models.append(model)
    return models


# How many processes, what each builds, and the checks that each runs with it.
SETTINGS: dict[str, tuple[int, Callable[[Path], list[Any]], tuple[Callable[..., None], ...]]] = {
    "data parallelism": (2, _wrapped, WITH_DATA_PARALLELISM),
    "a process group": (2, _nothing, WITH_A_PROCESS_GROUP),
    "tensor parallelism": (3, _sharded_and_whole, WITH_TENSOR_PARALLELISM),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """For a setting, what went wrong in each check; its processes run once."""

    @cache
    def of(setting: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("processes")
        if setting == "tensor parallelism":
            tiny.build("llama", **IN_THREE).save_pretrained(folder / "model")
        return run_checks(folder, setting)

    return of


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("setting", "check"),
    [(setting, check.__name__) for setting, (_, _, checks) in SETTINGS.items() for check in checks],
)
def test_in_several_processes(errors: Callable[[str], dict[str, str]], setting: str, check: str) -> None:
    if setting == "tensor parallelism" and tiny.ON_TRANSFORMERS_4:
        pytest.skip("transformers 4.46 shards no Llama on CPUs")
    assert errors(setting)[check] == ""


def run_checks(folder: Path, setting: str) -> dict[str, str]:
    """What went wrong in each check of a setting, by the check's name."""
    ranks, _, checks = SETTINGS[setting]
    torch.multiprocessing.spawn(_rank, args=(folder, setting), nprocs=ranks)
    return {
        check.__name__: "\n".join(
            f"rank {rank}: {error}" for rank in range(ranks) if (error := errors_file(folder, check, rank).read_text())
        )
        for check in checks
    }


def _rank(rank: int, folder: Path, setting: str) -> None:
    ranks, build, checks = SETTINGS[setting]
    torch.set_num_threads(1)
    for check in checks:
        errors_file(folder, check, rank).write_text("was not reached")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))  # where transformers looks
    join(folder, rank, ranks)
    models = build(folder)
    for check in checks:
        try:
            check(*models)
            error = ""
        except Exception:
            error = traceback.format_exc()
        errors_file(folder, check, rank).write_text(error)
    torch.distributed.destroy_process_group()
    os._exit(0)  # PyTorch may wait for itself when it takes a gloo group down


def join(folder: Path, rank: int, ranks: int) -> None:
    """Make this process one of so many that find each other by a file."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=20),
    )


def errors_file(folder: Path, check: Callable[..., None], rank: int) -> Path:
    return folder / f"{check.__name__}.{rank}"
