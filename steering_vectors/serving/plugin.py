"""The entry points at which vLLM loads the plugin; idle unless STEERING_VECTORS_DIR is set."""

import os


def register() -> None:
    """Prepare this process of vLLM for steering, if the environment names a folder of vectors.

    vLLM swallows exceptions while a plugin is imported, and serves without it: so nothing is imported before this call.
    """
    if os.environ.get("STEERING_VECTORS_DIR"):
        from steering_vectors.serving.admitting import install

        install()


def routes() -> object:
    """Return the plugin that adds the routes under ``/v1/steering`` to vLLM's server."""
    from steering_vectors.serving.routes import SteeringRoutes

    return SteeringRoutes()
