import pytest
import torch
from torch import nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.methods.peer.calibration import layer_inputs
from mixwright.methods.peer.conversion import Conversion, convert
from mixwright.methods.peer.converted import converted
from mixwright.methods.peer.dense import neurons_of, to_ffn
from mixwright.methods.peer.feed_forward import feed_forwards
from mixwright.methods.peer.key_fit import all_scores, fit_keys, measure, oracle
from mixwright.methods.peer.neurons import Neurons, read_neurons
from mixwright.methods.peer.tracing import explain
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition

SITES = ("model.layers.0.mlp", "model.layers.1.mlp")


def layer(width=12, hidden=24, parts=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(hidden, parts, width, generator=draw)
    bias = torch.randn(hidden, parts - 1, generator=draw)
    return Neurons(rows, "relu", bias, torch.randn(width, generator=draw))


def text(rows=4, length=16, seed=0):
    return {"input_ids": torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def backbone():
    return tiny_backbone("llama")


def logits(model, inputs=None):
    with torch.no_grad():
        out = model(**(inputs or text()))
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("hidden", "grid"), [(24, None), (23, None), (23, (1, 23)), (23, (5, 5)), (1, None)])
def test_all_neurons_at_gate_one_are_the_layer(hidden, grid, parts):
    neurons = layer(hidden=hidden, parts=parts)
    router, experts, places = converted(neurons, grid=grid, dim_key=8)
    x = torch.randn(3, 7, 12)
    found = router.retrieve(x, Condition())
    torch.testing.assert_close(experts(x, router(x, Condition()), Condition()), neurons(x), rtol=1e-5, atol=1e-4)
    assert set(found.indices.unique().tolist()) == set(places.tolist())  # and no cell of the padding
    assert bool((found.gates == 1).all())


def test_neurons_stand_where_it_is_said():
    neurons = layer(hidden=23)
    _, experts, places = converted(neurons, dim_key=8)
    torch.testing.assert_close(neurons_of(experts, places).rows, neurons.rows)
    torch.testing.assert_close(neurons_of(experts, places).bias, neurons.bias)


def test_a_grid_without_room_is_refused():
    with pytest.raises(ValueError, match="grid=4 x 5 has 20 cells for 23 neurons; choose 4 x 6"):
        converted(layer(hidden=23), grid=(4, 5))


@pytest.mark.parametrize("parts", [2, 3])
def test_neurons_go_back_into_a_dense_layer(parts):
    neurons = layer(parts=parts)
    _, experts, places = converted(neurons, dim_key=8)
    x, ids = torch.randn(5, 12), torch.tensor([3, 17, 4])
    dense = to_ffn(experts)
    torch.testing.assert_close(dense(x), neurons(x), rtol=1e-5, atol=1e-4)
    some = to_ffn(experts, places[ids])
    picked = Neurons(neurons.rows[ids], "relu", neurons.bias[ids], neurons.out_bias)
    torch.testing.assert_close(some(x), picked(x), rtol=1e-5, atol=1e-5)
    assert read_neurons(dense).activation == "relu"  # it is a feed-forward layer like any other


def test_narrow_rows_are_multiplied_out():
    peer = mw.PEER(12, (4, 4), heads=1, top_k=16, dim_key=8, row_dim=5, gate="one", query_norm="none")
    x = torch.randn(6, 12)
    torch.testing.assert_close(to_ffn(peer.experts)(x), peer(x), rtol=1e-5, atol=1e-5)


def test_a_memory_of_values_and_an_output_gate_are_no_feed_forward_layer():
    with pytest.raises(ValueError, match="memory of values"):
        to_ffn(mw.PEER(12, 16, dim_key=8, top_k=4, values_only=True).experts)
    with pytest.raises(ValueError, match="gated on its way out"):
        to_ffn(mw.PEER(12, 16, dim_key=8, top_k=4, output_gate=True).experts)


def test_experts_stand_beside_their_layer_without_a_word(backbone):
    before = logits(backbone)
    steps = Conversion(backbone, [text()], top_k=8)
    assert torch.equal(logits(steps.model), before)
    steps.fit_keys(3)
    steps.keep(5)
    assert torch.equal(logits(steps.model), before)
    steps.model.remove()
    assert torch.equal(logits(backbone), before)


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "t5"])
def test_a_converted_model_says_what_its_backbone_says(family):
    model = tiny_backbone(family)
    inputs = example_inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        after = mw.convert(model)
        assert not any(mixture.base for mixture in after.mixtures.values())
        torch.testing.assert_close(after(**inputs)[0], before, rtol=1e-5, atol=1e-5)
        with after.disabled():
            assert torch.equal(after(**inputs)[0], before)
        after.remove()
        assert torch.equal(model(**inputs)[0], before)


