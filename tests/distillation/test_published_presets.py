"""Every shipped preset is what a published configuration says, or declares what it sets otherwise."""

from __future__ import annotations

import pytest

from detdistill.distillation.methods import METHODS

from .published_presets import PUBLISHED

OF_NO_PUBLICATION = {"ima"}  # docs/ima.md


def shipped(name, preset):
    """The options that a preset amounts to: the method's defaults, and its own."""
    method = METHODS[name]
    return method().over(method.presets[preset] if preset else {}).model_dump()


@pytest.mark.parametrize(("name", "preset"), PUBLISHED)
def test_a_preset_is_as_published(name, preset):
    published, options = PUBLISHED[name, preset], shipped(name, preset)
    declared = {option: value for option, (value, _) in published.ours.items()}
    for option, value in (published.values | declared).items():
        if option == "student_masks_from":  # ours are rounded
            assert options[option] == pytest.approx(value, abs=5e-4), option
        elif isinstance(value, float):
            assert options[option] == pytest.approx(value, rel=1e-12), option
        else:
            assert options[option] == value, option


@pytest.mark.parametrize("name", sorted(METHODS.keys() - OF_NO_PUBLICATION))
def test_every_preset_is_in_the_table_with_all_of_its_options(name):
    found = {preset for method, preset in PUBLISHED if method == name}
    assert found - {None} == METHODS[name].presets.keys()
    for preset, options in METHODS[name].presets.items():
        published = PUBLISHED[name, preset]
        assert options.keys() <= published.values.keys() | published.ours.keys(), preset


def test_a_source_is_whole():
    """A repository has a file and a whole commit; without one there is a reason for each value, or a paper."""
    for key, published in PUBLISHED.items():
        if published.repository:
            assert published.file, key
            assert published.commit is not None, key
            assert len(published.commit) == 40, key
            assert int(published.commit, 16), key
        else:
            assert published.file or not published.values, key
        assert all(why for _, why in published.ours.values()), key
