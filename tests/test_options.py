import dataclasses

import pytest
from torch._inductor import list_mode_options

from marlin_w4a16.options import Options, parse


def test_the_defaults():
    assert parse(None, None) == parse(None, {}) == Options(linear=True, mode=None, inductor={})
    assert not Options().patches


@pytest.mark.parametrize("mode", list_mode_options())
def test_a_mode_gives_its_settings_from_either_side(mode):
    assert parse(mode, None) == parse(None, {"mode": mode})
    assert parse(mode, None).patches == list_mode_options(mode)


def test_settings_for_inductor_go_over_those_of_the_mode():
    options = parse(None, {"mode": "max-autotune", "inductor": {"max_autotune": False, "epilogue_fusion": True}})
    assert list_mode_options("max-autotune")["max_autotune"] is True
    assert options.patches == list_mode_options("max-autotune") | {"max_autotune": False, "epilogue_fusion": True}


def test_options_are_frozen_and_leave_what_they_were_made_from():
    given = {"linear": False}
    options = parse("default", given)
    assert given == {"linear": False}
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.linear = True


@pytest.mark.parametrize(
    "name, hint",
    [("liner", " Did you mean 'linear'?"), ("inductr", " Did you mean 'inductor'?"), ("xyz", ""), (3, "")],
)
def test_an_unknown_option_is_an_error_with_the_nearest_name_and_the_list(name, hint):
    with pytest.raises(ValueError) as caught:
        parse(None, {name: True})
    known = "activation_quant, exclude, include, inductor, linear, mode, recover, strict, tolerance, verify"
    assert str(caught.value) == f"marlin_w4a16: unknown option {name!r}.{hint} Known: {known}."


@pytest.mark.parametrize("options", [None, {"mode": "reduce-overheads"}])
def test_an_unknown_mode_is_an_error_with_the_nearest_name_and_the_list(options):
    with pytest.raises(ValueError) as caught:
        parse(None if options else "reduce-overheads", options)
    message = str(caught.value)
    assert message.startswith("marlin_w4a16: unknown mode 'reduce-overheads'. Did you mean 'reduce-overhead'? Known: ")
    assert all(mode in message for mode in list_mode_options())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"linear": 1}, "option 'linear': found 1, expected bool"),
        ({"mode": 3}, "option 'mode': found 3, expected str | None"),
        ({"inductor": ["max_autotune"]}, "option 'inductor': found ['max_autotune'], expected Mapping"),
    ],
)
def test_an_option_of_another_type_is_an_error(options, message):
    with pytest.raises(TypeError) as caught:
        parse(None, options)
    assert str(caught.value) == f"marlin_w4a16: {message}"
