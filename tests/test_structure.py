"""The package's own shape: who imports whom, what is public, how long things are."""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import steering_vectors
from tests.of_each import of_each

PACKAGE = Path(steering_vectors.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

MOST_LINES_OF_A_MODULE = 250
MOST_LINES_OF_A_FUNCTION = 40

WINGS = {"_models", "_tokens", "_passes", "_extraction", "_steering", "_vectors"}
# From the ground up: a module imports what stands on its own level or below, and a wing nothing beside it.
LEVELS: list[set[str]] = [
    {
        "_arguments",
        "_demo_questions",
        "_html",
        "_locks",
        "_pair_files",
        "_precision",
        "_processes",
        "_progress",
        "_statistics",
        "_version",
        "_whole_files",
    },
    {"_models"},
    {"_tokens"},
    {"aggregators", "layer_matching", "steering_operators", "token_selection", "torch_utils"},
    {"_passes", "_vectors"},
    {"_steering"},
    {"_extraction"},
    {
        *(
            "_accumulators",
            "_rows_of_passes",
            "ablation",
            "hub",
            "interop",
            "monitoring",
            "prompts",
            "reading",
            "record_activations",
            "steering",
        ),
        *("steering_vector", "tracing", "train_steering_vector", "unembedding", "versions"),
    },
    {"evaluation", "merging", "serving"},
    {"plots"},
    {"demo", "__main__", "cli"},
]
# Packages that call the public functions alone.
ON_THE_FACE = {"evaluation", "merging", "plots", "serving"}
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
FRONT_DOOR = "__init__"  # stands on no level: programs alone import it

PUBLIC_SINCE_0_12_2 = {
    *("Aggregator", "LayerMatcher", "LayerType", "ModelLayerConfig", "PatchDeltaOperator", "SteeringPatchHandle"),
    *("SteeringVector", "SteeringVectorTrainingSample", "ablation_operator", "ablation_then_addition_operator"),
    *("addition_operator", "aggregate_activations", "extract_activations", "get_num_matching_layers"),
    *("guess_and_enhance_layer_config", "logistic_aggregator", "mean_aggregator", "pca_aggregator"),
    *("record_activations", "train_steering_vector"),
}
PUBLIC_SINCE_1_0 = {
    *("Accumulator", "Selector", "SetAggregator", "SteeringContext", "StreamingAggregator", "TokenPositions"),
    *("active_patches", "at", "completion", "from_index", "generated", "prompted", "read_activations"),
    *("geometric_median_aggregator", "winsorized_aggregator"),
    *(
        "LayerSummary",
        "SteeringTrace",
        "trace_steering",
        "ablate_everywhere",
        "residual_norms",
        "clamp_operator",
        "norm_preserving_operator",
        "rotation_operator",
        "projection_quantiles",
        "steer",
    ),
}


def part_of(module: str) -> str:
    """The first part of a module's name, by which a wing stands on one level."""
    return module.partition(".")[0]


def imports_of(module: str) -> Iterator[str]:
    """The package's modules that ``module`` imports when it is imported: not those inside functions."""
    for name in _module_level_imports(ast.parse(FILES[module].read_text()).body):
        inside = name.removeprefix("steering_vectors").removeprefix(".")
        while inside and inside not in FILES and f"{inside}.__init__" not in FILES:
            inside = inside.rpartition(".")[0]  # a name out of a module
        yield inside or "__init__"


def _module_level_imports(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            for handler in getattr(node, "handlers", []):
                inner += handler.body
            yield from _module_level_imports(inner)
            continue
        else:
            continue
        yield from (name for name in names if part_of(name) == "steering_vectors")


def lines_of_code(path: Path) -> set[int]:
    """The numbers of the lines that hold code: no docstring, comment or blank."""
    source = path.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert first.end_lineno is not None
            lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return lines


class TestImports:
    @of_each([module for module in FILES if module != FRONT_DOOR])
    def test_point_to_the_same_level_or_below(self, module: str) -> None:
        part = part_of(module)
        assert part in LEVEL, f"{module} stands on no level: give it one in LEVELS"
        for imported in map(part_of, imports_of(module)):
            if imported == FRONT_DOOR:
                assert part in LEVELS[-1], f"{module} imports the package itself, which only programs do"
            elif imported != part:
                assert LEVEL[imported] <= LEVEL[part], f"{module} imports {imported}, which stands above it"
                assert LEVEL[imported] < LEVEL[part] or part not in WINGS, f"{module} imports the wing beside it"

    @of_each(FILES)
    def test_enter_a_wing_by_its_door(self, module: str) -> None:
        for imported in imports_of(module):
            if part_of(imported) in WINGS - {part_of(module)}:
                assert imported == part_of(imported), f"{module} imports {imported}, past the door of its wing"

    @pytest.mark.parametrize("wing", sorted(WINGS))
    def test_a_door_lists_just_what_others_use(self, wing: str) -> None:
        used = {
            name.rpartition(".")[2]
            for module in FILES
            if part_of(module) != wing
            for name in _module_level_imports(ast.parse(FILES[module].read_text()).body)
            if name.startswith(f"steering_vectors.{wing}.")
        }
        listed = importlib.import_module(f"steering_vectors.{wing}").__all__
        assert sorted(listed) == sorted(used), "the door's __all__ and what the others import"

    @of_each([module for module in FILES if part_of(module) in ON_THE_FACE])
    def test_of_what_calls_the_public_functions_enter_no_wing(self, module: str) -> None:
        assert not WINGS & set(map(part_of, imports_of(module)))

    def test_make_no_circle(self) -> None:
        waiting = {module: set(imports_of(module)) - {module} for module in FILES}
        while ready := [module for module, imports in waiting.items() if not imports & waiting.keys()]:
            for module in ready:
                del waiting[module]
        assert not waiting, f"modules in a circle, or that import one: {sorted(waiting)}"

    def test_of_the_lowest_level_are_torch_and_the_standard_library(self) -> None:
        allowed = {*sys.stdlib_module_names, "torch"}
        for module in set(FILES) & LEVELS[0]:
            for node in ast.parse(FILES[module].read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert {part_of(name) for name in names} <= allowed, module

    def test_of_the_package_load_neither_pytorch_nor_transformers(self) -> None:
        code = "import sys, steering_vectors; print(*({'torch', 'transformers', 'numpy', 'tqdm'} & sys.modules.keys()))"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (loaded.stdout.strip(), loaded.stderr) == ("", "")

    def test_load_no_extra(self) -> None:
        extras = [
            "sklearn",
            "gguf",
            "matplotlib",
            "typer",
            "rich",
            "accelerate",
            "peft",
            "pandas",
            "scipy",
            "jinja2",
            "gradio",
        ]
        code = f"import sys; from steering_vectors import *; print(*[name for name in {extras} if name in sys.modules])"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (loaded.stdout.strip(), loaded.stderr) == ("", "")


class TestSizes:
    @of_each(FILES)
    def test_no_module_is_long(self, module: str) -> None:
        assert len(lines_of_code(FILES[module])) <= MOST_LINES_OF_A_MODULE

    @of_each(FILES)
    def test_no_function_is_long(self, module: str) -> None:
        lines = lines_of_code(FILES[module])
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                assert length <= MOST_LINES_OF_A_FUNCTION, f"{module}.{node.name} has {length} lines"

    def test_lines_are_counted_without_docstrings_comments_and_blanks(self, tmp_path: Path) -> None:
        path = tmp_path / "module.py"
        path.write_text(
            '"""Doc.\n\nMore.\n"""\n\n# why\ndef f(\n    x,  # that\n):\n    """Doc."""\n    return """a\nb"""\n'
        )
        assert lines_of_code(path) == {7, 8, 9, 11, 12}


class TestTheFrontDoor:
    def test_lists_its_names_sorted_and_once(self) -> None:
        assert steering_vectors.__all__ == sorted(set(steering_vectors.__all__))

    def test_imports_lazily_just_what_it_lists_and_what_a_type_checker_sees(self) -> None:
        seen = _module_level_imports(ast.parse(FILES[FRONT_DOOR].read_text()).body)
        for_type_checkers = sorted(name for name in seen if not name.endswith("__version__"))
        lazily = sorted(
            f"steering_vectors.{module}.{name}" for module, names in steering_vectors._NAMES.items() for name in names
        )
        assert lazily == for_type_checkers
        assert sorted(name.rpartition(".")[2] for name in lazily) == steering_vectors.__all__

    def test_shows_its_names_and_no_others(self) -> None:
        shown = {name for name in dir(steering_vectors) if not name.startswith("_")}
        modules = {module.removesuffix(".__init__") for module in FILES if not module.startswith("_")}
        modules = {module for module in modules if "." not in module}
        assert shown == {*steering_vectors.__all__, *modules} - LEVELS[-1]
        for name in shown:
            assert getattr(steering_vectors, name) is not None

    def test_gives_the_function_and_not_the_module_of_its_name(self) -> None:
        code = (
            "import steering_vectors\n"
            "steering_vectors.aggregators.mean_aggregator()\n"
            "import steering_vectors.train_steering_vector, steering_vectors.record_activations\n"
            "from steering_vectors import record_activations, train_steering_vector\n"
            "for name in ('train_steering_vector', 'record_activations'):\n"
            "    assert getattr(steering_vectors, name) is globals()[name]\n"
            "    assert type(globals()[name]).__name__ == 'function', globals()[name]"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_names_what_it_lacks(self) -> None:
        with pytest.raises(AttributeError, match="module 'steering_vectors' has no attribute 'steers'"):
            getattr(steering_vectors, "steers")  # noqa: B009
        with pytest.raises(ImportError, match="cannot import name 'steers'"):
            from steering_vectors import steers  # type: ignore[attr-defined]  # noqa: F401

    def test_has_what_0_12_2_had_and_what_is_new(self) -> None:
        assert set(steering_vectors.__all__) >= PUBLIC_SINCE_0_12_2 | PUBLIC_SINCE_1_0

    def test_says_its_version(self) -> None:
        assert steering_vectors.__version__.split(".")[0] == "1"

    def test_package_says_that_it_is_typed(self) -> None:
        assert (PACKAGE / "py.typed").is_file()


def public_objects() -> list[str]:
    """The public names that can bear a docstring of their own: no aliases of types."""
    return [
        name
        for name in steering_vectors.__all__
        if inspect.isclass(getattr(steering_vectors, name)) or inspect.isfunction(getattr(steering_vectors, name))
    ]


class TestDocstrings:
    @of_each(public_objects())
    def test_of_public_names_show_an_example(self, name: str) -> None:
        assert ">>> " in (getattr(steering_vectors, name).__doc__ or "")

    @of_each(public_objects())
    def test_of_public_names_begin_with_a_line_on_what_it_gives(self, name: str) -> None:
        lines = (getattr(steering_vectors, name).__doc__ or "").splitlines()
        assert lines, "no docstring"
        assert lines[0].strip().endswith((".", ":", ","))

    @pytest.mark.parametrize(
        "name", [name for name in public_objects() if inspect.isclass(getattr(steering_vectors, name))]
    )
    def test_of_public_methods_are_there(self, name: str) -> None:
        for attribute, value in vars(getattr(steering_vectors, name)).items():
            if inspect.isfunction(value) and not attribute.startswith("_"):
                assert value.__doc__, f"{name}.{attribute}"

    @of_each(FILES)
    def test_of_modules_say_their_one_responsibility(self, module: str) -> None:
        doc = ast.get_docstring(ast.parse(FILES[module].read_text()))
        assert doc, "no docstring"
        assert doc.splitlines()[0].endswith((".", ":", ","))

    @of_each(FILES)
    def test_begin_with_a_verb_or_a_noun(self, module: str) -> None:
        riddles = {"What", "Whether", "Which", "Where", "How", "When", "If"}
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                continue
            first, *_ = (ast.get_docstring(node) or "Nothing").split()
            name = getattr(node, "name", module)
            assert first not in riddles, f"{module}.{name} begins with {first}"
            if isinstance(node, ast.FunctionDef) and not _is_property(node):
                assert first not in NO_VERBS, f"{module}.{name} begins with {first}, which is no verb"
                assert first[0].isupper(), f"{module}.{name} begins with {first}, which is no verb"

    @of_each(FILES)
    def test_use_no_private_words(self, module: str) -> None:
        source = FILES[module].read_text()
        comments = [
            t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
        ]
        nodes = ast.walk(ast.parse(source))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for text in [*comments, *texts]:
            found = PRIVATE_WORDS.search(text)
            assert found is None, f"{module}: {found and found[0]!r} in {text!r}"


# First words of docstrings that are no verbs, and words with a meaning that only this project gives them.
NO_VERBS = {
    "The",
    "A",
    "An",
    "For",
    "By",
    "As",
    "All",
    "Each",
    "Of",
    "None",
    "This",
    "These",
    "That",
    "One",
    "With",
    "Nothing's",
}
PRIVATE_WORDS = re.compile(r"\b(told|makes? of|stands? for|taken? off|takes off)\b")


def _is_property(node: ast.FunctionDef) -> bool:
    names = {getattr(decorator, "id", getattr(decorator, "attr", "")) for decorator in node.decorator_list}
    return bool(names & {"property", "computed_once"})
