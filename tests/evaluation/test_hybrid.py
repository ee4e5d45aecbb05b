"""A hybrid measured against brute force: the same model with its rows set by hand, one text at a time."""

import copy
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from mixwright.backbones.hf import byte_tokenizer
from mixwright.data.collate import IGNORED
from mixwright.data.tasks import task_of
from mixwright.evaluation.hybrid import explain_hybrid
from mixwright.evaluation.hybrid_boundaries import boundaries
from mixwright.evaluation.hybrid_counterfactuals import ENSEMBLE, HYBRID, UNIFORM, Meter, counterfactuals, leave_one_out
from mixwright.evaluation.hybrid_documents import documents_of, losses, per_token
from mixwright.evaluation.hybrid_rows import left_out, mixes_models, rows_of
from mixwright.evaluation.hybrid_slices import slices
from mixwright.evaluation.hybrid_sweep import flatness, grid, sweep
from mixwright.evaluation.hybrid_trajectories import still, trajectories

from .hybrid_model import NAMES, TEXTS, documents, hybrid_model
from .task_model import task_model

ROWS = ((0.7, 0.3), (0.25, 0.75))


@pytest.fixture(scope="module")
def model():
    made = hybrid_model(rows=ROWS)
    made.embedding_weights, made.head_weights = [0.6, 0.4], [0.1, 0.9]
    return made


@pytest.fixture(scope="module")
def texts():
    return documents()


@pytest.fixture(scope="module")
def meter(model, texts):
    return Meter(model, texts)


def by_hand(model, texts) -> float:
    """Nats per token over all targets, from the model's own logits."""
    total = count = 0
    with torch.no_grad():
        model.eval()
        for batch in texts.batches:
            logits = model(**batch.inputs).logits.double()
            total += float(cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="sum"))
            count += int((batch.targets != IGNORED).sum())
    return total / count


def with_row(model, slot: str, weights) -> object:
    """Another model, with one row set the way a user sets it."""
    other = copy.deepcopy(model)
    other.row(slot).set(torch.tensor(weights))
    return other


def test_only_models_that_mix_whole_models_are_hybrids(model):
    assert mixes_models(model) and not mixes_models(task_model())
    with pytest.raises(ValueError, match="no hybrid of whole models"):
        explain_hybrid(task_model())


