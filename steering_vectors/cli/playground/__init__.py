"""The playground: a page in the browser with an unsteered and a steered answer, side by side."""
