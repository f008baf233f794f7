"""A multiplier for each row of a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from steering_vectors import (
    SteeringVector,
    at,
    clamp_operator,
    from_index,
    generated,
    rotation_operator,
    train_steering_vector,
)
from tests import families, tiny
from tests.test_steering import answer, logits, padded, recorded, shown, unchanged, vector

IDS = torch.tensor([[11, 12, 13, 14, 15]])
MULTIPLIERS = torch.linspace(-2, 2, 9)
OPERATORS = [
    *(case.make() for case in families.OPERATORS.values()),
    lambda h, d: d / d.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True),  # NaN of a zero direction
]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.shared("llama")


@pytest.mark.parametrize("operator", OPERATORS, ids=shown)
@pytest.mark.parametrize("tokens", [None, from_index(2), lambda p: p.index / 4], ids=shown)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "mamba"])
def test_nine_copies_at_nine_strengths_are_nine_single_runs(architecture: str, tokens: Any, operator: Any) -> None:
    model, copies = tiny.shared(architecture), IDS.expand(9, -1)
    with vector().apply(model, multiplier=MULTIPLIERS, operator=operator, tokens=tokens):
        together = logits(model, copies)
    for row, multiplier in enumerate(MULTIPLIERS):
        with vector().apply(model, multiplier=float(multiplier), operator=operator, tokens=tokens):
            torch.testing.assert_close(together[row], logits(model, copies)[row], atol=1e-5, rtol=1e-4)


def test_each_row_s_activation_is_moved_bit_for_bit_as_alone(model: PreTrainedModel) -> None:
    copies = IDS.expand(9, -1)
    with vector().apply(model, multiplier=MULTIPLIERS):
        together = recorded(model, input_ids=copies)
    for row, multiplier in enumerate(MULTIPLIERS):
        with vector().apply(model, multiplier=multiplier):
            assert torch.equal(recorded(model, input_ids=copies)[row], together[row])


@pytest.mark.parametrize(
    "multiplier",
    [
        [2, 0, -1],
        (2.0, 0.0, -1.0),
        np.array([2, 0, -1]),
        np.float32([2, 0, -1]),
        torch.tensor([2, 0, -1]),
        torch.tensor([2.0, 0.0, -1.0], dtype=torch.bfloat16),
        [torch.tensor(2), torch.tensor(0), torch.tensor(-1)],
        nn.Parameter(torch.tensor([2.0, 0.0, -1.0])),
    ],
    ids=shown,
)
def test_any_sequence_or_tensor_of_numbers_will_do(model: PreTrainedModel, multiplier: Any) -> None:
    plain = recorded(model, input_ids=IDS.expand(3, -1))
    with vector().apply(model, multiplier=multiplier):
        steered = recorded(model, input_ids=IDS.expand(3, -1))
    expected = torch.tensor([2.0, 0.0, -1.0])[:, None, None] * vector().layer_activations[1]
    torch.testing.assert_close(steered, plain + expected)


@pytest.mark.parametrize("multiplier", [[True, False], torch.tensor([True, False]), np.array([True, False])], ids=shown)
def test_booleans_say_which_rows_are_steered(model: PreTrainedModel, multiplier: Any) -> None:
    plain = recorded(model, input_ids=IDS.expand(2, -1))
    with vector().apply(model, multiplier=multiplier):
        steered = recorded(model, input_ids=IDS.expand(2, -1))
    assert torch.equal(steered[0], plain[0] + vector().layer_activations[1])
    assert torch.equal(steered[1], plain[1])


@pytest.mark.parametrize("operator", [*OPERATORS, lambda h, d: torch.full_like(h, float("nan"))], ids=shown)
@pytest.mark.parametrize("learned", [False, True])
def test_zero_leaves_a_row_bit_for_bit_with_finite_gradients(
    model: PreTrainedModel, operator: Any, learned: bool
) -> None:
    multiplier = torch.tensor([0.0, 1.5], requires_grad=learned)
    hidden = torch.randn(2, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    block = nn.ModuleList([nn.Identity()])
    toy = Toy(block)
    with vector(0).apply(toy, {"decoder_block": "blocks.{num}"}, operator, multiplier):
        out = toy(hidden)
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])
    if not learned:
        out[0].sum().backward()
        assert torch.equal(hidden.grad[0], torch.ones_like(hidden[0]))  # type: ignore[index]


class Toy(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for block in self.blocks:
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds


@pytest.mark.parametrize(
    ("axes", "back"),
    [
        (lambda h: h.flatten(0, 1), lambda h: h.unflatten(0, (2, 3))),
        (lambda h: torch.stack([h, 2 * h, h, h]), lambda h: h[0]),
        (lambda h: torch.stack([h, 2 * h, h, h], dim=2), lambda h: h[:, :, 0]),
    ],
    ids=["rows and columns in one axis", "streams before", "streams after"],
)
def test_rows_are_found_in_other_shapes_of_activations(axes: Any, back: Any) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, hidden: Tensor) -> Tensor:
            return back(self.part(axes(hidden)))

    toy, hidden = Toy(nn.ModuleList([Inside()])), torch.randn(2, 3, tiny.HIDDEN)
    with vector(0).apply(toy, {"decoder_block": "blocks.{num}.part"}, multiplier=[1.0, -2.0]):
        out = toy(hidden)
    expected = hidden + torch.tensor([1.0, -2.0])[:, None, None] * vector(0).layer_activations[0]
    torch.testing.assert_close(out, expected)


def test_nesting_gives_rows_vectors_of_their_own(model: PreTrainedModel) -> None:
    copies = IDS.expand(3, -1)
    some, other = vector(seed=1), vector(2, seed=2)
    with some.apply(model, multiplier=[2, 0, 1]), other.apply(model, multiplier=[0, -1, 1]):
        together = logits(model, copies)
    for row, (one, two) in enumerate([(2, 0), (0, -1), (1, 1)]):
        with some.apply(model, multiplier=one), other.apply(model, multiplier=two):
            torch.testing.assert_close(together[row], logits(model, copies)[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}], ids=shown)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_have_their_prompt_s_multiplier(model: PreTrainedModel, options: Any, use_cache: bool) -> None:
    inputs = padded([11, 12, 13, 14], [21, 22])
    options = {**options, "use_cache": use_cache}
    with vector().apply(model, multiplier=[3.0, -3.0], tokens=generated(inputs)):
        together = answer(model, inputs, **options)
    count = options.get("num_return_sequences", 1)
    answers = []
    for row, multiplier in enumerate((3.0, -3.0)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with vector().apply(model, multiplier=multiplier, tokens=generated(alone)):
            answers.append(answer(model, alone, **options))
        assert torch.equal(together[row * count : (row + 1) * count], answers[-1])
    assert not torch.equal(together[:1], answer(model, inputs, **options)[:1])


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_another_number_of_rows_is_an_error(model: PreTrainedModel, batch: int) -> None:
    message = f"the multiplier is given for 3 rows, but the model runs a batch of {batch}, which is not a multiple of 3"
    with (
        unchanged(model),
        pytest.raises(ValueError, match=message),
        vector().apply(model, multiplier=[1.0, 2.0, 3.0]),
    ):
        logits(model, IDS.expand(batch, -1))


def test_one_multiplier_in_a_list_is_one_number(model: PreTrainedModel) -> None:
    with vector().apply(model, multiplier=2):
        expected = logits(model, IDS.expand(3, -1))
    with vector().patch(model, multiplier=[2]) as handle:
        assert torch.equal(logits(model, IDS.expand(3, -1)), expected)
        assert "multiplier=2.0" in repr(handle)


def test_handles_show_few_multipliers_and_count_many(model: PreTrainedModel) -> None:
    with vector().patch(model, multiplier=[1, -0.5]) as handle:
        assert "multiplier=[1.0, -0.5]," in repr(handle)
    with vector().patch(model, multiplier=MULTIPLIERS) as handle:
        assert "multiplier=9 numbers," in repr(handle)


@pytest.mark.parametrize("numbers", [[1.5, -0.5, 2.0], [0.0, 1.0, 0.0]], ids=shown)
def test_learned_multipliers_get_their_gradients(numbers: list[float]) -> None:
    model = tiny.build("llama")
    multiplier = torch.tensor(numbers, requires_grad=True)

    def loss() -> Tensor:
        with vector().apply(model, multiplier=multiplier, tokens=from_index(1)):
            total: Tensor = model(IDS.expand(3, -1), use_cache=False).logits.square().mean()
        return total

    loss().backward()
    assert multiplier.grad is not None
    for row in range(3):
        step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(row), 3)
        with torch.no_grad():
            multiplier += step
            above = loss()
            multiplier -= 2 * step
            below = loss()
            multiplier += step
        torch.testing.assert_close(multiplier.grad[row], (above - below) / 2e-2, atol=2e-4, rtol=5e-2)


def test_training_in_the_caller_s_rows_is_refused_while_they_are_steered_apart(model: PreTrainedModel) -> None:
    with (
        vector().apply(model, multiplier=[1.0, 2.0]),
        pytest.raises(ValueError, match="steered row by row or from a row's end"),
    ):
        train_steering_vector(model, tiny.tokenizer(), [("a", "b")])


def test_models_that_put_the_columns_first_are_refused() -> None:
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=tiny.HIDDEN, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ValueError, match="can't locate the tokens in XLNetLMHeadModel"):
        vector().apply(model, multiplier=[1.0, 2.0])


@pytest.mark.parametrize("layer_type", ["self_attn", "mlp"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "opt", "falcon"])
def test_other_layer_types_have_rows_too(architecture: str, layer_type: Any) -> None:
    model, copies = tiny.shared(architecture), IDS.expand(2, -1)
    direction = SteeringVector(vector().layer_activations, layer_type)
    plain = recorded(model, layer_type=layer_type, input_ids=copies)
    with direction.apply(model, multiplier=[1.0, -1.0]):
        steered = recorded(model, layer_type=layer_type, input_ids=copies)
    moved = (steered - plain).reshape(2, -1, tiny.HIDDEN)
    expected = torch.tensor([1.0, -1.0])[:, None, None] * direction.layer_activations[1]
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", [2, 4])
def test_models_whose_columns_come_first_have_rows_too(columns: int) -> None:
    """FSMT's decoder, whose activations are ``(seq, batch, hidden)``; also where both are as many."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    vocabulary = {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"]}
    model = FSMTForConditionalGeneration(FSMTConfig(**vocabulary, **sizes, **heads)).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    decoded = torch.arange(11, 11 + 2 * columns).reshape(2, columns)

    def run(row: slice) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(ids[row], decoder_input_ids=decoded[row], use_cache=False).logits
        return out

    for tokens in (None, at([1])):
        with vector().apply(model, multiplier=[1.0, -1.0], tokens=tokens):
            together = run(slice(0, 2))
        for row, multiplier in enumerate((1.0, -1.0)):
            with vector().apply(model, multiplier=multiplier, tokens=tokens):
                torch.testing.assert_close(together[row], run(slice(row, row + 1))[0], atol=1e-4, rtol=1e-4)


