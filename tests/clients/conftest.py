"""What the tests of other projects share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clients.agreement import Case


@pytest.fixture
def case(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Case:
    """What a test asks of a module, written down for docs/compatibility.md."""
    variant = getattr(request.node, "callspec", None)
    record_property("run", request.function.__doc__ + ("" if variant is None else f": {variant.id}"))
    return Case(record_property)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of other projects are theirs; our own stay errors."""
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings(r"error:(FAM|FlatnessMonitor)\("))
