import pytest
import torch

from ssmtune.ops import gather_rows


@pytest.mark.parametrize("index", [[2, 0, 2], [1, -1, 0, 5], [0, 1, 2], [1, 0, 2], [0, 1]], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_gather_rows(index, kind):
    stack = torch.randn(3, 4, 5, requires_grad=True)
    rows = gather_rows(stack, torch.tensor(index, dtype=kind))
    expected = [stack[place] if 0 <= place < 3 else torch.zeros(4, 5) for place in index]
    assert torch.equal(rows, torch.stack(expected))
    (gradient,) = torch.autograd.grad(rows.sum(), stack)
    assert torch.equal(gradient[:, 0, 0], torch.tensor([float(index.count(place)) for place in range(3)]))


def test_a_stack_in_the_order_of_the_rows_is_not_copied():
    stack = torch.randn(3, 4)
    assert gather_rows(stack, torch.arange(3)) is stack
    assert gather_rows(stack, torch.arange(2)) is not stack
