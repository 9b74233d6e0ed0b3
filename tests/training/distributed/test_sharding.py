"""Frozen weights divided between two processes: bit for bit the steps of a model in one piece."""

from __future__ import annotations


def test_steps_are_those_of_a_model_in_one_piece(outcomes) -> None:
    for process in outcomes["divided steps"]:
        found = process["returned"]
        assert all(found["equal"].values()), found["equal"]
        # Backward ends with what the next forward begins with.
        assert found["left"] == [True, True, False, False, False, False]


def test_no_more_than_a_share_and_three_blocks_are_there(outcomes) -> None:
    for process in outcomes["divided steps"]:
        found = process["returned"]
        assert found["most"] == 3
        assert 0.5 <= found["share"] < 0.6
        assert found["memory"] == 0


def test_an_absent_weight_is_not_read(outcomes) -> None:
    for process in outcomes["divided steps"]:
        found = process["returned"]
        assert "gathered only while its block runs" in found["read"]
        assert found["state"] == "Absent"


def test_blocks_that_run_again(outcomes) -> None:
    for process in outcomes["divided, checkpointed"]:
        assert process.get("returned") is True, process


def test_what_blocks_share_stays_whole(outcomes) -> None:
    for process in outcomes["divided, shared blocks"]:
        found = process["returned"]
        assert found["equal"]
        assert found["once"]
        assert found["divided"] > 0


def test_a_module_that_two_blocks_call_and_a_weight_that_the_head_reads(outcomes) -> None:
    """Weight and bias of three blocks; of the last its own two, and the bias beside the head's."""
    for process in outcomes["divided, shared modules"]:
        assert process.get("returned") == {"equal": True, "divided": [2, 2, 2, 3]}, process


def test_what_is_refused(outcomes) -> None:
    for process in outcomes["divided, refused"]:
        way, experts = process["returned"]
        assert "must be one of 'auto', 'collective', 'copies', got 'pigeons'" in way
        assert "quantised experts, such as stack, cannot be divided among processes" in experts
