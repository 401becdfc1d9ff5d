"""Text files from Jinja templates beside the code that fills them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def render(package: str, name: str, values: dict[str, Any], **filters: Callable[..., Any]) -> str:
    """The text of a template.

    Args:
        package: whose folder `templates` holds it.
        name: of the file.
        values: what it names; a name without a value is an error.
        filters: functions that it calls as filters.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(package)
    made = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    made.filters |= filters
    return made.get_template(name).render(values)
