"""The memory of gathered weights goes between the passes, and the gradients are what they were."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from piip_scale.engine.zero.kept_weights import keeping_parameters


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))


def forward(model, compute):
    torch.manual_seed(1)
    x = torch.randn(4, 8, requires_grad=True)
    return x, compute(x).square().sum()


def gradients(model, x) -> list[torch.Tensor]:
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def test_matrices_can_go_and_come_back_and_gradients_are_those_of_the_plain_call():
    plain, model = built(), built()
    x, loss = forward(plain, plain)
    loss.backward()
    expected = gradients(plain, x)
    matrices = [model[0].weight, model[3].weight]
    x, loss = forward(model, keeping_parameters(model, matrices))
    away = [matrix.detach().clone() for matrix in matrices]
    memory = [StorageWeakRef(matrix.untyped_storage()) for matrix in matrices]
    for matrix in matrices:
        matrix.data = torch.empty(0)
    assert all(storage.expired() for storage in memory)
    for matrix, values in zip(matrices, away, strict=True):
        matrix.data = values
    loss.backward()
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(found, wanted)


def test_torch_alone_keeps_them():
    model = built()
    memory = StorageWeakRef(model[0].weight.untyped_storage())
    _, loss = forward(model, model)
    model[0].weight.data = torch.empty(0)
    assert not memory.expired()
    del loss


def test_a_program_keeps_parameters_as_such():
    """So that a compiled block needs nothing in its place."""
    torch._dynamo.reset()
    model = built()
    _, loss = forward(model, torch.compile(model, backend="aot_eager_decomp_partition"))
    nodes, saved = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        saved += getattr(node, "saved_tensors", ())
        nodes += [following for following, _ in node.next_functions if following is not None]
    addresses = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    kept = [(tensor, addresses[tensor.data_ptr()]) for tensor in saved if tensor.data_ptr() in addresses]
    assert {id(parameter) for _, parameter in kept} >= {id(model[0].weight), id(model[3].weight)}
    assert all(tensor is parameter for tensor, parameter in kept)
