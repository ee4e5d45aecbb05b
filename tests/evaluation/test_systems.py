import pytest
import torch

from mixwright.data.collate import IGNORED
from mixwright.evaluation import systems
from mixwright.evaluation.activations import average_activations, greedy, moments
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.retrieval import build_library, mean_state, nearest_expert, prompt_mask
from mixwright.evaluation.scores import TokenTask
from mixwright.evaluation.systems import Sharing
from mixwright.routers.gate import PrototypeScores

from .conftest import batches, pool


def site_output(model, system, site, x):
    with torch.no_grad(), system.enter(model):
        return model.mixtures[site](x) - model.mixtures[site].base(x)


@pytest.fixture(scope="module")
def site(model):
    return next(iter(model.mixtures))


def test_merged_product_is_the_mean_of_the_explicit_matrices_and_the_parameter_average_is_not(model, site):
    experts = model.mixtures[site].experts
    x = torch.randn(3, 5, experts.down.shape[-1], generator=torch.Generator().manual_seed(5))
    product = torch.stack([s * up @ down for down, up, s in zip(experts.down, experts.up, experts.scale, strict=True)])
    merged = site_output(model, systems.merged(model), site, x)
    torch.testing.assert_close(merged, x @ product.mean(0).T, atol=1e-5, rtol=1e-5)
    twice = site_output(model, systems.merged(model, 0.5, "half each"), site, x)
    torch.testing.assert_close(twice, x @ product.sum(0).T / 2, atol=1e-5, rtol=1e-5)
    averaged = site_output(model, systems.parameter_average(model), site, x)
    by_hand = (experts.scale[:, None, None] * experts.up).mean(0) @ experts.down.mean(0)
    torch.testing.assert_close(averaged, x @ by_hand.T, atol=1e-5, rtol=1e-5)
    assert (averaged - merged).abs().max() > 1e-2


def test_retrieval_with_a_training_prompt_gives_its_own_expert(model, kind):
    own = [batches(kind, task, 12) for task in range(3)]
    library = build_library(model, own, mean_state)
    for task in range(3):
        assert nearest_expert(model, library, own[task][0]).tolist() == [task] * 12
    system = systems.retrieval(model, library)
    tasks = [TokenTask(str(task), own[task]) for task in range(3)]
    found = evaluate(model, tasks, [system, *systems.single_experts(model)])
    for task in range(3):
        row = found.cells("nats", [str(task)])[str(task), 0]
        torch.testing.assert_close(row["retrieval"], row[f"expert{task}"], atol=1e-5, rtol=1e-5)


def test_a_prompts_embedding_does_not_see_its_target(model, kind):
    (batch,) = batches(kind, 0, 4)
    (other,) = batches(kind, 0, 4)
    if kind == "causal":
        counted = batch.targets != IGNORED
        inputs = {**other.inputs, "input_ids": other.inputs["input_ids"].clone()}
        inputs["input_ids"][:, 1:][counted[:, :-1]] = 7  # the tokens that are targets, where they are read again
        other = type(batch)(kind, inputs, other.targets, other.weight)
        assert (prompt_mask(batch).sum(-1) == 7).all()
    torch.testing.assert_close(mean_state(model, batch), mean_state(model, other), atol=1e-5, rtol=1e-5)


def test_average_activation_is_the_mean_over_all_real_tokens_of_every_decoding_step(model, kind):
    own = [batches(kind, task, 3, seed=4) for task in range(3)]
    found = average_activations(model, own)
    for at, expert in enumerate(model.experts):
        seen = {site: [] for site in model.mixtures}
        hooks = [
            mixture.register_forward_pre_hook(lambda m, args, rows=seen[site]: rows.append(args[0][0].clone()))
            for site, mixture in model.mixtures.items()
        ]
        (batch,) = own[at]
        steps = int((batch.targets != IGNORED).sum(-1).max())
        with torch.no_grad(), model.only(expert):
            for row in range(3):  # one text at a time, token by token with its cache: no padding anywhere
                ids = batch.inputs["input_ids"][row : row + 1]
                if kind == "causal":
                    ids = ids[:, prompt_mask(batch)[row]]
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False
                )
        for hook in hooks:
            hook.remove()
        for site, rows in seen.items():
            brute = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).mean(0)
            torch.testing.assert_close(found[site][at], brute, atol=2e-4, rtol=1e-3)


