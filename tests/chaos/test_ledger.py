"""The ledger finds what it is there to find."""

from __future__ import annotations

from tests.chaos.ledger import Found, Ledger


def ledger() -> Ledger:
    one = Ledger()
    for job_id, number in (("a", 1.0), ("b", 2.0)):
        one.acknowledged(job_id, "", number)
    return one


def test_all_is_well() -> None:
    verdict = ledger().compare([Found("a", True, 1.0), Found("b", True, 2.0)], [("k1", "a"), ("k2", "b")])
    assert verdict.is_clean


def test_a_missing_result() -> None:
    assert ledger().compare([Found("a", True, 1.0)], []).missing == ["b"]


def test_two_results_of_one_job_and_two_jobs_of_one_key() -> None:
    found = [Found("a", True, 1.0), Found("a", True, 1.0), Found("b", True, 2.0)]
    assert ledger().compare(found, [("k", "b"), ("k", "c"), ("l", "a")]).doubled == ["a", "k"]


def test_an_answer_to_another_question() -> None:
    assert ledger().compare([Found("a", True, 2.0), Found("b", True, 1.0)], []).foreign == ["a", "b"]


def test_a_failure() -> None:
    assert ledger().compare([Found("a", False, None), Found("b", True, 2.0)], []).failed == ["a"]


def test_a_job_that_nobody_was_told_of_may_have_its_result() -> None:
    found = [Found("a", True, 1.0), Found("b", True, 2.0), Found("c", True, 9.0)]
    assert ledger().compare(found, [("k", "c")]).is_clean
