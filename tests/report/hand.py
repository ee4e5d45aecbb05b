"""Explanations made by hand, so that the pages can be tested without a model."""

from mixwright.evaluation.explain import ActingExpert, ExplainedToken, Explanation

TEXT = "Permission is\n\there<b>by & granted 🙂 \u202eevil\u202c مرحبا.  "
PIECES = (
    "",
    "Permission",
    " is",
    "\n\t",
    "here",
    "<b>",
    "by",
    " &",
    " granted",
    " 🙂",
    "",
    " \u202eevil\u202c",
    " مرحبا",
    ".",
    "  ",
)
EXPERTS = ["licence", "yaml", "cpp_headers"]


def explanation(experts: list[str] | None = None, pieces: tuple[str, ...] = PIECES, losses: bool = True) -> Explanation:
    """Tokens led by one expert after another, the first of them special."""
    names = EXPERTS if experts is None else experts
    acting = min(len(names), (len(pieces) - 1) // 3 + 2)
    return Explanation(
        text="".join(pieces),
        target=None,
        experts=names,
        tokens=[_token(place, piece, names, losses) for place, piece in enumerate(pieces)],
        tails={"text": ""},
        depths=["model.layers.0", "model.layers.1"],
        weight_by_depth=[[1 / acting] * acting + [0.0] * (len(names) - acting)] * 2,
        contribution_by_depth=[[added] * acting + [0.0] * (len(names) - acting) for added in (0.1, 0.2)],
        without=names[0] if losses else None,
        composition={
            "method": "phatgoose",
            "config": {"top_k": 2},
            "backbone": {"path": "somewhere/base", "fingerprint": "f1n9e4"},
            "experts": [
                {"id": name, "licence": "Apache-2.0", "source": {"kind": "hub", "name": name}} for name in names
            ],
        },
    )


def _token(place: int, piece: str, names: list[str], losses: bool) -> ExplainedToken:
    leader, other = names[place // 3 % len(names)], names[(place // 3 + 1) % len(names)]
    return ExplainedToken(
        text=piece,
        token="<s>" if place == 0 else piece or "Ä",
        special=place == 0,
        stream="text",
        leader=leader,
        experts=[
            ActingExpert(expert=leader, weight=0.75, contribution=0.2, share=0.8),
            ActingExpert(expert=other, weight=0.25, contribution=0.05, share=0.2),
        ],
        margin=0.5,
        loss=1.0 if losses and place else None,
        loss_backbone=2.0 if losses and place else None,
        loss_without=1.25 if losses and place else None,
    )