class ColumnsFirst(nn.Module):
    """Someone's own model, whose blocks pass on ``(seq, batch, hidden)`` or, as usual, ``(batch, seq, hidden)``."""

    def __init__(self, columns_first: bool) -> None:
        super().__init__()
        self.columns_first = columns_first
        self.blocks = nn.ModuleList([nn.Sequential(nn.Identity())])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        hidden: Tensor = self.blocks[0](inputs_embeds.transpose(0, 1) if self.columns_first else inputs_embeds)
        return hidden.transpose(0, 1) if self.columns_first else hidden


@pytest.mark.parametrize("columns_first", [True, False])
@pytest.mark.parametrize("tokens", [None, at([1])])
def test_axes_of_other_people_s_models_are_seen_in_a_pass_or_refused(columns_first: bool, tokens: Any) -> None:
    model, config = ColumnsFirst(columns_first), {"decoder_block": "blocks.{num}"}
    chosen = torch.ones(4, dtype=torch.bool) if tokens is None else torch.arange(4) == 1
    for seen_before in ((), ((2, 4),), ((2, 3), (1, 1))):
        with vector(0).apply(model, config, multiplier=[1.0, -2.0], tokens=tokens):
            for rows, columns in seen_before:
                if (rows, columns) == (2, 4):
                    hidden = torch.randn(2, 4, tiny.HIDDEN)
                    moves = torch.tensor([1.0, -2.0])[:, None, None] * vector(0).layer_activations[0]
                    torch.testing.assert_close(model(hidden), hidden + moves * chosen[:, None])
                elif rows == 2:
                    model(torch.randn(rows, columns, tiny.HIDDEN))
            square = torch.randn(2, 2, tiny.HIDDEN)
            if not seen_before:
                with pytest.raises(ValueError, match="can't tell the rows from the columns in a pass of 2 rows and 2"):
                    model(square)
            else:
                moves = torch.tensor([1.0, -2.0])[:, None, None] * vector(0).layer_activations[0]
                torch.testing.assert_close(model(square), square + moves * chosen[:2, None])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "mamba"])
