"""Private methods of other packages that are overridden here. A release may rename them without notice."""

from importlib.metadata import version


def require_methods(base: type, *names: str) -> None:
    """Raise `ImportError` if a class lacks methods that a subclass here overrides.

    Without this check, the override of a method that was renamed would never be called, and nothing would say so.

    Args:
        base (`type`): A class of another package.
        names (`str`): Names of its methods.
    """
    if absent := [name for name in names if not callable(getattr(base, name, None))]:
        package = base.__module__.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"{package} {version(package)} has no method {base.__name__}.{absent[0]}, which btok-hf overrides. "
            f"Install an older release of {package}, or a newer one of btok-hf."
        )
