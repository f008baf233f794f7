"""Sphinx directives for what the build computes: ``picture``, drawn for both themes, and ``steered-text``."""

import os
from pathlib import Path
from typing import Any

import drawings
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class _Computed(SphinxDirective):
    """A directive whose page is read again when the code that draws has changed."""

    def note_code(self) -> None:
        """Make the drawing functions' files the page's dependencies."""
        for path in [Path(__file__), *Path(drawings.__file__).parent.glob("*.py")]:
            self.env.note_dependency(os.fspath(path))


class Picture(_Computed):
    """A picture by its name in ``drawings.PICTURES``, with a text in its stead and perhaps a caption.

    The files are written beside the build's doctrees, from where Sphinx copies them into each builder's output. Where
    the picture's model isn't installed, the text appears in the picture's place.

    ::

        .. picture:: operators
            :alt: Arrows of an activation before and after each operator.

            A caption.
    """

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Draw the picture, and return a figure with an image for each theme."""
        name, alt = self.arguments[0], self.options.get("alt")
        if not alt:
            raise self.error(f"picture {name} needs an :alt: text")
        if name not in drawings.PICTURES:
            raise self.error(f"there is no picture {name}: there are {', '.join(sorted(drawings.PICTURES))}")
        self.note_code()
        try:
            paths = drawings.write(name, Path(self.env.doctreedir) / "pictures")
        except drawings.NoModelError:
            return [nodes.paragraph("", "", nodes.emphasis("", alt), classes=["no-picture"])]
        figure = nodes.figure("", *(self._image(path, theme, alt) for theme, path in paths.items()))
        figure["classes"].append("picture")
        if self.content:
            caption = " ".join(self.content)
            texts, messages = self.state.inline_text(caption, self.lineno)
            figure += [nodes.caption(caption, "", *texts), *messages]
        return [figure]

    def _image(self, path: Path, theme: str, alt: str) -> nodes.image:
        page = Path(self.env.doc2path(self.env.docname)).parent
        uri = Path(os.path.relpath(path, page)).as_posix()
        return nodes.image(uri=uri, alt=alt, classes=[f"only-{theme}"])


class SteeredText(_Computed):
    """A text as a trace of its steering shows it, with the steered tokens marked; nothing without SmolLM2."""

    def run(self) -> list[nodes.Node]:
        """Run the model, and return the marked text as HTML."""
        self.note_code()
        try:
            text = drawings.steered_text()
        except drawings.NoModelError:
            return []
        return [nodes.raw("", f'<pre class="steered-text">{text}</pre>', format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("picture", Picture)
    app.add_directive("steered-text", SteeredText)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
