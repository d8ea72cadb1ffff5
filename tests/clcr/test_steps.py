"""A training step asks the device nothing: not in the forward pass, the losses, the backward pass or the update."""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clcr.errors import DivergedError
from clcr.registry import MODELS
from clcr.training import OptimConfig, Trainer

EVERY_MODEL = [*MODELS, "video"]
# On a GPU each of these waits until the device has answered: a number, or a size, that the next call depends on.
ASKING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique2",
          "equal", "is_nonzero", "allclose", "_linalg_check_errors"}  # fmt: skip


class Questions(TorchDispatchMode):
    """Names of the calls that a device would be asked by, and of those between two devices."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        name = call.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        chosen = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)] if "index" in name else []
        by_mask = name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in chosen)
        if name in ASKING or by_mask or len({x.device.type for x in tensors}) > 1:
            self.asked.append(name)
        return out


def trainer(make, name, loss=None, **optim):
    torch.manual_seed(0)
    return Trainer(make.model(name, loss=loss, dropout=0.1, features=make.three), make.tasks, OptimConfig(**optim), 3)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.unique(x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.linalg.cholesky(torch.eye(2) * x[1]),
    ],
)
def test_a_question_is_noticed(ask):
    with Questions() as questions:
        ask(torch.arange(3.0))
    assert questions.asked


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize(
    "optim",
    [
        {"loss": {"unimodal": 0.1, "correlation": "whitened"}},
        {"optimizer": "sgd", "micro_batch": 4, "precision": "bf16"},
    ],
)
def test_whole_steps_ask_nothing(make, name, optim):
    taught, batch = trainer(make, name, **optim), make.batch(features=make.three)
    taught.forward.train()
    with Questions() as questions:
        steps = [taught.advance(batch) for _ in range(2)]
    assert questions.asked == []
    assert all(step.losses["train/loss"] > 0 for step in steps) and taught.stopped == 0


def fakes():
    """A mode in which nothing is computed, and what moves a tensor to the GPU of that mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode, lambda x: mode.from_tensor(x.detach()).to("cuda")


def test_what_lies_on_two_devices_is_noticed():
    mode, fake = fakes()
    with mode:
        there = fake(torch.arange(3.0))
        for ask in (lambda: torch.tensor([1.0], device="cuda"), lambda: there[[0, 2]], there.cpu):
            with Questions() as questions:
                ask()
            assert questions.asked
        with pytest.raises(DynamicOutputShapeException):
            there[there > 0]


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_forward_and_losses_run_on_a_gpu_that_is_not_there_and_copy_nothing_to_or_from_it(make, name):
    """Whoever asks what a tensor holds, or moves one between devices, is caught."""
    taught, batch = trainer(make, name), make.batch(features=make.three)
    mode, fake = fakes()
    with mode:
        for module in taught.model.modules():
            parameters, buffers = module._parameters, module._buffers
            parameters |= {n: torch.nn.Parameter(fake(p)) for n, p in parameters.items() if p is not None}
            buffers |= {n: fake(b) for n, b in buffers.items() if b is not None}
        there = batch._each(fake, batch.clip_ids)
        with Questions() as questions:
            out = taught.model.train()(there)
            weights = taught._task_weights(there)
            losses = [taught._losses(task, out.logits[task], there.targets[task]) for task in make.tasks]
        assert questions.asked == []
        assert {x.device.type for x in [weights, *losses, *out.losses.values()]} == {"cuda"}


def test_a_step_that_is_not_finite_changes_no_weight_nor_does_a_later_one_and_is_named_at_the_next_check(make):
    for optimizer in ("adamw", "sgd"):
        taught, good, bad = (
            trainer(make, "concat", optimizer=optimizer),
            *(make.batch(features=make.three) for _ in "ab"),
        )
        bad.targets["mood"][2] = torch.inf
        before = {}

        def remember(losses, taught=taught, before=before):
            if taught.step == 2:
                before |= {name: value.clone() for name, value in taught.model.state_dict().items()}

        with pytest.raises(DivergedError, match=r"step 2: the loss is inf on clips clip2: check"):
            taught.train_epoch([good, good, bad, good, good], remember)
        assert taught.step == 5  # noticed at the end of the epoch
        after = taught.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("ask", ["state_dict", "mean_over_workers"])
def test_a_log_and_a_checkpoint_notice_it_too(make, ask):
    taught, bad = trainer(make, "concat"), make.batch(features=make.three)
    bad.targets["mood"][2] = torch.inf

    def after_step(losses):
        getattr(taught, ask)(*[losses] * (ask == "mean_over_workers"))

    with pytest.raises(DivergedError, match="step 0"):
        taught.train_epoch([bad, bad], after_step)
    assert taught.step == 1


def test_an_unread_step_keeps_only_a_few_numbers_and_no_more_than_so_many(make):
    taught, batch = trainer(make, "concat"), make.batch(features=make.three)
    most = []
    taught.train_epoch([batch] * 60, lambda _: most.append(len(taught.unread)))
    assert max(most) == 50 and not taught.unread


@pytest.mark.slow
def test_batches_of_ten_shapes_are_compiled_once(make):
    """As the trainer compiles; their clips' ids are no part of the graph.

    The hook that gives numbers their unit may be compiled once more, for sizes that were equal in the first batch.
    """
    model, batches = make.model("clcr", levels=2).train(), [make.batch(4 + n % 5, seed=n) for n in range(12)]
    assert len({batch.features["audio"].values.shape for batch in batches}) >= 10
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = torch.compile(model, backend="eager", fullgraph=True, dynamic=True), []
    for batch in batches:
        compiled(batch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 2 and graphs[1] <= 3 and graphs[1:] == [graphs[1]] * (len(batches) - 1)
