"""The Mamba block: parameter names, count, initial values, agreement with transformers' mixer."""

from __future__ import annotations

import pytest
import torch

from mmkit.ops import Mamba


@pytest.mark.parametrize("d", [8, 24])
def test_parameter_count_and_initial_values(d: int) -> None:
    block = Mamba(d)
    rank, inner = -(-d // 16), 2 * d
    count = d * 4 * d + 5 * inner + inner * (rank + 32) + inner * rank + inner + inner * 16 + inner + inner * d
    assert sum(p.numel() for p in block.parameters()) == count
    torch.testing.assert_close(block.A_log.exp()[0], torch.arange(1.0, 17))
    step = torch.nn.functional.softplus(block.dt_proj.bias)
    assert step.min() >= 0.99e-4
    assert step.max() <= 0.1001


@pytest.mark.slow
def test_transformers_mixer_takes_the_state_dict_and_agrees() -> None:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    block = Mamba(16, d_state=8)
    config = MambaConfig(hidden_size=16, state_size=8, num_hidden_layers=1, use_bias=False, use_conv_bias=True)
    mixer = MambaMixer(config, layer_idx=0)
    mixer.load_state_dict(block.state_dict())
    x = torch.randn(2, 21, 16)
    torch.testing.assert_close(block(x), mixer(x), atol=1e-5, rtol=1e-4)


def test_the_first_tokens_do_not_see_the_last() -> None:
    block = Mamba(8)
    x = torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 12:] += 1
    torch.testing.assert_close(block(x)[:, :12], block(changed)[:, :12])
    assert not torch.allclose(block(x)[:, 12:], block(changed)[:, 12:])


@pytest.mark.slow
def test_a_compiled_training_step_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    block = Mamba(16, d_state=8, backend="cpu")
    x = torch.randn(2, 40, 16)
    block(x).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in block.named_parameters()}
    block.zero_grad()
    torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5)