def test_axes_of_models_of_transformers_are_known(architecture: str) -> None:
    model, square = tiny.shared(architecture), torch.randint(5, 300, (4, 4))
    multipliers = [1.0, 0.0, -2.0, 0.5]
    with torch.no_grad():
        with vector().apply(model, multiplier=multipliers):
            together = model(square, use_cache=False).logits
        for row, multiplier in enumerate(multipliers):
            with vector().apply(model, multiplier=multiplier):
                alone = model(square[row : row + 1], use_cache=False).logits
            torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=1e-3)


def test_numbers_that_are_learned_may_be_in_a_list(model: PreTrainedModel) -> None:
    numbers = [torch.tensor(1.0, requires_grad=True), torch.tensor(0.5), 2.0]
    with vector().apply(model, multiplier=numbers):
        model(IDS.expand(3, -1)).logits.square().sum().backward()
    assert numbers[0].grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("operator", [clamp_operator(min=0.5), rotation_operator(0.4)], ids=repr)
@pytest.mark.parametrize("multiplier", [1e-9, [1e-9, 1e9], torch.tensor(1e-9, requires_grad=True)], ids=shown)
def test_in_half_precision_too_the_size_does_nothing_where_an_operator_ignores_it(
    operator: Any, multiplier: Any
) -> None:
    model = tiny.build("llama").half()
    with vector().apply(model, operator=operator), torch.no_grad():
        expected = logits(model, IDS.expand(2, -1))
    with vector().apply(model, operator=operator, multiplier=multiplier), torch.no_grad():
        torch.testing.assert_close(logits(model, IDS.expand(2, -1)), expected, atol=2e-2, rtol=2e-2)


def test_one_learned_number_is_no_row(model: PreTrainedModel) -> None:
    learned = torch.tensor(1.0, requires_grad=True)
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=tiny.HIDDEN, n_layer=2, n_head=4, d_inner=48))
    with vector().apply(xlnet, multiplier=learned):
        xlnet(IDS).logits.sum().backward()
    assert learned.grad is not None