def test_documents_hold_the_rows_of_their_text_and_no_other(texts):
    tokenizer = byte_tokenizer("causal")
    assert texts.files == ["plain"] * 3 + ["asked"] * 2 and texts.cut == ()
    read = ["" for _ in texts.files]
    rows = [row for batch in texts.batches for row in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"])]
    for document, (ids, mask) in zip(texts.document.tolist(), rows, strict=True):
        read[document] += tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
    assert read[:3] == list(TEXTS) and all(t[:9] in a for t, a in zip(TEXTS[:2], read[3:]))
    rows_of_third = int((texts.document == 2).sum())
    assert rows_of_third > 1 and texts.tokens[2].sum() == len(TEXTS[2]) + 1 - rows_of_third


def test_a_file_of_one_text_is_cut_and_says_so():
    made = documents_of([task_of([{"text": TEXTS[2] * 3}], name="book")], byte_tokenizer("causal"), max_length=16)
    assert made.cut == ("book",) and len(made) > 5 and made.document.tolist() == list(range(len(made)))
    twins = documents_of([task_of([{"text": "ab"}, {"text": "cd"}], name="x")] * 2, byte_tokenizer("causal"))
    assert list(dict.fromkeys(twins.files)) == ["x (1)", "x (2)"]
    with pytest.raises(ValueError, match="no text of two tokens"):
        documents_of([task_of([{"text": "x"}], name="tiny")], _WithoutEnd())


class _WithoutEnd:
    pad_token_id, eos_token_id = 0, None

    def __call__(self, text):
        return {"input_ids": [5]}


def test_losses_are_the_models_own(model, meter, texts):
    assert meter.loss(meter.hybrid()) == pytest.approx(by_hand(model, texts), abs=1e-5)
    for name in model.experts:
        with model.only(name):
            assert meter.loss(meter.alone(name)) == pytest.approx(by_hand(model, texts), abs=1e-5)
    uniform = hybrid_model()
    uniform.load_state_dict({**model.state_dict(), **{k: v for k, v in uniform.state_dict().items() if "router" in k}})
    assert meter.loss(meter.uniform()) == pytest.approx(by_hand(uniform, texts), abs=1e-5)


def test_the_ensemble_averages_logits_of_components_alone(model, meter, texts):
    total = 0.0
    for batch in texts.batches:
        mixed = 0
        for name in model.experts:
            with model.only(name), torch.no_grad():
                mixed = mixed + model(**batch.inputs).logits / 2
        total += float(cross_entropy(mixed.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="sum"))
    assert meter.loss(meter.ensemble()) == pytest.approx(total / float(texts.tokens.sum()), abs=1e-5)


def test_rows_are_read_as_they_are_applied(model, texts):
    rows = rows_of(model, texts.batches[0].inputs)
    assert [row.name for row in rows] == ["embedding", "blocks.0", "blocks.1", "head"]
    assert [row.weights[0] for row in rows] == pytest.approx([0.6, 0.7, 0.25, 0.1], abs=1e-6)
    assert all(row.spread is None for row in rows) and rows[3].leader == 1
    shared = rows_of(hybrid_model(rows="block" and ROWS), texts.batches[0].inputs)
    assert len(shared) == 4
    paper = hybrid_model(rows=None)
    paper.mixtures["head"].router = paper.mixtures["embedding"].router
    assert [row.slots for row in rows_of(paper, texts.batches[0].inputs)][0] == ("embedding", "head")


@pytest.mark.parametrize("slot", ["embedding", "blocks.0", "blocks.1", "head"])
def test_forced_weights_equal_rows_set_by_hand(model, meter, texts, slot):
    for value in (0.0, 1.0, 0.5, 0.2):
        other = with_row(model, slot, [value, 1 - value])
        wanted = by_hand(other, texts)
        assert meter.loss(meter.forced(slot, 0, value)) == pytest.approx(wanted, abs=1e-5)
        assert meter.loss(meter.forced(slot, 1, 1 - value)) == pytest.approx(wanted, abs=1e-5)


def test_three_components_share_the_rest_as_they_did(texts):
    three = hybrid_model(3, 1, rows=((0.5, 0.3, 0.2),))
    meter = Meter(three, texts)
    wanted = {0.0: [0.0, 0.6, 0.4], 1.0: [1.0, 0.0, 0.0], 0.4: [0.4, 0.36, 0.24]}
    for value, row in wanted.items():
        assert meter.loss(meter.forced("blocks.0", 0, value)) == pytest.approx(
            by_hand(with_row(three, "blocks.0", row), texts), abs=1e-5
        )
    found = counterfactuals(meter, {"blocks.0": (0.5, 0.3, 0.2)})
    assert [(c.component, c.forced) for c in found] == [(n, w) for n in NAMES for w in ("0", "1", "uniform")]


def test_nobody_runs_for_a_weight_of_zero(model, texts):
    seen = []
    hooks = [
        component.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, component in zip(model.experts, model.backbone.components)
    ]
    try:
        with left_out(model, 0):
            losses(model, texts)
        assert seen == ["llama"] * len(texts.batches)
    finally:
        for hook in hooks:
            hook.remove()


def test_leaving_out_one_of_two_is_the_other_alone(model, meter):
    without = leave_one_out(meter)
    assert [one.loss for one in without] == pytest.approx(
        [meter.loss(meter.alone("llama")), meter.loss(meter.alone("neox"))], abs=1e-6
    )
    gap = without[0].change
    assert gap.value == pytest.approx(without[0].loss - meter.loss(meter.hybrid()), abs=1e-9)
    assert gap.low <= gap.value <= gap.high


def test_what_a_weight_already_is_changes_nothing_and_is_not_measured(texts):
    path = hybrid_model(rows=((1.0, 0.0), (0.0, 1.0)))
    meter = Meter(path, texts)
    rows = {row.name: row.weights for row in rows_of(path, texts.batches[0].inputs)}
    found = [c for c in counterfactuals(meter, rows) if c.row == "blocks.0"]
    kept = {(c.component, c.forced) for c in found if c.kept}
    assert kept == {("neox", "1"), ("llama", "0")}
    assert all(c.change.value == c.change.low == c.change.high == 0 for c in found if c.kept)
    swapped = next(c for c in found if (c.component, c.forced) == ("neox", "0"))
    assert swapped.loss == pytest.approx(by_hand(with_row(path, "blocks.0", [0.0, 1.0]), texts), abs=1e-5)


def test_measuring_leaves_the_model_as_it_was(model, texts):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    routers = {slot: mixture.router for slot, mixture in model.mixtures.items()}
    runs = {slot: mixture.experts.run for slot, mixture in model.mixtures.items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.train()
    explain_hybrid(model, texts)
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(mixture.router is routers[slot] for slot, mixture in model.mixtures.items())
    assert all(mixture.experts.run == runs[slot] for slot, mixture in model.mixtures.items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_slices_add_up(meter, texts):
    systems = meter.systems()
    assert list(systems) == [HYBRID, "neox", "llama", ENSEMBLE, UNIFORM]
    found = slices(texts, systems)
    whole = found[0]
    assert whole.losses[HYBRID] == pytest.approx(meter.loss(meter.hybrid())) and whole.documents == 5
    for kind in {one.kind for one in found} - {"all"}:
        part = [one for one in found if one.kind == kind]
        assert sum(one.tokens for one in part) == whole.tokens
        mean = sum(one.losses[HYBRID] * one.tokens for one in part) / whole.tokens
        assert mean == pytest.approx(whole.losses[HYBRID])
    (plain,) = [one for one in found if one.name == "plain"]
    assert plain.losses["neox"] == pytest.approx(per_token(meter.alone("neox")[:3], texts.tokens[:3]))


def test_the_sweep_and_the_grid_meet_the_hybrid_and_each_other(model, meter, texts):
    rows = rows_of(model, texts.batches[0].inputs)
    one = sweep(meter, rows[1], 0)
    assert one.weights[0] == 0 and one.weights[-1] == 1 and len(one.losses) == 11
    assert one.losses[7] == pytest.approx(one.chosen_loss, abs=1e-5)
    assert one.chosen == pytest.approx(0.7) and one.losses[one.best] == min(one.losses)
    left, middle, right = (by_hand(with_row(model, "blocks.0", [w, 1 - w]), texts) for w in (0.65, 0.7, 0.75))
    assert one.curvature == pytest.approx((left - 2 * middle + right) / 0.05**2, abs=2e-2)
    plane = grid(meter, (rows[1], rows[3]), 0, points=3)
    other = copy.deepcopy(model)
    other.row("blocks.0").set(torch.tensor([0.5, 0.5]))
    other.row("head").set(torch.tensor([1.0, 0.0]))
    assert plane.losses[1][2] == pytest.approx(by_hand(other, texts), abs=1e-5)
    assert plane.rows == ("blocks.0", "head") and plane.chosen == pytest.approx((0.7, 0.1))


def test_flatness_is_the_hessian_of_the_loss(texts):
    wide = hybrid_model(2, 1, rows=ROWS[:1]).double()
    found = flatness(wide, texts)
    logits = [wide.row(slot).logits for slot in wide.mixtures]
    values = torch.cat([p.detach() for p in logits]).double()
    step, count = 0.02, len(values)

    def loss(*moves):
        at = values.clone()
        for place, sign in moves:
            at[place] += sign * step
        for parameter, part in zip(logits, at.split(2)):
            with torch.no_grad():
                parameter.copy_(part)
        return by_hand(wide, texts)

    hessian = torch.zeros(count, count, dtype=torch.float64)
    for a in range(count):
        for b in range(a + 1):
            four = [loss((a, s), (b, t)) * s * t for s in (1, -1) for t in (1, -1)]
            hessian[a, b] = hessian[b, a] = sum(four) / 4 / step**2
    wanted = torch.linalg.eigvalsh(hessian)
    assert found is not None and len(found.eigenvalues) == 3 and len(found.rows) == 3
    size = float(wanted.abs().max())
    assert size > 0.02 and found.eigenvalues[0] == pytest.approx(float(wanted[-1]), abs=0.03 * size)
    assert found.eigenvalues[-1] == pytest.approx(float(min(wanted[0], found.eigenvalues[-1])), abs=0.03 * size)
    assert flatness(hybrid_model(2, 1, rows=((1.0, 0.0),)), texts) is None


def test_boundaries_of_a_component_by_itself_are_its_own(texts):
    path = hybrid_model(rows=((0.0, 1.0), (0.0, 1.0)))
    found = boundaries(path, texts)
    assert [(b.slot, b.component) for b in found] == [(s, "llama") for s in ("embedding", "blocks.0", "blocks.1")]
    assert all(b.likeness == pytest.approx(1.0) and b.returned == b.own == b.mixed for b in found)
    assert found[0].stream is None and found[0].given is None
    assert found[1].given == pytest.approx(found[0].mixed) and found[2].stream == pytest.approx(found[1].mixed)


def test_boundaries_are_root_mean_squares_over_real_tokens(model, texts):
    found = {(b.slot, b.component): b for b in boundaries(model, texts, batches=1)}
    heard = {}
    hook = model.mixtures["blocks.0"].register_forward_hook(lambda _, args, out: heard.update(x=args[0], out=out))
    (batch, *_) = texts.batches
    with torch.no_grad():
        model.eval()(**batch.inputs)
    hook.remove()
    real = batch.inputs["attention_mask"].bool()
    one = found["blocks.0", "neox"]
    assert one.stream == pytest.approx(float(heard["x"][real].square().mean().sqrt()), rel=1e-5)
    assert one.mixed == pytest.approx(float(heard["out"][real].square().mean().sqrt()), rel=1e-5)
    enter = model.mixtures["blocks.0"].experts.enter[0]
    alpha = model.row("blocks.0").weights()[0]
    with torch.no_grad():
        given = (1 - alpha) * enter(heard["x"]) + alpha * heard["x"]
    assert one.given == pytest.approx(float(given[real].square().mean().sqrt()), rel=1e-5)
    assert 0 <= one.likeness < 0.9999


def test_one_component_and_one_block_are_explained_too(texts):
    single = hybrid_model(2, 1)
    found = explain_hybrid(single, texts)
    assert len(found.rows) == 3 and found.components[0].layers == ["", "layers 0\u20131", ""]
    assert len(found.sweeps) == 3 and found.grid is not None and found.best is not None
    assert found.systems[0].system == HYBRID and found.systems[0].against is None
    json.dumps(found.to_dict())
    three = explain_hybrid(hybrid_model(3, 1), texts, sweeps=False)
    assert three.grid is None and any("--no-sweep" in text for text in three.missing)
    assert three.flatness is None and len(three.counterfactuals) == 3 * 3 * 3 and len(three.left_out) == 3


def test_without_texts_it_says_what_it_can_and_names_the_rest(model):
    found = explain_hybrid(model)
    assert [row.weights[0] for row in found.rows] == pytest.approx([0.6, 0.7, 0.25, 0.1], abs=1e-6)
    assert not found.systems and not found.counterfactuals and found.texts is None
    assert any("--data" in text for text in found.missing) and any("--runs" in text for text in found.missing)


def test_what_the_model_says_of_its_cost_is_shown(model, texts, monkeypatch):
    found = explain_hybrid(model)
    shown, own = {what: much for what, much, _ in found.cost}, model.cost()
    assert set(own.lines()) <= set(found.cost)
    assert shown["Parameters in all"] == f"{own.parameters:,}" and "FLOPs per token" in shown
    assert own.state_bytes(1024) > 0 and shown["Decode state at 1,024 tokens"].endswith("B")
    assert "Decode state of neox" in shown and "Peak memory at 1,024 tokens" in shown
    assert not any("memory and energy" in text or "Operations of a pass" in text for text in found.missing)
    given = [("Whatever", "1", "")]
    assert explain_hybrid(model, cost=given).cost == given
    monkeypatch.setattr(type(model), "cost", None)  # a hybrid of another method, that says nothing of itself
    silent = explain_hybrid(model)
    assert not any("memory" in what for what, _, _ in silent.cost)
    assert any("memory and energy" in text for text in silent.missing)


def log(folder, stage, rows):
    (folder / stage).mkdir(parents=True)
    (folder / stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_trajectories_are_means_with_a_band_over_runs(tmp_path):
    for seed, end in enumerate((0.8, 0.6)):
        rows = [{"step": s, "loss": 1.0, "weight.blocks.0.a.b": 0.5 + (end - 0.5) * s / 2} for s in (0, 1, 2)]
        rows += [{"step": 3, "loss": 1.0, "weight.blocks.0.a.b": 0.9}] if seed else []
        log(tmp_path / str(seed), "search", [{**row, "weight.head.a.b": 0.5} for row in rows])
        log(tmp_path / str(seed), "align", [{"step": 1, "loss": 2.0}])
    found = trajectories([tmp_path / "0", tmp_path / "1"], ["blocks.0", "head"], ["a.b", "c"])
    assert [(t.stage, t.slot, t.component, t.runs) for t in found] == [
        ("search", "blocks.0", "a.b", 2), ("search", "head", "a.b", 2)
    ]  # fmt: skip
    first, second = found
    assert first.steps == [0, 1, 2] and first.mean == pytest.approx([0.5, 0.6, 0.7])
    assert first.low == pytest.approx([0.5, 0.55, 0.6]) and first.high == pytest.approx([0.5, 0.65, 0.8])
    assert still(second) and not still(first) and first.moved == pytest.approx(0.2)


def test_runs_without_weights_are_refused_by_name(tmp_path):
    log(tmp_path, "align", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match=r"no log.jsonl with weight\.<slot>"):
        trajectories([tmp_path], ["head"], ["a"])
    (tmp_path / "align" / "log.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        trajectories([tmp_path], ["head"], ["a"])


def test_a_router_that_follows_the_text_has_a_spread(texts):
    from mixwright.routers.base import AbstractRouter
    from mixwright.routing import Routing

    class ByToken(AbstractRouter):
        num_experts = 2

        def forward(self, x, condition):
            share = torch.sigmoid(x.float().mean(-1, keepdim=True) - 100)
            return Routing(torch.cat([share, 1 - share], -1), 2)

    model = hybrid_model(rows=ROWS)
    model.mixtures["embedding"].router = ByToken()
    (row, *_) = rows_of(model, texts.batches[0].inputs)
    ids = texts.batches[0].inputs["input_ids"][texts.batches[0].inputs["attention_mask"].bool()]
    wanted = torch.sigmoid(ids.float() - 100)
    assert row.weights[0] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert row.spread is not None and row.spread[0] == pytest.approx(float(wanted.std(correction=0)), abs=1e-5)
    meter = Meter(model, texts)
    fixed = with_row(hybrid_model(rows=ROWS), "embedding", [0.3, 0.7])
    assert meter.loss(meter.forced("embedding", 0, 0.3)) == pytest.approx(by_hand(fixed, texts), abs=1e-5)
    assert losses(model, texts).shape == texts.tokens.shape


def test_weights_that_depend_on_the_input_are_forced_swept_and_bent(texts):
    routed = hybrid_model(rows=ROWS, weights="token")
    with torch.no_grad():
        for mixture in list(routed.mixtures.values())[1:]:
            mixture.router.slope.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    found = explain_hybrid(routed, texts)
    assert found.rows[0].spread is None and all(row.spread is not None for row in found.rows[1:])
    assert found.systems[0].loss == pytest.approx(by_hand(routed, texts), abs=1e-5)
    static = with_row(hybrid_model(rows=ROWS), "blocks.0", [0.0, 1.0])
    with torch.no_grad():
        for name, parameter in static.named_parameters():
            if "router" not in name:
                parameter.copy_(dict(routed.named_parameters())[name])
    for slot, mixture in routed.mixtures.items():
        if slot != "blocks.0":
            mixture.router = static.mixtures[slot].router
    assert Meter(routed, texts).loss(Meter(routed, texts).forced("blocks.0", 0, 0.0)) == pytest.approx(
        by_hand(static, texts), abs=1e-5
    )
    assert found.flatness is not None and len(found.flatness.rows) == 4