def test_a_conversion_is_saved_and_loaded(backbone, tmp_path):
    model = convert(backbone, [text(seed=s) for s in range(3)], top_k=8, keep=5, grid=(7, 7), fit_steps=5)
    said = logits(model)
    model.save_pretrained(tmp_path)
    model.remove()
    again = mw.load(tmp_path, backbone=backbone)
    assert torch.equal(logits(again), said)
    router = again.layers[SITES[0]][0]
    assert router.grid == (7, 7) and len(router.always) == 5 and int(router.ablated.sum()) == 6


def test_keys_learn_what_the_oracle_chooses():
    neurons = layer(width=8, hidden=48)
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    router, _, places = converted(neurons, top_k=8, dim_key=24)
    placed = neurons.arranged(places, router.num_experts)
    started = measure(router, placed, x[:500])
    assert started.recall > 2 * 8 / 48 and started.active == 8  # first values are the neurons' own rows in
    with torch.no_grad():
        router.keys_first.normal_(generator=torch.Generator().manual_seed(2))
        router.keys_second.normal_(generator=torch.Generator().manual_seed(3))
    before = measure(router, placed, x[:500])
    losses = fit_keys(router, placed, x[500:], steps=80)
    after = measure(router, placed, x[:500])
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert after.recall > before.recall + 0.15 and after.error < before.error
    assert after.oracle_error < after.error


def test_one_row_of_cells_finds_nearly_all_that_the_oracle_does():
    """Scores of one axis are any function that is linear in x, which the neurons' own are."""
    neurons = layer(width=8, hidden=48)
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    router, _, places = converted(neurons, top_k=8, dim_key=24, grid=(1, 48))
    fit_keys(router, neurons.arranged(places, 48), x[500:], steps=80)
    assert measure(router, neurons.arranged(places, 48), x[:500]).recall > 0.85


def test_the_measures_are_what_they_say():
    neurons = layer(hidden=12)
    router, _, places = converted(neurons, dim_key=8, grid=(3, 4))
    x = torch.randn(50, 12)
    all_of_them = measure(router, neurons.arranged(places, 12), x)
    assert (all_of_them.recall, all_of_them.mass) == (1.0, pytest.approx(1.0))
    assert all_of_them.error < 1e-10 and all_of_them.active == 12
    router.top_k = 3
    few, placed = measure(router, neurons.arranged(places, 12), x), neurons.arranged(places, 12)
    best, mine = oracle(placed, x, 3), router.retrieve(x, Condition()).indices[:, 0]
    active = placed.importance(x).gather(-1, best) > 0
    hits = (best[:, :, None] == mine[:, None]).any(-1) & active
    assert few.recall == pytest.approx(float(hits.sum() / active.sum()))


def test_scores_of_all_are_those_that_retrieval_sorts():
    router = ProductKeyRouter(6, (3, 5), heads=1, top_k=15, dim_key=8, query_norm="none", query_bias=True)
    x = torch.randn(4, 6)
    found = router.retrieve(x, Condition())
    torch.testing.assert_close(all_scores(router, x).gather(-1, found.indices[:, 0]), found.scores[:, 0])


def test_neurons_that_always_act_are_not_retrieved_and_count_once(backbone):
    steps = Conversion(backbone, [text(seed=s) for s in range(3)], top_k=6)
    steps.take_over()
    dense = logits(steps.model.remove())
    steps.model = steps._composed(backbone, "replace")
    steps.keep(48)
    torch.testing.assert_close(logits(steps.model), dense, rtol=1e-5, atol=1e-5)
    steps.keep(10)
    router, layer_ = steps.model.layers[SITES[0]][0], steps.layers[SITES[0]]
    found = router.retrieve(layer_.inputs[:20], Condition())
    assert found.indices.shape[-1] == 16
    assert bool((found.indices[:, 0, 6:] == router.always).all()) and bool((found.gates == 1).all())
    assert not set(found.indices[:, 0, :6].unique().tolist()) & set(router.always.tolist())
    kept, others = layer_.usefulness[router.always], layer_.usefulness.clone()
    others[router.always] = 0
    assert float(kept.min()) >= float(others.max())


