"""The documentation's pictures show what runs, can be read in both themes, and have a text in their stead."""

import ast
import json
import re
import sys
import textwrap
from itertools import permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import steering_vectors
from steering_vectors import record_activations
from tests import tiny

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import drawings  # noqa: E402
import local_hub  # noqa: E402
from drawings import blocks, evaluations, models, operators, projections, selections, strengths, traces  # noqa: E402
from drawings.themes import WIDTH, Theme  # noqa: E402

OF_SMOLLM2 = ["curves", "diagnosis", "projections", "strengths", "sweep", "watched"]
_DIRECTIVE = re.compile(r"^ *\.\. picture:: (\S+)\n((?: +:\w+: .*\n)*)", re.MULTILINE)


def shown() -> dict[str, str]:
    """The options of each picture on a page, by its name."""
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.rst")]
    return {name: options for page in pages for name, options in _DIRECTIVE.findall(page)}


def alt(name: str) -> str:
    found = re.search(r":alt: (.+)", shown()[name])
    assert found is not None
    return found[1]


def assigned(page: str, name: str) -> Any:
    """The first value that a page's code assigns to the name, which must be a literal."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks_of_code = re.findall(r"code-block:: python\n\n((?: {4}.*\n|\s*\n)+)", text)
    for node in ast.walk(ast.parse("\n".join(map(textwrap.dedent, blocks_of_code)))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{page} assigns nothing to {name}")


def test_every_picture_is_on_a_page_and_has_a_text_in_its_stead() -> None:
    assert set(shown()) == set(drawings.PICTURES)
    for name in drawings.PICTURES:
        assert len(alt(name)) > 40


@pytest.mark.parametrize(("name", "count"), [("quickstart", 2), ("evaluation", 4)])
def test_the_plots_of_a_notebook_have_a_text_in_their_stead(name: str, count: int) -> None:
    notebook = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    plots = [cell for cell in notebook["cells"] if "plt.show()" in "".join(cell["source"])]
    assert len(plots) == count
    for cell in plots:
        assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 40


@pytest.mark.parametrize("name", sorted(set(drawings.PICTURES) - set(OF_SMOLLM2)))
def test_a_picture_is_drawn_for_both_themes_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    check_drawn(name, tmp_path)


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("name", OF_SMOLLM2)
def test_a_picture_of_smollm2_is_drawn_for_both_themes_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    check_drawn(name, tmp_path)


def check_drawn(name: str, folder: Path) -> None:
    paths, again = (drawings.write(name, folder / part) for part in ("once", "twice"))
    assert list(paths) == ["light", "dark"]
    for theme, other in permutations(drawings.THEMES, 2):
        picture = paths[theme.name].read_text(encoding="utf-8")
        assert picture == again[theme.name].read_text(encoding="utf-8")
        assert ElementTree.fromstring(picture).attrib["width"] == f"{WIDTH:g}pt"
        assert theme.ink in picture or theme.muted in picture
        assert not any(colour in picture for colour in (other.ink, other.muted, other.faint, *other.colours))


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as the Web Content Accessibility Guidelines define it, from 1 to 21."""
    parts = [[int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)] for colour in (one, other)]
    linear = [[p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour] for colour in parts]
    dark, light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", drawings.THEMES, ids=lambda theme: theme.name)
def test_text_and_colours_stand_out_from_the_page(theme: Theme) -> None:
    assert contrast(theme.ink, theme.background) > 10
    for colour in (theme.muted, *theme.colours):
        assert contrast(colour, theme.background) > 4.5
    assert contrast(theme.on_colours, theme.colours[0]) > 4.5
    assert contrast(theme.ink, theme.faint) > 7


