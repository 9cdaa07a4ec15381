"""Laws of the contact sheets and of the slider's frames."""

import io

import numpy as np
import pytest
from PIL import Image

from sims_ray.errors import SimsError
from sims_ray.report.sheets import MORPH_BYTES, file_sheets, fitted_sheets, morph_of, side_of
from tests.report.summaries import morph, previews


def test_frames_go_by_rising_strength_and_start_at_the_chosen_one() -> None:
    values = morph()
    backwards = {**values, "omegas": values["omegas"][::-1], "images": values["images"][::-1]}
    for found in (morph_of(values), morph_of(backwards)):
        assert [frame.omega for frame in found.frames] == values["omegas"]
        assert found.frames[found.start].omega == 1.0
        assert (found.shown, found.total) == (64, 100)
        assert len({frame.png for frame in found.frames}) == len(found.frames)
    assert morph_of(values).frames[2].png == morph_of(backwards).frames[2].png


def test_side_names_every_strength() -> None:
    names = ["beyond the auxiliary", "the auxiliary alone", "between auxiliary and base", "the base"]
    names += ["between base and chosen", "the chosen strength", "beyond the chosen strength"]
    assert [side_of(omega, 1.5) for omega in (-1.5, -1.0, -0.5, 0.0, 1.0, 1.5, 2.0)] == names


def test_sheets_stay_within_their_limit_and_show_the_same_images() -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (8, 64, 3, 64, 64), dtype=np.uint8))
    pngs, shown = fitted_sheets(noise, MORPH_BYTES)
    assert sum(map(len, pngs)) <= MORPH_BYTES
    assert shown == 25  # 36 would not fit
    first = np.asarray(Image.open(io.BytesIO(pngs[3])))[:64, :64].transpose(2, 0, 1)
    assert (first == noise[3][0]).all()


def test_names_of_models_become_names_of_files() -> None:
    assert set(file_sheets(previews("base, matched/evaluations"))) == {"samples-base-matched-evaluations.png"}


def test_morph_that_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(SimsError, match="a batch for each strength"):
        morph_of({**morph(), "omegas": [0.0, 1.0]})
    with pytest.raises(SimsError, match="the chosen one, 7"):
        morph_of({**morph(), "selected": 7})