def test_greedy_output_replaces_the_target_up_to_its_end(model, kind):
    (batch,) = batches(kind, 0, 4)
    own = greedy(model, batch)
    assert own.targets.shape[0] == 4 and (own.targets != IGNORED).any(-1).all()
    written = own.targets[own.targets != IGNORED]
    assert ((written == 1).sum() <= 4) and own.inputs["input_ids"].shape[0] == 4


def test_moments_are_those_of_the_tokens(model, kind):
    with model.disabled():
        plain = moments(model, batches(kind, 0, 6))
        paired = moments(model, batches(kind, 0, 6), paired=True)
    for site, found in plain.items():
        signature, wide = found.signature(), paired[site].signature(rank=2)
        torch.testing.assert_close(signature["mean"], wide["mean"])
        torch.testing.assert_close(signature["variance"], wide["variance"], atol=1e-4, rtol=1e-3)
        mean = paired[site].total / paired[site].count
        covariance = paired[site].squares / paired[site].count - torch.outer(mean, mean)
        size = torch.linalg.eigvalsh(covariance).flip(0)[:2]
        torch.testing.assert_close(wide["factor"].double().square().sum(-1), size, atol=1e-4, rtol=1e-2)


def test_every_system_runs_on_one_model_and_all_off_is_the_composition(model, kind):
    gates = {site: PrototypeScores(m.router.scores.prototypes) for site, m in model.mixtures.items()}
    experts = {site: m.experts for site, m in model.mixtures.items()}
    found = [
        systems.composed(),
        systems.scored("the same scores", model, gates, 2),
        systems.scored("off", model, gates, 2, sharing=Sharing()),
        systems.scored("all", model, gates, 3),
        systems.scored("null", model, gates, 2, sharing=Sharing(null_expert=0.0)),
        systems.scored("shared", model, gates, 2, sharing=Sharing(consensus=1.0, pooling=0.5, prior=0.5)),
        systems.scored("offset", model, gates, 1, offset=torch.tensor([0.0, 0.0, 1e4]), experts=experts),
        systems.random_prototypes(model, 2),
        systems.arrow(model, 2),
        systems.spectral(model, 1),
        *systems.single_experts(model),
    ]
    table = evaluate(model, [TokenTask("t", batches(kind, 0, 8))], found)
    row = table.cells("nats")["t", 0]
    assert torch.equal(row["off"], row["the same scores"])
    # the composition scores sites that read one tensor together, so the last bits differ
    torch.testing.assert_close(row["routed"], row["off"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row["offset"], row["expert2"], atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(values).all() for values in row.values())
    for name in ("all", "null", "shared", "random prototypes", "Arrow", "SpectR"):
        assert not torch.equal(row[name], row["routed"]), name


def test_a_null_expert_that_always_wins_is_the_backbone(model, kind):
    gates = {site: PrototypeScores(m.router.scores.prototypes) for site, m in model.mixtures.items()}
    null = systems.scored("null", model, gates, 1, sharing=Sharing(null_expert=1e6))
    table = evaluate(model, [TokenTask("t", batches(kind, 0, 4))], [null, systems.backbone()])
    row = table.cells("nats")["t", 0]
    torch.testing.assert_close(row["null"], row["backbone"], atol=1e-6, rtol=1e-6)


def test_random_prototypes_follow_their_seed():
    model = pool("causal")
    task = [TokenTask("t", batches("causal", 0, 4))]
    first, again, other = (
        evaluate(model, task, [systems.random_prototypes(model, 2, seed)]).cells("nats")["t", 0]["random prototypes"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
