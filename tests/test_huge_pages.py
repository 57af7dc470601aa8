"""A program starts once more with huge pages where Linux gives them, and never a third time."""

import sys

import pytest

from cv_jax.runtime import huge_pages


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What is started in place of this program: [(executable, arguments)]."""
    calls = []
    monkeypatch.setattr(huge_pages.os, "execv", lambda *call: calls.append(call))
    monkeypatch.setattr(huge_pages, "_LINUX_GIVES_THEM", tmp_path / "enabled")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "--config=a b"])
    monkeypatch.setenv(huge_pages.VARIABLE, "")  # so that its value now comes back at the end
    monkeypatch.delenv(huge_pages.VARIABLE)
    return calls


def test_it_starts_once_more_with_the_same_arguments(started, tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    for _ in range(2):
        huge_pages.use_huge_pages()
    own = sys.executable
    assert started == [(own, [own, "-X", "dev", "train.py", "--config=a b"])]
    assert huge_pages.os.environ[huge_pages.VARIABLE] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("offer", ["[always] madvise never", "always madvise [never]", None])
def test_it_goes_on_where_asking_changes_nothing(started, tmp_path, offer):
    if offer:
        (tmp_path / "enabled").write_text(offer)
    huge_pages.use_huge_pages()
    assert started == []


def test_a_choice_of_the_user_stays(started, tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setenv(huge_pages.VARIABLE, "")
    huge_pages.use_huge_pages()
    assert started == []
