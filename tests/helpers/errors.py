"""What an error of this package says."""

import pytest


def refuses(*parts, error=ValueError):
    """Expects the house form: what in backticks, the rule, what was received."""
    pattern = "(?s)" + ".*".join([*parts, r"Received: .*\."])
    return pytest.raises(error, match=pattern)
