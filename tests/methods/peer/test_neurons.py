import pytest
import torch
from torch import nn
from torch.nn import functional

from mixwright.backbones.tiny import tiny_backbone
from mixwright.methods.peer.feed_forward import feed_forwards
from mixwright.methods.peer.neurons import read_neurons
from mixwright.methods.peer.place_neurons import neurons_at

ACTS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
}


class Gated(nn.Module):
    """In and gate apart, fused as halves in either order, or fused in turns."""

    def __init__(self, form, bias=True):
        super().__init__()
        self.form = form
        self.out = nn.Linear(11, 6, bias=bias)
        if form == "apart":
            self.one, self.two = nn.Linear(6, 11, bias=bias), nn.Linear(6, 11, bias=bias)
        else:
            self.both = nn.Linear(6, 22, bias=bias)

    def forward(self, x):
        if self.form == "apart":
            gate, up = self.one(x), self.two(x)
        elif self.form == "in turns":
            gate, up = self.both(x)[..., ::2], self.both(x)[..., 1::2]
        else:
            gate, up = self.both(x).chunk(2, -1)
            gate, up = (up, gate) if self.form == "gate last" else (gate, up)
        return self.out(functional.silu(gate) * up)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(functional.relu(self.up(x)))


def assert_same(neurons, layer):
    x = torch.randn(2, 5, neurons.width, dtype=neurons.rows.dtype)
    with torch.no_grad():
        torch.testing.assert_close(neurons(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("hidden", [6, 13], ids=["square", "wide"])
def test_an_activation_is_told_by_what_the_layer_says(name, hidden):
    layer = nn.Sequential(nn.Linear(6, hidden), ACTS[name], nn.Linear(hidden, 6, bias=False))
    found = read_neurons(layer)
    assert (found.activation, len(found), found.out_bias) == (name, hidden, None)
    assert_same(found, layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["apart", "gate first", "gate last", "in turns"])
def test_gates_are_told_from_inputs_also_where_both_are_one_layer(form, bias):
    layer = Gated(form, bias)
    found = read_neurons(layer)
    assert found.activation == "silu" and found.rows.shape == (11, 3, 6)
    assert_same(found, layer)


def test_relu_squared_and_functions_between_two_layers():
    up, down = nn.Linear(6, 9), nn.Linear(9, 6)
    found = read_neurons([up, lambda x: functional.relu(x) ** 2, down])
    assert found.activation == "relu_squared"


def test_half_precision_keeps_its_type_where_a_table_has_it():
    layer = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    assert read_neurons(layer.bfloat16()).rows.dtype == torch.bfloat16
    assert read_neurons(layer.half()).rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), "the best of gelu.*it holds Tanh"),
        (Scaled(), "residual connection"),
        (nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 6)), "LayerNorm"),
        (nn.Linear(6, 6), "no feed-forward layer that can be read"),
        (nn.ReLU(), "of none"),
        (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)).to("meta"), "meta device"),
        (nn.Sequential(nn.Linear(6, 9), nn.Flatten(), nn.Linear(9, 6)), "can't be run|does not give"),
    ],
)
def test_what_the_weights_do_not_explain_is_refused(layer, words):
    with pytest.raises(ValueError, match=words):
        read_neurons(layer, "layers.3.mlp")


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "t5", "bert", "opt", "falcon", "bart", "distilbert", "albert", "gemma"]
)
def test_the_layers_of_a_family_where_they_stand(family):
    backbone = tiny_backbone(family)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases of zero would hide a lost one
    places = feed_forwards(backbone)
    assert places
    for place in places.values():
        found = neurons_at(backbone, place)
        if not place.entry:
            assert_same(found, backbone.get_submodule(place.path))


def test_a_norm_between_the_halves_of_a_block_is_noticed():
    backbone = tiny_backbone("opt")
    block = backbone.model.decoder.layers[0]

    def norm(_, args, output):  # in the block alone, as where its forward does that: the layers are read in float64
        return functional.layer_norm(output, (48,)) if output.dtype == torch.float32 else None

    block.fc1.register_forward_hook(norm)
    place = next(iter(feed_forwards(backbone).values()))
    with pytest.raises(ValueError, match="in a pass of the backbone they miss its output"):
        neurons_at(backbone, place)
