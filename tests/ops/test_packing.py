"""`pad` and `unpad`: inverse of each other, differentiable, and refusing what does not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backend_cases import every_device

from g2rl_kernels import pad, sequence_features, testing, unpad
from tests.live_memory import LiveMemory

MASK = [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
KEPT = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 3), (3, 0), (3, 1), (3, 2), (3, 3)]


@every_device
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_unpad_keeps_marked_positions_in_order(device: str, dtype: torch.dtype) -> None:
    """Left, right and holes in between; a row without marks; a mask of any kind of number."""
    padded = torch.arange(4 * 4 * 3, device=device).view(4, 4, 3)
    packed, cu_seqlens = unpad(padded, torch.tensor(MASK, device=device).to(dtype))
    assert cu_seqlens.tolist() == [0, 3, 5, 5, 9]
    assert cu_seqlens.dtype == torch.int32
    assert packed.tolist() == [padded[b, t].tolist() for b, t in KEPT]


@every_device
@pytest.mark.parametrize("rest", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_round_trips(device: str, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.tensor(MASK, device=device)
    padded = torch.arange(16 * max(1, torch.Size(rest).numel()), device=device).view(4, 4, *rest).to(dtype)
    packed, _ = unpad(padded, mask)
    back = pad(packed, mask, value=-7)
    marked = mask.bool()
    assert back.dtype == dtype
    assert back[marked].tolist() == padded[marked].tolist()
    assert (back[~marked] == -7).all()
    assert torch.equal(unpad(back, mask)[0], packed)
    assert (pad(packed, mask)[~marked] == 0).all()
    for number in (-2, 0.5):
        assert torch.equal(unpad(back, mask * number)[0], packed)
        assert torch.equal(pad(packed, mask * number, value=-7), back)


@every_device
def test_strided_tensors(device: str) -> None:
    mask = torch.tensor(MASK, device=device)
    contiguous = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0)).to(device)
    for strided in (
        contiguous.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((contiguous, contiguous), 3)[..., 0],
    ):
        assert not strided.is_contiguous()
        assert torch.equal(unpad(strided, mask.T.contiguous().T)[0], unpad(contiguous, mask)[0])


@every_device
def test_nothing_marked_and_nothing_there(device: str) -> None:
    packed, cu_seqlens = unpad(torch.ones(2, 3, 5, device=device), torch.zeros(2, 3, device=device))
    assert packed.shape == (0, 5)
    assert cu_seqlens.tolist() == [0, 0, 0]
    assert pad(packed, torch.zeros(2, 3, device=device), value=4).tolist() == [[[4.0] * 5] * 3] * 2
    packed, cu_seqlens = unpad(torch.ones(0, 3, 5, device=device), torch.zeros(0, 3, device=device))
    assert packed.shape == (0, 5)
    assert cu_seqlens.tolist() == [0]


def test_one_token_of_float8() -> None:
    packed = torch.tensor([-5.0]).to(torch.float8_e4m3fn)
    padded = pad(packed, torch.tensor([[0, 1], [0, 0]]), -1.0)
    assert padded.dtype == torch.float8_e4m3fn
    assert padded.float().tolist() == [[-1.0, -5.0], [-1.0, -1.0]]


def test_pad_makes_one_tensor_of_the_results_size() -> None:
    packed, mask = torch.randn(9, 512), torch.tensor(MASK)
    with LiveMemory(least=8192) as memory:
        padded = pad(packed, mask)
    assert memory.peak == padded.untyped_storage().nbytes()


def test_pad_of_a_batch_by_vmap() -> None:
    """It writes in place, which `vmap` allows on tensors of its own batch alone."""
    packed, mask = torch.randn(2, 9, 3), torch.tensor(MASK)
    assert torch.equal(torch.func.vmap(lambda x: pad(x, mask))(packed), torch.stack([pad(x, mask) for x in packed]))


def test_gradients() -> None:
    mask = torch.tensor(MASK)
    padded = torch.randn(4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unpad(x, mask)[0], padded)
    packed = padded.detach()[mask.bool()].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pad(x, mask, value=2.0), packed)
    unpad(padded, mask)[0].square().sum().backward()
    assert torch.equal(padded.grad, 2 * padded.detach() * mask[..., None])


def test_padded_batches_through_the_head() -> None:
    """What the functions are for: padded hidden states and targets in, padded log-probabilities out."""
    s = testing.head_sample(testing.Shape((3, 2, 0, 4), 8, 17, ""))
    mask = torch.tensor(MASK)
    hidden, targets = pad(s.hidden, mask), pad(s.targets, mask, value=-100)
    packed, cu_seqlens = unpad(hidden, mask)
    out = sequence_features(packed, s.head, unpad(targets, mask)[0], cu_seqlens)
    expected = sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens)
    assert torch.equal(out.features, expected.features)
    assert pad(out.logps, mask)[mask.bool()].tolist() == expected.logps.tolist()


def test_packed_rows_through_the_head() -> None:
    """Sequences behind each other, prompts included, as docs/TRAINERS.md has them, with padding behind."""
    s = testing.head_sample(testing.Shape((3, 1, 0, 4), 8, 17, ""))
    prompts, padding = (2, 4, 1, 3), torch.zeros(5, dtype=torch.bool)
    sequences = [torch.arange(p + r) >= p for p, r in zip(prompts, s.cu_seqlens.diff().tolist(), strict=True)]
    scored = torch.cat((*sequences, padding))
    cu_seqlens = F.pad(torch.tensor([len(sequence) for sequence in sequences]), (1, 0)).cumsum(0).int()
    ids, states = torch.zeros(len(scored), dtype=torch.int64), torch.zeros(len(scored), 8)
    ids[scored], states[scored.roll(-1)] = s.targets, s.hidden

    predicts = scored[1:]
    responses = F.pad(scored.cumsum(0), (1, 0))[cu_seqlens]
    out = sequence_features(states[:-1][predicts], s.head, ids[1:][predicts], responses)
    expected = sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens)
    assert torch.equal(out.features, expected.features)
    assert torch.equal(out.logps, expected.logps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: unpad(torch.ones(2, 3, 4), torch.ones(2, 4)),
            r"tensor: expected shape \[2, 4, ...\], found \[2, 3, 4\]",
        ),
        (lambda: unpad(torch.ones(2), torch.ones(2, 4)), r"tensor: expected shape \[2, 4, ...\], found \[2\]"),
        (lambda: unpad(torch.ones(2, 3), torch.ones(2)), r"mask: expected shape \[B, L\], found \[2\]"),
        (lambda: pad(torch.ones(4), torch.ones(2)), r"mask: expected shape \[B, L\], found \[2\]"),
        (
            lambda: pad(torch.ones(4), torch.ones(2, 3)),
            r"packed: expected shape \[6, ...\], as marked by mask, found \[4\]",
        ),
    ],
)
def test_messages(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="mask: expected a tensor, found list"):
        unpad(torch.ones(2, 3), [[1, 1, 1]] * 2)
    with pytest.raises(TypeError, match="tensor: expected a tensor, found list"):
        unpad([[1, 2, 3]] * 2, torch.ones(2, 3))
    for function in (unpad, pad):
        with pytest.raises(TypeError, match="mask: expected real numbers, found complex64"):
            function(torch.ones(2, 3), torch.ones(2, 3) * 1j)
    with pytest.raises(TypeError, match="packed: expected a dense tensor, found one of layout sparse_coo"):
        pad(torch.ones(6).to_sparse(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="packed: expected shape"):
        pad(torch.ones(()), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"packed: expected a dtype that PyTorch can index, found torch\.uint16"):
        pad(torch.ones(6).to(torch.uint16), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"value: expected a number that torch\.float32 holds, found 118"):
        pad(torch.ones(6), torch.ones(2, 3), 2**70)
    with pytest.raises(TypeError, match="value: expected a number, found str"):
        pad(torch.ones(6), torch.ones(2, 3), "0")
    for dtype, value in (
        (torch.int8, 300),
        (torch.int64, 0.5),
        (torch.int64, float("nan")),
        (torch.int64, 2**63),
        (torch.uint8, -1),
        (torch.bool, 2),
    ):
        with pytest.raises(ValueError, match=f"value: expected a number that {dtype} holds, found {value}"):
            pad(torch.ones(6).to(dtype), torch.ones(2, 3), value)
    with pytest.raises(TypeError, match="value: expected a number, found bool"):
        pad(torch.ones(6), torch.ones(2, 3), True)
    for value in (0, 1.0, False, True):
        assert pad(torch.ones(1).bool(), torch.tensor([[1, 0]]), value).tolist() == [[True, bool(value)]]
    assert pad(torch.ones(1) * 1j, torch.tensor([[1, 0]]), 0.5).tolist() == [[1j, 0.5]]
