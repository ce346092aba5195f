"""Tensors that may be taken over, and types of which no adapter is made."""

import pytest
import torch

from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_fine(dtype):
    require_matching_state("lora", {"w": torch.ones(3)}, {"w": torch.ones(3, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64])
def test_types_that_no_adapter_is_saved_in_are_refused(dtype):
    """Of 8-bit floats torch cannot say whether they are finite: it raises NotImplementedError."""
    with pytest.raises(UserError, match=r"w expected dtype torch.float32, found torch\."):
        require_matching_state("lora", {"w": torch.ones(3)}, {"w": torch.ones(3).to(dtype)})
