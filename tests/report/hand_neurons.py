"""A small explanation of a text in a model of retrieved neurons, written by hand."""

from collections.abc import Sequence

from mixwright.evaluation.neuron_text import BusyNeuron, HeadUse, NeuronText, NeuronToken, SiteText, TokenAtSite
from mixwright.evaluation.neurons import ActingNeuron

PIECES = ("one", " two", "\n", " three", " one")


def neuron(number: int = 7, head: int = 0, gate: float = 0.6, norm: float = 0.5) -> ActingNeuron:
    return ActingNeuron(id=number, place=divmod(number, 4), head=head, score=1.5, gate=gate, activation=0.8, norm=norm)


def neuron_text(
    pieces: Sequence[str] = PIECES, sites: Sequence[str] = ("layers.0.mlp", "layers.1.mlp"), *, flags: bool = True,
    covered: bool = True, beside: bool = True,
) -> NeuronText:  # fmt: skip
    def at(place: int) -> TokenAtSite:
        unsure = (1.0 if place == 1 else 0.0) if flags else None
        return TokenAtSite(
            neurons=[neuron(), neuron(5, 1, 0.4, 0.25)],
            coverage=0.5 - 0.1 * place if covered else None,
            margin=0.25,
            unsure=unsure,
            dense=0.125 if flags and place == 1 else None,
            size=1.0,
        )

    head = HeadUse(
        used=2, slots=5, coverage=0.3 if covered else None, entropy=2.5, margin=0.25, unsure=0.2 if flags else None
    )
    return NeuronText(
        text="".join(pieces),
        target=None,
        tokens=[
            NeuronToken(
                text=piece,
                token=piece,
                special=False,
                stream="text",
                at=[at(place) for _ in sites],
                loss=None if place == 0 else 1.0,
                loss_without=None if place == 0 or not beside else 1.5 + place,
            )
            for place, piece in enumerate(pieces)
        ],
        tails={"text": ""},
        sites=[
            SiteText(
                site=site,
                stream="text",
                grid=(3, 4),
                heads=[head, head],
                used=3,
                slots=10,
                effective=2.6,
                first=[4, 6, 0],
                second=[5, 0, 0, 5],
                busiest=[BusyNeuron(id=7, place=(1, 3), count=5, share=0.625, tokens=[1, len(pieces) - 1])],
            )
            for site in sites
        ],
        composition={"method": "peer", "config": {}, "backbone": {"fingerprint": "f1n9e4"}, "experts": []},
    )
