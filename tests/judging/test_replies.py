"""Listed tokens to labels: worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from lightning_rlhf.judging.replies import (
    Completion,
    Place,
    UnreadableError,
    completed,
    parse_completion,
    read_labels,
)
from lightning_rlhf.judging.verdicts import expected_value, first_probability


TEN = [str(i) for i in range(1, 11)]
VALUES = [float(i) for i in range(1, 11)]


def answer(*places: Place, stopped: bool = False) -> Completion:
    return Completion("".join(place.chosen for place in places), places, stopped=stopped)


def test_spellings_of_a_label_are_summed() -> None:
    place = Place("1", {"1": 0.4, " 1": 0.1, "▁1": 0.05, "Ġ2": 0.2, "2": 0.05, "The": 0.1})
    reading = read_labels(answer(place), ["1", "2"])
    assert reading.found == pytest.approx((0.55, 0.25))
    assert reading.mass == pytest.approx(0.8)
    assert first_probability(reading.logps).item() == pytest.approx(0.55 / 0.8)


def test_case_of_words_does_not_matter_unless_labels_differ_in_it_alone() -> None:
    place = Place("Yes", {"Yes": 0.5, " yes": 0.2, "No": 0.1, "NO": 0.1})
    assert read_labels(answer(place), ["no", "yes"]).found == pytest.approx((0.2, 0.7))
    place = Place("A", {"A": 0.5, "a": 0.2})
    assert read_labels(answer(place), ["a", "A"]).found == pytest.approx((0.2, 0.5))


def test_a_label_that_is_not_listed_gets_what_the_list_leaves_and_not_more_than_the_least_listed() -> None:
    # 0.9 + 0.06 are listed: 0.04 is left, and the least probable token listed has 0.06
    reading = read_labels(answer(Place("1", {"1": 0.9, "x": 0.06})), ["1", "2"])
    assert reading.logps.exp().tolist() == pytest.approx([0.9, 0.04])
    # 0.09 is left, but nothing that is not listed is more probable than 0.01
    reading = read_labels(answer(Place("1", {"1": 0.9, "x": 0.01})), ["1", "2"])
    assert reading.logps.exp().tolist() == pytest.approx([0.9, 0.01])
    assert reading.mass == pytest.approx(0.9)
    # several missing labels share what is left
    reading = read_labels(answer(Place("a", {"a": 0.7, "x": 0.2})), ["a", "b", "c"])
    assert reading.logps.exp().tolist() == pytest.approx([0.7, 0.05, 0.05])


def test_no_label_listed_is_no_mass_and_finite_numbers() -> None:
    reading = read_labels(answer(Place("I", {"I": 1.0})), ["1", "2"])
    assert reading.mass == 0
    assert torch.isfinite(reading.logps).all()
    reading = read_labels(Completion("", ()), ["1", "2"])
    assert reading.mass == 0


def test_a_space_of_its_own_is_followed_to_the_label() -> None:
    # SmolLM2 writes " 1" as " " and "1": P = 0.3 + 0.5 * 0.8
    first, second = Place(" ", {" ": 0.5, "1": 0.3, "2": 0.1}), Place("1", {"1": 0.8, "2": 0.2})
    reading = read_labels(answer(first, second), ["1", "2"])
    assert reading.found == pytest.approx((0.3 + 0.4, 0.1 + 0.1))


def test_one_and_ten_split_what_a_one_has() -> None:
    # the judge wrote "10": P(10) = 0.6 * 0.7, P(1) = 0.6 * (1 - 0.7 - 0.1), "15" is no label
    first, second = Place("1", {"1": 0.6, "9": 0.4}), Place("0", {"0": 0.7, "5": 0.1, ".": 0.2})
    reading = read_labels(answer(first, second, Place(".", {".": 1.0})), TEN)
    assert reading.open == {}
    assert reading.found[0] == pytest.approx(0.12)
    assert reading.found[8] == pytest.approx(0.4)
    assert reading.found[9] == pytest.approx(0.42)
    # and where it wrote "1", with an end behind it
    second = Place("\n", {"\n": 0.6, "0": 0.3, " 0": 0.1})
    reading = read_labels(answer(first, second), TEN)
    assert reading.found[0] == pytest.approx(0.6 * 0.7)
    assert reading.found[9] == pytest.approx(0.6 * 0.3)


def test_a_one_that_was_not_chosen_is_open() -> None:
    reading = read_labels(answer(Place("9", {"9": 0.7, "1": 0.3})), TEN)
    assert reading.open == pytest.approx({"1": 0.3})
    assert reading.mass == pytest.approx(0.7)
    assert reading.found[0] == 0


def test_a_one_is_a_label_where_the_vocabulary_writes_ten_as_one_token() -> None:
    reading = read_labels(answer(Place("9", {"9": 0.5, "1": 0.3, "10": 0.2})), TEN)
    assert reading.open == {}
    assert (reading.found[0], reading.found[9]) == pytest.approx((0.3, 0.2))


def test_a_one_behind_which_the_judge_stopped_is_a_label() -> None:
    assert read_labels(answer(Place("1", {"1": 0.9, "2": 0.1}), stopped=True), TEN).found[0] == pytest.approx(0.9)
    assert read_labels(answer(Place("1", {"1": 0.9, "2": 0.1})), TEN).open == pytest.approx({"1": 0.9})


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_an_end_of_text_that_is_spelt_with_nothing_counts_once(end: str) -> None:
    places = (Place("1", {"1": 0.6, "8": 0.3}), Place(end, {end: 0.9, "0": 0.08}))
    found = dict(zip(TEN, read_labels(answer(*places, stopped=True), TEN).found, strict=True))
    assert found["1"] == pytest.approx(0.6 * (1 - 0.08))
    assert found["10"] == pytest.approx(0.6 * 0.08)
    # listed, but not what was chosen
    places = (places[0], Place("\n", {"\n": 0.5, end: 0.4, "0": 0.08}))
    found = dict(zip(TEN, read_labels(answer(*places), TEN).found, strict=True))
    assert found["1"] == pytest.approx(0.6 * (1 - 0.08))


def test_a_second_read_behind_the_one_closes_it() -> None:
    reading = read_labels(answer(Place("9", {"9": 0.7, "1": 0.3})), TEN)
    later = read_labels(answer(Place("0", {"0": 0.8, "2": 0.1, ".": 0.1})), TEN, "1", reading.open["1"])
    reading = completed(reading, "1", later)
    assert reading.open == {}
    assert reading.found[9] == pytest.approx(0.24)
    assert reading.found[0] == pytest.approx(0.3 * 0.1)
    assert reading.mass == pytest.approx(0.97)
    # merged, "1" would have drawn the expected score to 0.7 * 9 + 0.3 * 1 = 6.6
    found = [0.03, *[1e-12] * 7, 0.7, 0.24]
    expected = sum(v * p for v, p in zip(VALUES, found, strict=True)) / sum(found)
    assert expected_value(reading.logps, VALUES).item() == pytest.approx(expected, abs=1e-6)


def test_a_second_read_that_ends_at_once_makes_the_one_a_label() -> None:
    reading = read_labels(answer(Place("9", {"9": 0.7, "1": 0.3})), TEN)
    reading = completed(reading, "1", read_labels(Completion("", (), stopped=True), TEN, "1", 0.3))
    assert reading.found[0] == pytest.approx(0.3)


def test_labels_of_several_tokens_are_read_along_what_was_written() -> None:
    first, second = Place("go", {"go": 0.6, "ba": 0.3}), Place("od", {"od": 0.9, "ne": 0.1})
    reading = read_labels(answer(first, second), ["good", "bad"])
    assert reading.found == pytest.approx((0.54, 0.0))
    assert reading.open == pytest.approx({"ba": 0.3})


# ---- bodies ------------------------------------------------------------------------------------------------------


def body(**changes: Any) -> dict[str, Any]:
    token = {"token": "1", "logprob": math.log(0.5), "bytes": [49]}
    other = {"token": " 1", "logprob": math.log(0.25), "bytes": [32, 49]}
    choice = {
        "message": {"role": "assistant", "content": "1"},
        "finish_reason": "stop",
        "logprobs": {"content": [token | {"top_logprobs": [token, other]}]},
    }
    return {"choices": [choice | changes], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def test_body_is_read() -> None:
    completion = parse_completion(json.dumps(body()))
    assert completion.text == "1"
    assert completion.places is not None
    assert completion.places[0].chosen == "1"
    assert completion.places[0].listed == pytest.approx({"1": 0.5, " 1": 0.25})
    assert (completion.tokens_in, completion.tokens_out, completion.stopped) == (7, 1, True)


def test_what_was_generated_counts_where_it_is_not_listed() -> None:
    raw = body()
    raw["choices"][0]["logprobs"]["content"][0]["top_logprobs"].pop(0)
    completion = parse_completion(json.dumps(raw))
    assert completion.places is not None
    assert completion.places[0].listed == pytest.approx({"1": 0.5, " 1": 0.25})


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}])
def test_missing_log_probabilities_are_noticed(logprobs: Any) -> None:
    assert parse_completion(json.dumps(body(logprobs=logprobs))).places is None


def test_an_empty_answer_is_no_missing_log_probability() -> None:
    raw = body(logprobs={"content": []}, message={"content": ""})
    assert parse_completion(json.dumps(raw)).places == ()


def test_refusals_are_read() -> None:
    assert (
        parse_completion(json.dumps(body(message={"content": None, "refusal": "I will not"}))).refusal == "I will not"
    )
    assert parse_completion(json.dumps(body(finish_reason="content_filter"))).refusal == "content filter"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>busy</html>",
        "[]",
        "null",
        "{}",
        '{"choices": []}',
        '{"choices": [{"message": "1"}]}',
        '{"choices": 3}',
    ],
)
def test_nonsense_is_no_completion(text: str) -> None:
    with pytest.raises(UnreadableError, match=r"no (JSON|chat completion)") as caught:
        parse_completion(text)
    assert not caught.value.cut


def test_json_that_breaks_off_is_told_apart() -> None:
    whole = json.dumps(body())
    with pytest.raises(UnreadableError, match="breaks off") as caught:
        parse_completion(whole[: len(whole) // 2])
    assert caught.value.cut


@pytest.mark.parametrize("value", [float("nan"), "x", None])
def test_log_probabilities_that_are_no_numbers_are_no_completion(value: Any) -> None:
    raw = body()
    raw["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = value
    with pytest.raises(UnreadableError):
        parse_completion(json.dumps(raw))
