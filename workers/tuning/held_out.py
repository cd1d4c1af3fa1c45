"""The decoder on the held-out assets, before and after. Nothing is chosen by what is found here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from workers.engine.sam import promptable
from workers.params import AutomaticParams
from workers.tuning.gathering import Embeddings, Gathered
from workers.tuning.judging import PROMPTED_OBJECTS, judge, searched
from workers.tuning.outcome import Judgement, Shown
from workers.tuning.plan import Plan
from workers.tuning.training import Run

_MOST_PROMPTED, _MOST_AUTOMATIC = 200, 20  # assets: a decoder of vit_h takes a minute each


def judge_held_out(
    plan: Plan,
    run: Run,
    judging: Sequence[Gathered],
    embeddings: Embeddings,
    automatic: tuple[AutomaticParams, AutomaticParams],
    *,
    say: Callable[[int, int], None],
) -> tuple[list[Judgement], list[Shown]]:
    """Judge those of these assets that have masks, one of each image. automatic: parameters before and after.

    say: called with how many of how many are done, before each look.
    """
    judgements: list[Judgement] = []
    shown: list[Shown] = []
    # Copies of an image fail together. Resampled as if they were several images, they would promise too much.
    images = {one.content: one for one in judging if one.asset.masks}
    chosen = sorted(images.values(), key=lambda one: one.content)[:_MOST_PROMPTED]
    for done, one in enumerate(chosen):
        masks = one.masks()
        whole = [n for n, mask in enumerate(masks) if mask.any()]
        some = sorted(np.random.default_rng((plan.seed, one.number)).permutation(whole)[:PROMPTED_OBJECTS].tolist())
        if not some:
            continue
        answers, found = [], []
        for weights, params in zip((run.start, run.kept()), automatic, strict=True):
            say(done, len(chosen))
            run.sam.mask_decoder.load_state_dict(weights)
            model, embedding = promptable(run.sam, fold_from_dim=0), embeddings.of(one.number)
            answers.append(judge(model, embedding, [masks[n] for n in some]))
            if done < _MOST_AUTOMATIC:
                found.append(searched(model, embedding, [masks[n] for n in whole], params))
        judgement = Judgement.of(one.asset, some, *answers)
        labels = [one.asset.masks[n].label for n in whole]
        judgements.append(judgement.with_automatic(labels, *found) if found else judgement)
        shown = Shown.most_changed([*shown, *Shown.of(one.asset, some, *answers)])
    say(len(chosen), len(chosen))
    return judgements, shown
