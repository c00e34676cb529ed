"""What Trainer is told of a run."""

from parts.run import optimizer_of

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_a_loss_scaler_that_skips_a_step_is_seen_to_do_so(precision):
    """RunCallback counts them, and Trainer's schedule must not move on."""
    Accelerator(cpu=True)  # whose state the optimizer asks for
    weight = torch.ones(2, requires_grad=True)
    fused = optimizer_of("adamw", precision).endswith("_fused")
    scaler = torch.amp.GradScaler("cpu")
    plain = torch.optim.AdamW([weight], fused=fused)
    optimizer = AcceleratedOptimizer(plain, device_placement=False, scaler=scaler)
    scaler.scale((weight * torch.inf).sum()).backward()
    optimizer.step()
    assert weight.tolist() == [1, 1]
    assert optimizer.step_was_skipped == (precision == "fp16")  # the others have no scaler
    assert fused == (precision != "fp16")
