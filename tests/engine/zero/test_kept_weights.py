"""The memory of gathered weights goes between the passes, and the gradients are what they were."""

import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from piip_scale.engine.zero.kept_weights import keeping_parameters
from piip_scale.engine.zero.setup import build_engine, build_model

NUM_MATRICES = 4


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


def gone_between_the_passes(world, _device) -> list[bool]:
    """Whether the memory of each matrix of the first block is, when the forward pass is through."""
    config = pyramid_config(network(), zero={"deepspeed": FORCED_RELEASE, "persistence_threshold": 64 * 64})
    task = PyramidTask(config, world)
    engine, _ = build_engine(build_model(task, 0), config, world)
    memory = []

    def look(block, _arguments):
        memory.extend(StorageWeakRef(each.untyped_storage()) for each in block.parameters() if not each.ds_persist)

    engine.module.backbone.branches[0].blocks[0].register_forward_pre_hook(look)
    losses = engine(next(iter(task.train_batches(0, 0))))
    gone = [storage.expired() for storage in memory]
    engine.backward(losses["loss"])
    return gone


def test_blocks_that_keep_what_they_computed_do_not_keep_what_was_gathered():
    assert run_ranks(2, gone_between_the_passes)[0] == [True] * NUM_MATRICES
