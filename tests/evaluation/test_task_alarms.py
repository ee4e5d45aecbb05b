"""What is wrong is said, and nothing is said of a model that is well."""

import torch

from mixwright.evaluation.task_alarms import task_alarms
from mixwright.evaluation.task_routing import task_routing

from .task_model import task_model

LOGITS = 4 * torch.eye(4)[:3] - 2


def kinds(model: object) -> dict[str, list[str]]:
    return {alarm.kind: alarm.sites for alarm in task_alarms(task_routing(model))}  # type: ignore[arg-type]


def test_a_model_that_is_well_has_no_alarm() -> None:
    for kind in ("poly", "tensor", "ordered"):
        logits = LOGITS[:, None].expand(-1, 2, -1) if kind == "ordered" else LOGITS
        assert kinds(task_model(kind, logits=logits)) == {}


def test_uniform_and_one_sided_routing() -> None:
    model = task_model(logits=LOGITS)
    sites = list(model.mixtures)
    with torch.no_grad():
        model.mixtures[sites[1]].router.logits.zero_()  # type: ignore[union-attr,operator]
    assert kinds(model) == {"uniform": [sites[1]]}
    one_sided = task_model(logits=torch.tensor([[8.0, -8, -8, -8]] * 2 + [[8.0, -6, -8, -8]]))
    assert set(kinds(one_sided)) == {"uniform", "collapsed", "dead"}
    text = [alarm.text for alarm in task_alarms(task_routing(one_sided))]
    assert "tells no tasks apart in every layer:" in text[0] and "latent-1, latent-2, latent-3." in text[2]


def test_an_expert_that_adds_nothing_is_dead() -> None:
    model = task_model(logits=LOGITS)
    sites = list(model.mixtures)
    with torch.no_grad():
        for leaf in (model.mixtures[sites[2]].experts.down[0], model.mixtures[sites[2]].experts.up[1]):  # type: ignore[index]
            leaf[3] = 0.0
    (alarm,) = task_alarms(task_routing(model))
    assert (alarm.kind, alarm.sites) == ("dead", [sites[2]])
    assert alarm.text == f"Latent experts that add nothing for any task in 1 of 4 layers: latent-3 ({sites[2]})."


def test_untrained_experts_are_not_called_dead() -> None:
    model = task_model(logits=LOGITS)
    with torch.no_grad():
        for mixture in model.mixtures.values():
            mixture.experts.up[1].zero_()  # type: ignore[union-attr,index,operator]
    assert list(kinds(model)) == ["untrained"]


def test_experts_that_cancel() -> None:
    model = task_model("poly", logits=torch.tensor([[8.0, 8, -8, -8], [8, 8, -8, -6], [8, 8, -6, -8]]))
    with torch.no_grad():
        for mixture in model.mixtures.values():
            mixture.experts.up[1] = 0.99 * -mixture.experts.up[0]  # type: ignore[index]
            mixture.experts.down[1] = mixture.experts.down[0]  # type: ignore[index]
            mixture.experts.up[2:] *= 1e-3  # type: ignore[index]
    assert "cancelling" in kinds(model)


def test_names_with_braces_are_names() -> None:
    model = task_model(logits=torch.full((3, 4), -1.0))
    model.experts = ("{0}", "{x", "a", "b")
    with torch.no_grad():
        model.mixtures[next(iter(model.mixtures))].experts.down[0][:2] = 0.0  # type: ignore[index]
        model.mixtures[next(iter(model.mixtures))].experts.up[0][:2] = 0.0  # type: ignore[index]
    assert any("{0}, {x" in alarm.text for alarm in task_alarms(task_routing(model)))


def test_diverged_training_is_said() -> None:
    model = task_model(logits=LOGITS)
    with torch.no_grad():
        model.mixtures[next(iter(model.mixtures))].experts.up[0][0] = float("nan")  # type: ignore[index]
    assert kinds(model)["not finite"] == [next(iter(model.mixtures))]
