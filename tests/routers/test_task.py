"""Task routers: normalised sigmoids of learned logits, fixed rows, unknown tasks, and what is remembered when."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mixwright.routers.task import TaskLogits, TaskRouter
from mixwright.routing import Condition

T, N, R = 5, 2, 4
X = torch.zeros(3, 6, 7)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def of(*tasks: int) -> Condition:
    return Condition(task_ids=torch.tensor(tasks))


def test_weights_are_normalised_sigmoids_of_the_tasks_rows() -> None:
    z = logits(T, R)
    routing = TaskLogits(z.clone())(X, of(4, 0, 4))
    gates = z.sigmoid()[[4, 0, 4]]
    torch.testing.assert_close(routing.weights, (gates / gates.sum(-1, keepdim=True))[:, None])
    assert routing.num_experts == R and routing.indices is None


def test_every_position_is_normalised_for_itself() -> None:
    weights = TaskLogits(logits(T, N, R))(X, of(1, 2, 3)).weights
    assert weights.shape == (3, 1, N, R) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1, N))


def test_logits_of_zero_are_uniform_and_one_large_logit_is_not_peaky() -> None:
    z = torch.zeros(2, 4)
    z[1, 0] = 3.0
    table = TaskLogits(z).table()
    torch.testing.assert_close(table[0], torch.full((4,), 0.25))
    assert abs(table[1, 0].item() - 0.388) < 1e-3


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 4, 7)])
def test_inputs_of_other_axes(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    weights = TaskLogits(logits(T, R))(x, of(*[1] * shape[0])).weights
    assert weights.shape == (shape[0], *[1] * (len(shape) - 2), R)


def test_one_id_is_one_choice_for_any_batch() -> None:
    assert TaskLogits(logits(T, R))(X, of(2).for_batch(3)).weights.shape == (1, 1, R)


def test_a_hidden_noise_only_in_training_and_only_when_asked() -> None:
    plain, noisy = TaskLogits(logits(T, R)), TaskLogits(logits(T, R), noise=True)
    first = plain.train()(X, of(0, 0, 1)).weights
    assert torch.equal(first, plain(X, of(0, 0, 1)).weights)
    torch.manual_seed(0)
    drawn = noisy.train()(X, of(0, 0, 1)).weights
    assert not torch.equal(drawn[0], drawn[1])  # each row of the batch draws for itself
    torch.testing.assert_close(noisy.eval()(X, of(0, 0, 1)).weights, first)


def test_the_noises_mean_is_that_of_a_relaxed_bernoulli() -> None:
    router = TaskLogits(torch.tensor([[1.0, 3.0]]), noise=True).train()
    torch.manual_seed(0)
    chosen: list[Tensor] = []
    router._normalised = lambda gates: chosen.append(gates) or gates  # type: ignore[method-assign]
    router(torch.zeros(200_000, 1, 1), Condition(task_ids=torch.zeros(200_000, dtype=torch.long)))
    mean = chosen[0].mean(0)
    torch.testing.assert_close(mean, torch.tensor([0.661, 0.886]), atol=2e-3, rtol=0)  # not sigmoid: 0.731, 0.953


def test_straight_through_rounds_and_keeps_the_gradient() -> None:
    router = TaskLogits(torch.tensor([[2.0, -2.0, 1.0]]), straight_through=True)
    weights = router(torch.zeros(1, 1, 1), of(0)).weights
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.0, 0.5]]]))
    weights[0, 0, 0].backward()
    assert router.logits.grad is not None and router.logits.grad.abs().sum() > 0


def test_gradients_reach_the_rows_that_were_asked_for_alone() -> None:
    router = TaskLogits(logits(T, R))
    router(X, of(1, 3, 1)).weights[..., 0].sum().backward()
    assert router.logits.grad is not None
    assert router.logits.grad.abs().sum(-1).gt(0).tolist() == [False, True, False, True, False]


def test_one_expert_makes_the_router_inert() -> None:
    router = TaskLogits(logits(T, 1).double())
    router(X.double(), of(0, 1, 2)).weights.sum().backward()
    assert router.logits.grad is not None and router.logits.grad.abs().max() < 1e-11


@pytest.mark.parametrize("router", [TaskLogits(logits(T, R)), TaskRouter(logits(T, R))], ids=["logits", "fixed"])
@pytest.mark.parametrize("task", [T, -1])
def test_an_unknown_task_is_refused(router: nn.Module, task: int) -> None:
    with pytest.raises(ValueError, match=f"holds {task}, but this router knows {T} tasks, 0 to 4"):
        router(X, of(0, 1, task))


def test_without_a_task_the_error_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="condition.task_ids.*with_task"):
        TaskLogits(logits(T, R))(X, Condition())


def test_what_resembles_no_task_is_uniform() -> None:
    router = TaskLogits(logits(T, R)).eval()
    shares = torch.zeros(3, T)
    shares[0, 2], shares[1, 0], shares[1, 1] = 1.0, 0.25, 0.25
    weights = router(X, Condition(task_weights=shares)).weights
    table = router.table()
    torch.testing.assert_close(weights[0, 0], table[2])
    torch.testing.assert_close(weights[1, 0], 0.25 * (table[0] + table[1]) + 0.5 / R)
    torch.testing.assert_close(weights[2, 0], torch.full((R,), 1 / R))
    with pytest.raises(ValueError, match="4 columns for a router of 5 tasks"):
        router(X, Condition(task_weights=shares[:, :4]))


def test_the_routing_is_remembered_until_something_changes() -> None:
    router, condition = TaskLogits(logits(T, R)).eval(), of(0, 1, 2)
    with torch.no_grad():
        first = router(X, condition)
        assert router(X, condition) is first
        router.logits.add_(torch.eye(T, R))
        second = router(X, condition)
        assert not torch.equal(second.weights, first.weights)
        assert condition.task_ids is not None
        condition.task_ids.fill_(4)
        torch.testing.assert_close(router(X, condition).weights[:, 0], router.table()[[4, 4, 4]])
        router.load_state_dict({"logits": torch.zeros(T, R)})
        torch.testing.assert_close(router(X, condition).weights, torch.full((3, 1, R), 1 / R))
    recorded = router(X, condition).weights
    assert recorded.requires_grad


def test_what_was_remembered_in_inference_mode_can_be_trained_on() -> None:
    router = TaskLogits(logits(T, R)).eval()
    with torch.inference_mode():
        router(X, of(0, 1, 2))
    with torch.no_grad():
        table = router.table()
    (table * torch.ones(R, requires_grad=True)).sum().backward()


def test_a_narrow_model_keeps_wide_logits() -> None:
    router = TaskLogits(logits(T, R))
    expected = router.table().detach().clone()
    for dtype in (torch.bfloat16, torch.float16):
        assert router.to(dtype).logits.dtype == torch.float32
        assert torch.equal(router.table(), expected)
    assert router.double().table().dtype == torch.float64


def test_copies_and_pickles_carry_no_memory() -> None:
    router = TaskLogits(logits(T, R)).eval()
    with torch.no_grad():
        router(X, of(0, 1, 2))
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert twin._table is None and twin._routing is None
        assert torch.equal(twin.logits, router.logits)


def test_a_cold_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        TaskLogits(torch.zeros(2, 3), temperature=0.0)


def test_beams_repeat_rows_in_place_and_other_batches_are_refused() -> None:
    assert of(3, 1).for_batch(6).task_ids.tolist() == [3, 3, 3, 1, 1, 1]  # type: ignore[union-attr]
    shares = Condition(task_weights=torch.eye(2)).for_batch(4).task_weights
    assert shares is not None and shares.argmax(-1).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="condition.task_ids has 2 rows but the pass has 5"):
        of(3, 1).for_batch(5)


def test_one_row_of_a_condition_goes_with_masks_of_any_batch() -> None:
    masks = {"token_mask": torch.ones(5, 3, dtype=torch.bool), "encoder_mask": torch.ones(5, 4, dtype=torch.bool)}
    one = Condition(task_ids=torch.tensor([1]), **masks)
    alike = Condition(task_weights=torch.ones(1, 2), **masks)
    assert one.for_batch(5).task_ids is one.task_ids and alike.for_batch(5).task_weights is alike.task_weights
