"""The cases that run in Triton's interpreter too show what was compared, as tests do."""

import pytest

pytest.register_assert_rewrite("nm_attention_cases", "triton_quantize_cases")
