import dataclasses

import pytest
from torch._inductor import list_mode_options

from marlin_w4a16.options import Options, parse
from marlin_w4a16.passes.settings import Rules, Settings


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
    "name, hint", [("liner", " Did you mean 'linear'?"), ("inductr", " Did you mean 'inductor'?"), ("xyz", ""), (3, "")]
)
def test_an_unknown_option_is_an_error_with_the_nearest_name_and_the_list(name, hint):
    with pytest.raises(ValueError) as caught:
        parse(None, {name: True})
    known = (
        "activation_quant, exclude, grouped, include, inductor, linear, mode, moe, recover, strict, tolerance, verify"
    )
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
        ({"moe": "no"}, "option 'moe': found 'no', expected bool"),
        ({"grouped": None}, "option 'grouped': found None, expected bool"),
        ({"mode": 3}, "option 'mode': found 3, expected str | None"),
        ({"inductor": ["max_autotune"]}, "option 'inductor': found ['max_autotune'], expected Mapping"),
    ],
)
def test_an_option_of_another_type_is_an_error(options, message):
    with pytest.raises(TypeError) as caught:
        parse(None, options)
    assert str(caught.value) == f"marlin_w4a16: {message}"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strict": 1}, "option 'strict': found 1, expected bool"),
        ({"verify": "yes"}, "option 'verify': found 'yes', expected bool"),
        ({"recover": None}, "option 'recover': found None, expected bool"),
        ({"tolerance": "2**-7"}, "option 'tolerance': found '2**-7', expected float | int"),
        ({"include": 3}, "option 'include': found 3, expected a glob or a list of globs"),
        ({"exclude": ["a", 3]}, "option 'exclude': found 3, expected str"),
        ({"include": [None]}, "option 'include': found None, expected str"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_an_error(options, message):
    with pytest.raises(TypeError) as caught:
        parse(None, options)
    assert str(caught.value).startswith(f"marlin_w4a16: {message}")


@pytest.mark.parametrize("tolerance", [-1e-9, 1, 1.5, float("nan"), float("inf")])
def test_a_tolerance_beyond_its_range_is_an_error(tolerance):
    with pytest.raises(ValueError) as caught:
        parse(None, {"tolerance": tolerance})
    assert str(caught.value) == f"marlin_w4a16: option 'tolerance': found {tolerance}, expected from 0 to below 1"


@pytest.mark.parametrize("value, hint", [("drops", " Did you mean 'drop'?"), ("ignore", ""), (None, "")])
def test_an_unknown_way_with_activations_is_an_error_with_the_nearest_name(value, hint):
    with pytest.raises(ValueError) as caught:
        parse(None, {"activation_quant": value})
    known = "drop, keep, refuse"
    assert str(caught.value) == f"marlin_w4a16: unknown activation_quant {value!r}.{hint} Known: {known}."


@pytest.mark.parametrize("value", ["keep", "drop", "refuse"])
def test_what_happens_to_activations_reaches_the_pass(value):
    settings = parse(None, {"activation_quant": value}).settings
    assert settings.activation_quant == value and settings.rules.drop_activations == (value == "drop")


def test_settings_of_the_pass():
    assert parse(None, None).settings == Settings() and Settings().rules == Rules(0.0, False, False)
    chosen = {"include": "a.*", "exclude": ["b", "c"], "verify": True, "tolerance": 0, "recover": True}
    assert parse(None, chosen).settings == Settings(Rules(0.0, True, False), ("a.*",), ("b", "c"), True, "keep")
    assert parse(None, {"include": ["a", "b"], "exclude": "c"}).settings.include == ("a", "b")
    assert parse(None, {"include": [], "exclude": "c"}).settings == Settings(include=(), exclude=("c",))
    assert parse(None, {"tolerance": 2**-7}).settings.rules.tolerance == 2**-7