@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#0072b2", "#c25200", "#56b4e9", "#777777"])
def test_text_on_a_colour_is_black_or_white_whichever_is_easier_to_read(background: str) -> None:
    parts = [int(background[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    ink = projections.readable((parts[0], parts[1], parts[2]))
    assert contrast(ink, background) == max(contrast(other, background) for other in ("#000000", "#ffffff"))


# Each selection of the picture, the prompts' columns and then one for each decoding step, two lines for two prompts:
# "#" is steered, "." is not, "-" is padding that is not.
STEERED = """
all tokens
  row 0     # # # # #  |  #   #   #
  row 1     # # # # #  |  #   #   #

generated(inputs)
  row 0     - - . . #  |  #   #   #
  row 1     . . . . #  |  #   #   #

prompted(inputs)
  row 0     - - # # .  |  .   .   .
  row 1     # # # # .  |  .   .   .

completion()
  row 0     - - . . .  |  #   #   #
  row 1     . . . . .  |  #   #   #

from_index(1)
  row 0     - - . # #  |  #   #   #
  row 1     . # # # #  |  #   #   #

at([0, 3])
  row 0     - - # . .  |  #   .   .
  row 1     # . . # .  |  .   .   .

after(13)
  row 0     - - . # #  |  #   #   #
  row 1     . . # # #  |  #   #   #

after(13, until=12)
  row 0     - - . # .  |  .   .   .
  row 1     . . # # #  |  #   #   #

after(13) & ~completion()
  row 0     - - . # #  |  .   .   .
  row 1     . . # # #  |  .   .   .

slice(1, 4)
  row 0     - - . # #  |  #   .   .
  row 1     . # # # .  |  .   .   .

slice(-2, None)
  row 0     - - . # #  |  #   #   #
  row 1     . . . # #  |  #   #   #

slice(1, -1)
  row 0     - - . # .  |  .   .   .
  row 1     . # # # .  |  .   .   .

[0, -1]
  row 0     - - # . #  |  #   #   #
  row 1     # . . . #  |  #   #   #

tensor([[0,1,1,0,1],[1,0,0,1,0]])
  row 0     - # # . #  |  .   .   .
  row 1     # . . # .  |  .   .   .
"""


def test_the_picture_of_selections_shows_what_each_should_steer() -> None:
    lines = []
    for name in selections.SELECTIONS:
        lines += ["", name]
        for row, (cells, indices) in enumerate(
            zip(selections.steered_cells(name).tolist(), selections.token_indices(), strict=True)
        ):
            marks = [
                "#" if steered else "-" if index is None else "." for steered, index in zip(cells, indices, strict=True)
            ]
            lines.append(f"  row {row}     {' '.join(marks[:5])}  |  {'   '.join(marks[5:])}")
    assert "\n".join(lines).strip() == STEERED.strip()


@pytest.mark.parametrize("theme", drawings.THEMES, ids=lambda theme: theme.name)
def test_the_picture_of_selections_colours_just_the_steered_cells(theme: Theme) -> None:
    from matplotlib.colors import to_hex

    (axes,) = selections.draw(theme).axes
    coloured = [to_hex(patch.get_facecolor()) == theme.colours[0] for patch in axes.patches]
    cells = [selections.steered_cells(name).flatten().tolist() for name in selections.SELECTIONS]
    assert coloured[3:] == [steered for selection in cells for steered in selection]  # after the three of the legend


def test_a_block_is_built_as_it_is_drawn() -> None:
    model = models.tiny_llama()
    seen = {}
    for kind in blocks.module_names():
        with record_activations(model, layer_type=kind) as recorded, torch.no_grad():  # type: ignore[arg-type]
            model(torch.tensor([[5, 6, 7]]))
        seen[kind] = {layer: activation for layer, (activation,) in recorded.items()}
    block = tiny.blocks(model)[1]
    before, stream = seen["decoder_block"][0], seen["decoder_block"][1]
    between = before + seen["self_attn"][1]
    torch.testing.assert_close(block.input_layernorm(before), seen["input_layernorm"][1])
    torch.testing.assert_close(block.post_attention_layernorm(between), seen["post_attention_layernorm"][1])
    torch.testing.assert_close(block.mlp(seen["post_attention_layernorm"][1]), seen["mlp"][1])
    torch.testing.assert_close(between + seen["mlp"][1], stream)


def test_the_picture_of_operators_has_all_of_them_under_their_names() -> None:
    public = {name for name in steering_vectors.__all__ if name.endswith("_operator")}
    for name, operator in operators.OPERATORS.items():
        assert repr(operator) == name.replace("\n", "")
    assert {name.replace("\n", "").partition("(")[0] for name in operators.OPERATORS} == public


def test_pictures_are_of_the_pairs_and_texts_that_their_pages_show() -> None:
    instructions = tuple(assigned("howto/strengths.rst", name) for name in ("child", "professor"))
    assert instructions == strengths.INSTRUCTIONS
    assert assigned("howto/strengths.rst", "questions") == strengths.QUESTIONS
    assert assigned("howto/strengths.rst", "texts") == strengths.TEXTS
    assert assigned("advanced_usage.rst", "pairs") == traces.PAIRS
    page = "does_it_steer.rst"
    assert tuple(assigned(page, name) for name in ("child", "professor")) == (evaluations.CHILD, evaluations.PROFESSOR)
    assert assigned(page, "questions") == evaluations.QUESTIONS
    assert assigned(page, "answers") == evaluations.ANSWERS
    sharing = (DOCS / "howto" / "sharing.rst").read_text(encoding="utf-8")
    shown_pairs = re.search(r"joy = trained\((.*)\)\n", sharing)
    assert shown_pairs is not None
    assert ast.literal_eval(shown_pairs[1]) == projections.PAIRS


@pytest.mark.usefixtures("smollm2")
def test_the_marked_text_is_the_one_that_the_page_prints() -> None:
    text = traces.steered_text()
    assert "<mark>" in text
    printed = text.replace("<mark>", "[[").replace("</mark>", "]]")
    assert f"    {printed}\n" in (DOCS / "advanced_usage.rst").read_text(encoding="utf-8")


@pytest.mark.usefixtures("smollm2")
def test_the_texts_in_the_stead_of_pictures_have_the_numbers_that_are_drawn() -> None:
    norms = strengths.measured()
    stream = list(norms.other_tokens.values())
    assert f"from {stream[0]:.0f} at layer 0 to {stream[-1]:.0f} at layer 29" in alt("strengths")
    assert [layer for layer, norm in norms.first_token.items() if norm > 20_000] == list(range(11, 28))
    shares = list(norms.shares.values())
    assert f"of up to {max(shares[:13]):.2f} as far as layer 12" in alt("strengths")
    assert f"and of {min(shares[15:]):.2f} to {max(shares[15:]):.2f} from layer 15 on" in alt("strengths")
    by_token = {token.text: round(token.projection) for token in projections.measured()}
    for token in ("friendly", "wonderful", "dirty", "broken"):
        assert re.search(rf'"{token}"( has| and)? {str(by_token[token]).replace("-", "−")}', alt("projections"))


@pytest.mark.usefixtures("smollm2")
def test_the_texts_of_evaluations_have_the_numbers_that_are_drawn() -> None:
    rows = {row.condition: row for row in evaluations.evaluated().rows}
    low, high = rows["vector"].propensities[0], rows["vector"].propensities[-1]
    assert f"from {low:.1f} to {high:.1f} nats per token".replace("-", "−") in alt("curves")
    assert f"level line is at {rows['system prompt'].propensities[0]:.1f}" in alt("curves")
    chosen = evaluations.swept().chosen
    assert chosen is not None
    assert f"layer {chosen.layer} at {chosen.multiplier:+g}" in alt("sweep")
    along = evaluations.watched().by_sequence()[evaluations.LAYER][0].tolist()
    start = len(along) - 12  # of the answer's 12 tokens, the last doesn't go through the model
    assert f"between {min(along[start:]):.0f} and {max(along[start:]):.0f}" in alt("watched")
    assert f"first token's is {along[0]:.0f}".replace("-", "−") in alt("watched")


@pytest.fixture
def without_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_hub, "FOLDER", tmp_path / "nothing")
    for kept in (models.smollm2, projections.measured, traces.steered_text):
        kept.cache_clear()


def built(folder: Path, page: str) -> str:
    """The HTML of a page of one's own, built by Sphinx with the pictures."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    source, html, doctrees = (folder / name for name in ("source", "html", "doctrees"))
    source.mkdir(exist_ok=True)
    (source / "index.rst").write_text(page, encoding="utf-8")
    settings = {"extensions": ["pictures"], "html_theme": "basic"}
    with docutils_namespace():
        Sphinx(source, None, html, doctrees, "html", settings, status=None, exception_on_warning=True).build()
    return (html / "index.html").read_text(encoding="utf-8")


PAGE = """
Page
====

.. picture:: {name}
    :alt: Arrows & "more"

    A *caption*.
"""


class TestInSphinx:
    def test_a_picture_is_an_image_for_each_theme_both_with_the_text(self, tmp_path: Path) -> None:
        for _ in range(2):  # the second build reads and writes nothing anew
            html = built(tmp_path, PAGE.format(name="operators"))
            images = re.findall("<img [^>]*>", html)
            for theme, image in zip(("light", "dark"), images, strict=True):
                assert f'class="only-{theme}"' in image
                assert 'alt="Arrows &amp; &quot;more&quot;"' in image
                (source,) = re.findall('src="([^"]*)"', image)
                assert (tmp_path / "html" / source).read_bytes().startswith(b"<?xml")
            assert "<em>caption</em>" in html
        assert [path.name for path in (tmp_path / "source").iterdir()] == ["index.rst"]

    def test_a_picture_without_a_text_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match="needs an :alt: text"):
            built(tmp_path, "Page\n====\n\n.. picture:: operators\n")

    def test_an_unknown_picture_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match="there is no picture cats: there are block, curves"):
            built(tmp_path, PAGE.format(name="cats"))

    @pytest.mark.usefixtures("without_smollm2")
    def test_a_picture_without_its_model_is_its_text(self, tmp_path: Path) -> None:
        html = built(tmp_path, PAGE.format(name="projections") + "\n.. steered-text::\n")
        assert re.search("<em>Arrows &amp; .*more.*</em>", html)
        assert "<img" not in html
        assert "<mark>" not in html
