"""A trace of a beam search, aligned with its answers, is the trace of a plain pass over each answer."""

from typing import Any

import pytest
import torch

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.beams import align_trace
from mixwright.composition.model import ComposedModel
from mixwright.routing import Routing

IDS = torch.tensor([[5, 9, 17, 33, 65], [8, 13, 21, 34, 55]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "opt"])
@pytest.mark.parametrize("returned", [1, 2])
def test_every_answer_follows_its_own_path(family: str, returned: int, pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone(family, initializer_range=0.3) if family == "llama" else tiny_backbone(family)
    model: ComposedModel = composed(backbone, pool_of(backbone, strength=0.4))
    torch.manual_seed(3)
    with model.trace() as trace:
        out = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), num_beams=3, num_return_sequences=returned,
            max_new_tokens=6, do_sample=True, temperature=3.0, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    beams = out.beam_indices
    assert (beams.diff(dim=1) != 0).any(), "no beam ever moved: the test would show nothing"
    aligned = align_trace(trace, beams)
    two_streams = model.config.is_encoder_decoder
    rows = IDS.repeat_interleave(returned, 0)
    for answer, sequence in enumerate(out.sequences):
        steps = int((beams[answer] >= 0).sum())
        tokens = sequence[None, : steps + (0 if two_streams else IDS.shape[1] - 1)]
        inputs = (
            {"input_ids": rows[answer : answer + 1], "decoder_input_ids": tokens}
            if two_streams
            else {"input_ids": tokens}
        )
        with model.trace() as plain, torch.no_grad():
            model(**inputs)
        for site, passes in plain.items():
            told = torch.cat([r.dense()[answer] for r in aligned[site]], 0)
            wanted = passes[0].dense()[0]
            torch.testing.assert_close(told[: len(wanted)], wanted, rtol=1e-3, atol=1e-4)
            assert (told[len(wanted) :] == 0).all()


def test_a_routing_without_rows_is_left_alone() -> None:
    constant = Routing(torch.ones(4), 4)
    aligned = align_trace({"site": [constant]}, torch.zeros(2, 3, dtype=torch.long))
    assert aligned == {"site": [constant]}
