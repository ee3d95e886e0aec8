"""Random requests against `btok serve`: a few of what `python -m benchmarks.fuzz.requests` sends."""

from argparse import Namespace

from benchmarks.fuzz import requests


def test_requests_are_refused_or_get_the_right_vectors(capsys):
    """With seed 1, so that the long run with seed 0 sends others."""
    assert requests.run(Namespace(requests=300, seed=1, only=None)) == 0
    said = capsys.readouterr().out
    assert "findings: 0" in said and "200: " in said and "400: " in said


def test_a_request_depends_on_its_number_alone():
    assert requests.request(1, 7) == requests.request(1, 7) != requests.request(1, 8)
    assert any(body is None for _, body, _ in (requests.request(1, number) for number in range(50)))