def test_parts_sum_to_the_output_where_some_always_act(backbone):
    model = convert(backbone, [text()], top_k=4, keep=7, fit_steps=0)
    (first, *_), inputs = explain(model, **text()).values(), text()
    assert first.ids.shape[-1] == 11
    given: list = []
    hook = model.mixtures[SITES[0]].register_forward_hook(lambda m, a, out: given.append(out))
    logits(model, inputs)
    hook.remove()
    torch.testing.assert_close(first.outputs, given[0].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_masked_tokens_give_the_neurons_that_always_act_no_weight():
    router, *_ = converted(layer(), top_k=4, dim_key=8)
    router.always = torch.tensor([1, 2])
    mask = torch.tensor([[True, True, False]])
    gates = router.retrieve(torch.randn(1, 3, 12), Condition(token_mask=mask)).gates
    assert bool((gates[0, :2, 0, 4:] == 1).all()) and bool((gates[0, 2] == 0).all())


def test_the_dense_branch_shrinks_while_the_loss_allows_it(backbone):
    steps = Conversion(backbone, [text(seed=s) for s in range(3)], top_k=4)
    with pytest.raises(ValueError, match=r"call take_over\(\)"):
        steps.shrink(lambda model: 0.0, budget=1.0)
    steps.take_over()

    def loss(model):
        return {48: 1.0, 24: 1.1, 12: 1.3}[len(model.layers[SITES[0]][0].always)]

    tried = steps.shrink(loss, budget=0.2, shares=(1.0, 0.5, 0.25), steps=2)
    assert [(step.keep, step.loss) for step in tried] == [(48, 1.0), (24, 1.1), (12, 1.3)]
    assert len(steps.model.layers[SITES[1]][0].always) == 24  # the last one within the budget


def test_what_retrieval_learnt_is_taken_back_with_a_step_too_far(backbone):
    steps = Conversion(backbone, [text()], top_k=4)
    steps.take_over()
    seen: list[torch.Tensor] = []

    def loss(model):
        seen.append(model.layers[SITES[0]][0].keys_first.detach().clone())
        return float(len(seen))

    steps.shrink(loss, budget=0.5, shares=(0.5, 0.25), steps=2)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(steps.model.layers[SITES[0]][0].keys_first, seen[0])


def test_with_sigmoid_gates_the_keys_learn_with_the_model(backbone):
    model = convert(backbone, [text()], top_k=8, gate="sigmoid", fit_steps=5).train()
    router, experts = model.layers[SITES[0]]
    model(**text(), labels=text()["input_ids"]).loss.backward()
    assert float(router.keys_first.grad.abs().sum()) > 0 and float(router.queries.weight.grad.abs().sum()) > 0
    assert float(experts.table.rows.grad.abs().sum()) > 0


def test_padding_is_no_calibration_text(backbone):
    inputs = text(rows=2, length=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    places = feed_forwards(backbone)
    found = layer_inputs(backbone, places, [{**inputs, "attention_mask": mask}], 100, 0)
    assert [len(x) for x in found.values()] == [8, 8]
    assert len(layer_inputs(backbone, places, [inputs["input_ids"]], 7, 0)[SITES[0]]) == 7
    with pytest.raises(ValueError, match="put it into a list"):
        layer_inputs(backbone, places, inputs, 100, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 49}, "top_k=49: expected 1 to 48"),
        ({"top_k": 0}, "top_k=0"),
        ({"keep": 60, "top_k": 4}, "keep=60: expected 0 to 48"),
        ({"sites": "model.layers.7.mlp"}, "nothing is named"),
    ],
)
def test_what_cannot_be_is_refused_and_the_backbone_stays(backbone, options, words):
    before = logits(backbone)
    with pytest.raises(ValueError, match=words):
        convert(backbone, **options)
    assert torch.equal(logits(backbone), before)
    assert isinstance(backbone.model.layers[0].mlp.gate_proj, nn.Linear)


def test_two_heads_would_count_a_neuron_twice():
    router = ProductKeyRouter(12, (4, 6), heads=2, top_k=4, dim_key=8, query_norm="none", query_bias=True)
    with pytest.raises(ValueError, match="count a neuron twice"):
        fit_keys(router, layer(), torch.randn(8, 12))
