"""What all unit tests share."""

import pytest

pytest.register_assert_rewrite("tests.reference.conversions")
