"""8-bit layers of which the weights alone are in 8 bits: a step is exact however it is cut.

bitsandbytes' LLM.int8 quantises the inputs too, with outlier columns that depend on all rows of a
piece. That is its only way on a GPU; on a CPU it takes it in evaluation.
Shapes: (..., I) inputs, (O, I) weights, (..., O) outputs.
"""

import utils  # noqa: F401  quiets two libraries before the next are imported

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt

LARGEST_CODE = 127  # of int8, which stands for a row's largest weight


def dequantised(codes, scales, dtype):
    """Return weights (O, I); codes (O, I) int8, scales (O,): each row's largest weight."""
    return codes.to(dtype).mul_(scales.mul(1 / LARGEST_CODE)[:, None])


class WeightsOnly(torch.autograd.Function):
    """inputs @ weights.T + bias, with frozen weights and bias, of which nothing else is kept.

    The input is not needed for its own gradient: gradient checkpointing can let go of it, where
    bitsandbytes holds it.
    """

    @staticmethod
    def forward(ctx, inputs, codes, scales, bias):
        ctx.codes = codes
        ctx.scales = scales
        return F.linear(inputs, dequantised(codes, scales, inputs.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        weights = dequantised(ctx.codes, ctx.scales, gradient.dtype)  # once more: 1 byte is kept
        return gradient @ weights, None, None, None


class Linear8bit(Linear8bitLt):
    """bitsandbytes' layer with a forward pass of its own; all else of it stays the library's."""

    def forward(self, inputs):
        if self.weight.CB is not None:  # as the library does on its first call
            self.init_8bit_state()
        device = inputs.device.type
        dtype = inputs.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):  # the function's own products are in `dtype`
            outputs = WeightsOnly.apply(inputs.to(dtype), self.state.CB, self.state.SCB, bias)
        # float32 norms in fp16 keep the residual stream in float32, which large activations need
        is_half = dtype == torch.float16 and inputs.dtype == torch.float32
        return outputs.float() if is_half else outputs


def use_weights_only(model):
    """Give the 8-bit layers of a frozen model this forward pass."""
    for layer in model.modules():
        if type(layer) is Linear8bitLt:
            layer.__class__ = Linear8bit
